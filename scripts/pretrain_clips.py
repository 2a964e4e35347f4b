#!/usr/bin/env python
"""Pretrain a CLIPS encoder: the demo by default, your own image / web caption / long caption triples with --data."""

from clips.common.errors import start
from clips.training.cli import parser

if __name__ == "__main__":
    start(parser, "clips.training.cli:pretrain_from_flags")
