#!/usr/bin/env python
"""Upload a model directory written here (an export's format, a LLaVA run's model) to the Hugging Face hub."""

import sys
from pathlib import Path

from clips.common.errors import run_command
from clips.common.flags import Parser


def parser() -> Parser:
    p = Parser(__doc__)
    p.add_argument("directory", type=Path, help="such as runs/NAME/export/open_clip or runs/NAME/model")
    p.add_argument("repo", help="OWNER/NAME on the hub; made if missing")
    p.add_argument("--private", action="store_true", help="make a new repository private")
    p.add_argument("--dry-run", action="store_true", help="print the files that would go up, and upload nothing")
    return p


def main() -> None:
    flags = parser().parse_args()
    from clips.weights.push import push

    push(flags.directory, flags.repo, private=flags.private, dry_run=flags.dry_run)


if __name__ == "__main__":
    sys.exit(run_command(main))
