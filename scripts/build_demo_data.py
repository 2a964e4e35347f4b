#!/usr/bin/env python
"""Build the demo data, scenes drawn by several artists. If it is missing, training builds it by itself."""

import sys

from clips.common.errors import run_command
from clips.common.flags import Parser


def parser() -> Parser:
    p = Parser(__doc__)
    p.add_argument("--output", default="data/demo", help="folder for the data")
    p.add_argument("--seed", type=int, default=0, help="seed of every scene and text")
    return p


def main() -> None:
    flags = parser().parse_args()
    from clips.common.live import say_next
    from clips.data.demo import ensure_demo

    directory = ensure_demo(flags.output, seed=flags.seed, again=True)
    print(f"The demo data is in {directory}")
    say_next("deepspeed scripts/pretrain_clips.py")


if __name__ == "__main__":
    sys.exit(run_command(main))
