#!/usr/bin/env python
"""Pretrain a CLIPS encoder on the demo or, with --data, on your own triples of image, web caption and long caption."""

import sys

from clips.common.errors import run_command
from clips.training.cli import parser, pretrain_from_flags

if __name__ == "__main__":
    sys.exit(run_command(lambda: pretrain_from_flags(parser().parse_args())))
