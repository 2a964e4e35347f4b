#!/usr/bin/env python
"""Pretrain a CLIPS encoder: the demo by default, your own image / web caption / long caption triples with --data."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from clips.common.errors import run_command
from clips.training.cli import parser


def main() -> None:
    flags = parser().parse_args()
    from clips.training.cli import pretrain_from_flags

    pretrain_from_flags(flags)


if __name__ == "__main__":
    sys.exit(run_command(main))
