#!/usr/bin/env python
"""Pretrain a CLIPS encoder on the demo or, with --data, on your own triples of image, web caption and long caption."""

from clips.common.errors import start
from clips.training.cli import parser

if __name__ == "__main__":
    start(parser, "clips.training.cli:pretrain_from_flags")
