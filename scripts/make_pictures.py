#!/usr/bin/env python
"""Draw a picture of the documentation from figures: `results` of a comparison of encoders, `profile` of a step."""

import argparse
import sys
from pathlib import Path

from clips.common.errors import run_command

REPORTS = {"results": Path("runs/compare/report.json"), "profile": Path("runs/profile.json")}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument(
        "what",
        choices=tuple(REPORTS),
        help="results: right answers by kind of question, for each encoder; profile: time and MFU by part of a step",
    )
    p.add_argument(
        "--report",
        type=Path,
        help="the figures to draw: report.json of compare_encoders.py, or what benchmark.py profile --out wrote",
    )
    p.add_argument("--out", type=Path, help="the PNG or SVG to write (default: beside the figures)")
    return p


def main() -> None:
    flags = parser().parse_args()
    from clips.studies.pictures import write_profile
    from mllm.compare.pictures import write_results

    report = flags.report or REPORTS[flags.what]
    out = flags.out or report.with_name(f"{flags.what}.png")
    print(f"written to {(write_results if flags.what == 'results' else write_profile)(report, out)}")


if __name__ == "__main__":
    sys.exit(run_command(main))
