#!/usr/bin/env python
"""Test and measure this project on a GPU in less than ten minutes; writes report.json and index.html."""

import argparse
import shlex
import sys
from pathlib import Path

from clips.common.errors import run_command


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--out", default="runs/gpu_report", help="folder of the report, the runs and what they print")
    p.add_argument("--device", default="auto", help="auto (a GPU), cuda, or cpu with --tiny")
    p.add_argument("--tiny", action="store_true", help="tiny models, to see whether every part runs")
    p.add_argument("--llava-flags", default="", help="further flags of the LLaVA stages, in one string")
    p.add_argument("--part", help=argparse.SUPPRESS)  # one size of the towers, for the command itself
    return p


def main() -> None:
    flags = parser().parse_args()
    from clips.studies.gpu_report import gpu_report, measure_part

    out = Path(flags.out).resolve()
    if flags.part is not None:
        measure_part(flags.part, flags.device, tiny=flags.tiny, out=out)
    else:
        gpu_report(out, flags.device, tiny=flags.tiny, llava=shlex.split(flags.llava_flags))


if __name__ == "__main__":
    sys.exit(run_command(main))
