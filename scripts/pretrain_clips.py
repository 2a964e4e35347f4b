#!/usr/bin/env python
"""Pretrain a CLIPS encoder: the demo by default, your own image / web caption / long caption triples with --data."""

import sys

from clips.common.errors import run_command
from clips.training.cli import parser, pretrain_from_flags


def main() -> None:
    pretrain_from_flags(parser().parse_args())


if __name__ == "__main__":
    sys.exit(run_command(main))
