#!/usr/bin/env python
"""Training of a LLaVA stage in packed rows against padded batches: tokens/s, as a ratio within one run."""

import argparse
import sys

from clips.common.errors import run_command


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=f"{__doc__} Further flags are those of scripts/train_llava.py, --stage 1 or 2 among them.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("--repeats", type=int, default=10, help="pairs of steps; the median of their ratios counts")
    p.add_argument("--out", help="JSON file for the figures")
    return p


def main() -> None:
    flags, training = parser().parse_known_args()
    from mllm.training.benchmark import benchmark_training

    benchmark_training(training, repeats=flags.repeats, out=flags.out)


if __name__ == "__main__":
    sys.exit(run_command(main))
