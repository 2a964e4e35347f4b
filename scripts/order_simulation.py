#!/usr/bin/env python
"""Simulate the order of training at 10^6 to 10^10 samples: mixing, memory, seek time, shards that are read from."""

import argparse
import sys

from clips.common.errors import run_command


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--batch-size", type=int, default=32768, help="samples of one optimizer step, over all ranks")
    p.add_argument("--ranks", type=int, default=64, help="ranks that share a step")
    p.add_argument("--sample-bytes", type=int, default=50_000, help="bytes of a sample in its shard")
    p.add_argument("--seed", type=int, default=0, help="seed of the shards' sizes and of the order")
    p.add_argument("--out", help="JSON file for the figures")
    return p


def main() -> None:
    flags = parser().parse_args()
    from clips.studies.order import run

    run(
        batch=flags.batch_size,
        ranks=flags.ranks,
        sample_bytes=flags.sample_bytes,
        seed=flags.seed,
        out=flags.out,
    )


if __name__ == "__main__":
    sys.exit(run_command(main))
