#!/usr/bin/env python
"""Draw a picture of the documentation from figures: `results` of a comparison of encoders, `captions` of one of sets of
captions."""

import argparse
import sys
from pathlib import Path

from clips.common.errors import run_command

REPORTS = {
    "results": Path("runs/compare/report.json"),
    "captions": Path("runs/compare_captions/captions.json"),
}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument(
        "what",
        choices=tuple(REPORTS),
        help="results: right answers by kind of question, for each encoder; captions: what encoders learned from each "
        "set",
    )
    p.add_argument(
        "--report",
        type=Path,
        help="the figures to draw: report.json of compare_encoders.py or captions.json of compare_captions.py",
    )
    p.add_argument("--out", type=Path, help="the PNG or SVG to write (default: beside the figures)")
    return p


def main() -> None:
    flags = parser().parse_args()
    from clips.studies.caption_report import write_chart
    from mllm.compare.pictures import write_results

    report = flags.report or REPORTS[flags.what]
    out = flags.out or report.with_name(f"{flags.what}.png")
    write = {"results": write_results, "captions": write_chart}[flags.what]
    print(f"written to {write(report, out)}")


if __name__ == "__main__":
    sys.exit(run_command(main))
