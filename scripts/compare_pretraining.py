#!/usr/bin/env python
"""Compare ways to pretrain, on the demo or on photographs, over several seeds."""

import sys
from pathlib import Path

from clips.common.errors import run_command
from clips.common.flags import SET, Parser, at_least


def parser() -> Parser:
    p = Parser(__doc__)
    studies = p.add_subparsers(dest="study", required=True, metavar="STUDY")

    def add(name: str, words: str, samples: int) -> Parser:
        study: Parser = studies.add_parser(name, help=words, description=words)
        study.add_argument("--output", default=f"runs/{name}", help="folder for the runs and the result")
        study.add_argument("--seeds", type=at_least(2), default=5, help="runs of each variant; fewer give no verdicts")
        study.add_argument("--samples", type=int, default=samples, help="training samples of each run")
        study.add_argument("--jobs", type=at_least(1), default=2, help="runs in parallel, which share the cores")
        study.add_argument("--decides", default="sentence_r1", help="the metric that decides, or sentence_neg_log_rank")
        study.add_argument("--dry-run", action="store_true", help="print the plan and run nothing")
        return study

    add("equal-time", "CLIPS against CLIP at equal samples and equal time, with rates tuned for both", 64_000)
    claims = add("claims", "the paper's claims at small scale", 48_000)
    claims.add_argument(
        "--claims",
        default="a,b,c,d",
        help="a: length of the text, b: ablation, c: sub-caption strategies, d: share of synthetic captions, "
        "f: CLIPS against CLIP at equal time (--recipe small)",
    )
    claims.add_argument("--first-seed", type=int, default=0, help="first of the consecutive --seeds")
    words = "small is for your own photographs: --set data.train=… data.test=…"
    claims.add_argument("--recipe", default="demo", choices=("demo", "small"), help=words)
    claims.add_argument("--set", help="fields of clips/config.py for every run", **SET)
    return p


def main() -> None:
    flags = parser().parse_args()
    output = Path(flags.output)
    common = {name: getattr(flags, name) for name in ("seeds", "samples", "jobs", "decides", "dry_run")}
    if flags.study == "equal-time":
        from clips.studies.equal_time import compare

        compare(output, **common)
    else:
        from clips.studies.claims import reproduce

        letters = flags.claims.replace(" ", "").split(",")
        common |= {"settings": flags.set, "recipe": flags.recipe, "first_seed": flags.first_seed}
        reproduce(output, letters, **common)


if __name__ == "__main__":
    sys.exit(run_command(main))
