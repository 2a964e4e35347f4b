#!/usr/bin/env python
"""The CLIPS paper's claims in small, on the demo: inverse effect, ablation, strategies, synthetic share, LLaVA."""

import argparse
import sys
from pathlib import Path

from clips.common.errors import run_command


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument(
        "--claims",
        default="a,b,c,d,e",
        help="which: a length of the text, b ablation, c sub-caption strategies, d share of synthetic captions, "
        "e LLaVA (read from --llava-report)",
    )
    p.add_argument("--seeds", type=int, default=3, help="runs of each variant")
    p.add_argument("--samples", type=int, default=48_000, help="samples that each run sees")
    p.add_argument("--jobs", type=int, default=2, help="runs beside each other, which share the cores")
    p.add_argument("--output", default="runs/claims", help="where the runs and the reports are written")
    p.add_argument("--llava-report", default="runs/compare/report.json", help="what scripts/compare_encoders.py wrote")
    p.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="FIELD=VALUE",
        help="fields of clips/config.py for every run, as in scripts/pretrain_clips.py",
    )
    p.add_argument("--dry-run", action="store_true", help="print the plan with the estimated time, and stop")
    return p


def main() -> None:
    flags = parser().parse_args()
    from clips.studies.reproduce import reproduce

    reproduce(
        Path(flags.output),
        flags.claims.replace(" ", "").split(","),
        seeds=flags.seeds,
        samples=flags.samples,
        jobs=flags.jobs,
        llava_report=Path(flags.llava_report),
        settings=flags.set,
        dry_run=flags.dry_run,
    )


if __name__ == "__main__":
    sys.exit(run_command(main))
