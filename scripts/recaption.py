#!/usr/bin/env python
"""Write a long caption for each pair of image and web caption: data for CLIPS. The same command resumes."""

import argparse
from pathlib import Path

from clips.common.errors import start
from clips.common.flags import Parser, at_least


def parser() -> argparse.ArgumentParser:
    p = Parser(__doc__)
    p.add_argument("--data", required=True, help="pairs: a folder, pattern or URL of tar shards, or tables")
    p.add_argument("--fields", nargs="+", action="extend", default=[], metavar="PART=FIELD", help="as in pretraining")
    p.add_argument("--image-root", help="tables: the folder of relative image paths")
    p.add_argument("--output", type=Path, required=True, help="folder for the parts")
    p.add_argument("--captioner", required=True, help="hf:ID_OR_DIR or endpoint:URL[,URL][#MODEL]")
    p.add_argument("--prompt", type=Path, help="file of the prompt; {web} marks the web caption (default: built in)")
    p.add_argument("--part-size", type=at_least(1), default=5000, help="pairs of a part, which is what a stop may cost")
    p.add_argument("--max-new-tokens", type=at_least(1), default=256, help="longest caption, in tokens")
    p.add_argument("--batch-size", type=at_least(1), default=32, help="pairs that the model or each server gets")
    p.add_argument("--max-left-out-share", type=float, default=0.3, help="a part that loses more is not written")
    return p


if __name__ == "__main__":
    start(parser, "mllm.recaption:recaption_from_flags")
