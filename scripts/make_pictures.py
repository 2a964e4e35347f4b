#!/usr/bin/env python
"""Draw a picture of the documentation from figures: `results` from the report.json of a comparison of encoders."""

import argparse
import sys
from pathlib import Path

from clips.common.errors import run_command


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("what", choices=("results",), help="results: right answers by kind of question, for each encoder")
    p.add_argument("--report", type=Path, default=Path("runs/compare/report.json"), help="the figures to draw")
    p.add_argument("--out", type=Path, default=Path("runs/compare/results.png"), help="the PNG or SVG to write")
    return p


def main() -> None:
    flags = parser().parse_args()
    from mllm.compare.pictures import write_results

    print(f"written to {write_results(flags.report, flags.out)}")


if __name__ == "__main__":
    sys.exit(run_command(main))
