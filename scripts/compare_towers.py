#!/usr/bin/env python
"""What an image tower that vLLM, SGLang and llama.cpp run natively costs on the demo, over several seeds."""

import argparse
import sys
from pathlib import Path

from clips.common.errors import run_command


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--output", default="runs/compare_towers", help="where the runs and the result are written")
    p.add_argument("--tower", default="siglip", help="which is compared with the recipe's own: siglip or clip")
    p.add_argument("--seeds", type=int, default=3, help="runs of each tower")
    p.add_argument("--samples", type=int, default=40_000, help="samples that each run sees")
    p.add_argument("--jobs", type=int, default=2, help="runs beside each other, which share the cores")
    return p


def main() -> None:
    flags = parser().parse_args()
    from clips.studies.towers import compare_towers

    compare_towers(Path(flags.output), flags.tower, flags.seeds, flags.samples, flags.jobs)


if __name__ == "__main__":
    sys.exit(run_command(main))
