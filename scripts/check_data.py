#!/usr/bin/env python
"""Check data before a run: pairs for pretraining (DATA, --mix, --karpathy) or a LLaVA data set (--conversations).

The exit code is 2 if something would stop a training, and 4 if more samples are broken than a training tolerates.
"""

import argparse
import sys

from clips.common.errors import run_command
from clips.common.flags import Parser, at_least
from clips.recipes import RECIPES
from mllm import DEFAULT_LLM


def parser() -> Parser:
    p = Parser(__doc__)
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("data", nargs="?", default=argparse.SUPPRESS, metavar="DATA", help="pairs: same as --data")
    what.add_argument("--data", help="pairs: a folder, pattern or URL of tar shards, or a table")
    what.add_argument("--mix", nargs="+", action="extend", metavar="NAME=SHARE:DATA", help="pairs: several sets")
    what.add_argument("--karpathy", metavar="FILE", help="pairs: all splits of A. Karpathy's JSON")
    what.add_argument("--conversations", metavar="FILE", help="LLaVA JSON or JSONL file, or captions as --data")
    p.add_argument("--limit", type=at_least(1), help="check only this many samples, drawn at random (default: all)")
    p.add_argument("--jobs", type=at_least(1), default=1, help="processes that read and decode")
    pairs = p.add_argument_group("pairs, with the flags of pretrain_clips.py")
    pairs.add_argument("--fields", nargs="+", action="extend", metavar="PART=FIELD", help="as in pretraining")
    pairs.add_argument("--image-root", help="tables: the folder that image paths are relative to")
    words = "recipe whose tokenizer and lengths the captions must fit"
    pairs.add_argument("--recipe", default="small", choices=RECIPES, help=words)
    llava = p.add_argument_group("LLaVA data")
    llava.add_argument("--image-folder", help="folder or uncompressed tar with the images")
    llava.add_argument("--conv-mode", default="auto", help="conversation format, the --version of train_llava.sh")
    llava.add_argument("--language-model", default=DEFAULT_LLM, help="directory or hub id of the tokenizer")
    llava.add_argument("--image-tokens", type=at_least(1), default=576, help="tokens of one image")
    llava.add_argument("--max-length", type=at_least(1), default=2048, help="context in tokens")
    return p


def main() -> None:
    flags = parser().parse_args()
    if flags.conversations is None:
        from clips.data.check import check_from_flags
    else:
        from mllm.training.check_data import check_from_flags
    check_from_flags(flags)


if __name__ == "__main__":
    sys.exit(run_command(main))
