#!/usr/bin/env python
"""The checkpoints of a run of either half: list them, verify their hashes, delete what need not stay."""

import sys
from pathlib import Path

from clips.common.errors import run_command
from clips.common.flags import Parser


def parser() -> Parser:
    p = Parser(__doc__)
    p.add_argument(
        "action",
        choices=("list", "verify", "prune"),
        help="verify reads every file and exits with 1 where one is damaged",
    )
    p.add_argument("place", metavar="DIR", type=Path, help="runs/NAME, or one checkpoint in it")
    p.add_argument("--keep", type=int, default=2, help="prune: the newest ones that stay")
    p.add_argument(
        "--keep-every",
        type=int,
        default=0,
        metavar="SAMPLES",
        help="prune: the first one past each multiple of so many samples stays too; 0 is off",
    )
    p.add_argument("--dry-run", action="store_true", help="prune: only say what would go")
    return p


def main() -> None:
    flags = parser().parse_args()
    from clips.common import saved

    if flags.action == "prune":
        saved.prune_saved(flags.place, flags.keep, flags.keep_every, dry_run=flags.dry_run)
    else:
        saved.list_saved(flags.place, verify=flags.action == "verify")


if __name__ == "__main__":
    sys.exit(run_command(main))
