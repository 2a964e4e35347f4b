#!/usr/bin/env python
"""Build the embedded demo data (scenes drawn by several artists). Training does it by itself when it is missing."""

import argparse
import sys

from clips.common.errors import run_command


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--dir", default="data/demo", help="where the data is written")
    p.add_argument("--seed", type=int, default=0, help="seed of every scene and text")
    p.add_argument("--image-size", type=int, default=64, help="side of the pictures in pixels")
    return p


def main() -> None:
    flags = parser().parse_args()
    from clips.data.demo import ensure_demo

    directory = ensure_demo(flags.dir, seed=flags.seed, image_size=flags.image_size, again=True)
    print(f"The demo data is in {directory}\nNext: deepspeed scripts/pretrain_clips.py")


if __name__ == "__main__":
    sys.exit(run_command(main))
