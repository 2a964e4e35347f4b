#!/usr/bin/env python
"""Turn a table or tar shards with attribute columns into questions: LLaVA's training files, and a test set."""

from clips.common.errors import start
from clips.common.flags import Parser, at_least


def parser() -> Parser:
    p = Parser(__doc__)
    p.add_argument("--data", required=True, help="tables, or tar shards with JSON members, as in pretraining")
    p.add_argument("--test-data", help="rows for the test (default: a share of --data)")
    p.add_argument("--held-out", type=float, default=0.1, help="this share, split by --key")
    p.add_argument("--key", help="rows with equal values in this column stay in one split (default: equal images)")
    p.add_argument("--output", default="data/questions", help="folder for the files")
    p.add_argument("--image", help="tables: column of the images (default: by its name, such as image or path)")
    p.add_argument("--image-root", help="tables: folder of image paths (default: the table's)")
    p.add_argument("--columns", nargs="+", help="columns to ask about (default: those with few values)")
    p.add_argument("--ask", nargs="+", default=[], metavar="COLUMN=TEXT", help="for example colour='Which colour?'")
    p.add_argument("--min-count", type=at_least(1), default=20, help="skip values that fewer training rows have")
    p.add_argument("--limit", type=at_least(1), help="training images, drawn by seed (default: all)")
    p.add_argument("--per-kind", type=at_least(1), default=300, help="test questions of each kind")
    p.add_argument("--caption", help="column of captions for stage 1 (default: none)")
    p.add_argument("--pack", action="store_true", help="copy images and captions to train.tar and test.tar")
    p.add_argument("--long", help="with --pack: long captions, such as 'A {colour} {kind}, {use}.' (default: none)")
    p.add_argument("--seed", type=int, default=0, help="seed of all random choices")
    return p


if __name__ == "__main__":
    start(parser, "mllm.data.attributes:build_from_flags")
