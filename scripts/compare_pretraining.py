#!/usr/bin/env python
"""Compare ways to pretrain, on the demo or on photographs, over several seeds."""

import sys
from pathlib import Path

from clips.common.errors import run_command
from clips.common.flags import SET, Parser


def parser() -> Parser:
    p = Parser(__doc__)
    studies = p.add_subparsers(dest="study", required=True, metavar="STUDY")
    words = "the paper's claims in small"
    claims: Parser = studies.add_parser("claims", help=words, description=words)
    claims.add_argument(
        "--claims",
        default="a,b,c,d,e",
        help="a length of the text, b ablation, c sub-caption strategies, d share of synthetic captions, e LLaVA, "
        "f CLIPS against CLIP at equal time (--recipe small)",
    )
    claims.add_argument("--output", default="runs/claims", help="folder of the runs and of the result")
    claims.add_argument("--seeds", type=int, default=5, help="runs of each variant; fewer give no verdicts")
    claims.add_argument("--first-seed", type=int, default=0, help="of --seeds that follow each other")
    claims.add_argument("--samples", type=int, default=48_000, help="samples that each run sees")
    claims.add_argument("--jobs", type=int, default=2, help="runs beside each other, which share the cores")
    claims.add_argument("--decides", default="sentence_r1", help="the figure that decides, or sentence_nearness")
    claims.add_argument("--llava-report", default="runs/compare/report.json", help="report of compare_encoders.py")
    words = "small: on photographs of your own, --set data.train=… data.test=…"
    claims.add_argument("--recipe", default="demo", choices=("demo", "small"), help=words)
    claims.add_argument("--set", help="fields of clips/config.py for every run", **SET)
    claims.add_argument("--dry-run", action="store_true", help="print the plan, and stop")
    return p


def main() -> None:
    flags = vars(parser().parse_args())
    from clips.studies.claims import reproduce

    output, letters = Path(flags.pop("output")), flags.pop("claims").replace(" ", "").split(",")
    del flags["study"]
    settings, report = flags.pop("set"), Path(flags.pop("llava_report"))
    reproduce(output, letters, settings=settings, llava_report=report, **flags)


if __name__ == "__main__":
    sys.exit(run_command(main))
