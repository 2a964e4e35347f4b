#!/usr/bin/env python
"""CLIPS against the CLIP baseline on the demo: same search, equal samples, equal time, several seeds."""

import argparse
import sys
from pathlib import Path

from clips.common.errors import run_command


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--output", default="runs/compare_pretraining", help="where the runs and the result are written")
    p.add_argument("--seeds", type=int, default=3, help="runs of each kind")
    p.add_argument("--samples", type=int, default=64_000, help="samples that each run sees")
    p.add_argument("--jobs", type=int, default=2, help="runs beside each other, which share the cores")
    return p


def main() -> None:
    flags = parser().parse_args()
    from clips.studies.equal_time import compare

    output = Path(flags.output)
    output.mkdir(parents=True, exist_ok=True)
    compare(output, flags.seeds, flags.samples, flags.jobs)


if __name__ == "__main__":
    sys.exit(run_command(main))
