#!/usr/bin/env python
"""Measure here: attention, data, loader, start-up, sentences, training, loss memory, accumulation, checkpoints."""

import argparse
import sys

from clips.common.errors import run_command


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parts = ("attention", "data", "loader", "startup", "sentences", "train", "chunk", "gradcache", "checkpoint")
    p.add_argument("what", choices=parts, help="what to measure")
    p.add_argument("--device", default="auto", help="auto, cpu or cuda")
    p.add_argument("--repeats", type=int, default=5, help="turns of each compared part")
    p.add_argument("--demo-dir", default="data/demo", help="the demo data, which data and train read")
    p.add_argument("--shards", type=int, default=100_000, help="shards that startup makes, of one or two samples")
    p.add_argument("--out", help="JSON file for the figures")
    return p


def main() -> None:
    flags = parser().parse_args()
    from clips.studies.benchmark import benchmark

    benchmark(
        flags.what,
        device=flags.device,
        repeats=flags.repeats,
        demo_dir=flags.demo_dir,
        shards=flags.shards,
        out=flags.out,
    )


if __name__ == "__main__":
    sys.exit(run_command(main))
