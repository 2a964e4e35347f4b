#!/usr/bin/env python
"""Measure training here: steps beside open_clip's, whole programs beside open_clip's."""

import argparse
import sys

from clips.common.errors import start
from clips.common.flags import Parser


def parser() -> argparse.ArgumentParser:
    p = Parser(__doc__)
    p.add_argument("what", choices=("train", "program"), help="what to measure")
    p.add_argument("--device", default="auto", help="auto, cpu or cuda")
    p.add_argument("--repeats", type=int, default=5, help="turns of each compared part")
    p.add_argument("--data", default="data/demo", help="folder of the demo data")
    p.add_argument("--output", help="JSON file for the figures")
    p.add_argument("--against", choices=("open_clip",), default="open_clip", help="program: whose trainer")
    p.add_argument("--size", choices=("demo", "s16", "b16"), default="demo", help="program: towers and batch")
    p.add_argument(
        "--their-python", default=sys.executable, help="program: the Python with open_clip's trainer (default: this)"
    )
    return p


if __name__ == "__main__":
    start(parser, "clips.studies.benchmark:benchmark_from_flags")
