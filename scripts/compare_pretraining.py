#!/usr/bin/env python
"""Compare ways to pretrain on the demo, over several seeds."""

import argparse
import sys
from pathlib import Path

from clips.common.errors import run_command
from clips.common.flags import SET, Parser


def parser() -> Parser:
    p = Parser(__doc__)
    studies = p.add_subparsers(dest="study", required=True, metavar="STUDY")

    def add(name: str, words: str, samples: int | None = None) -> Parser:
        study: Parser = studies.add_parser(name, help=words, description=words)
        study.add_argument("--output", default=f"runs/{name}", help="folder of the runs and of the result")
        study.add_argument("--seeds", type=int, default=3, help="runs of each variant")
        if samples is not None:
            study.add_argument("--samples", type=int, default=samples, help="samples that each run sees")
            study.add_argument("--jobs", type=int, default=2, help="runs beside each other, which share the cores")
        study.add_argument("--dry-run", action="store_true", help="print the plan with the estimated time, and stop")
        return study

    add("equal-time", "CLIPS against CLIP after the same search of rates: equal samples, equal time", 64_000)
    add("towers", "what an image tower costs that other programs serve", 40_000).add_argument(
        "--tower", choices=("siglip", "clip"), default="siglip", help="compared with the recipe's own tower"
    )
    add("sizes", "pictures of several aspects: one square or several sizes, at equal tokens", 48_000).add_argument(
        "--set", help="fields of clips/config.py for every run", **SET
    )
    claims = add("claims", "the paper's claims in small", 48_000)
    claims.add_argument(
        "--claims",
        default="a,b,c,d,e",
        help="a length of the text, b ablation, c sub-caption strategies, d share of synthetic captions, e LLaVA",
    )
    claims.add_argument("--llava-report", default="runs/compare/report.json", help="report of compare_encoders.py")
    claims.add_argument("--set", help="fields of clips/config.py for every run", **SET)
    quality = add("to-quality", "samples and seconds to a target figure")
    quality.add_argument(
        "--variant", nargs="+", action="append", default=[], metavar=("NAME", "RECIPE FIELD=VALUE"),
        help="a recipe with fields as in --set; repeatable (default: CLIPS and CLIP, each with Muon and AdamW)",
    )  # fmt: skip
    quality.add_argument(
        "--figures", nargs="+", default=["sentence_i2t_r1", "sentence_t2i_r1"], help="figures of the target"
    )
    quality.add_argument("--threshold", type=float, default=50.0, help="what all figures must reach, in percent")
    quality.add_argument("--every", type=int, default=2560, help="samples between two validations")
    quality.add_argument(
        "--rates", nargs="+", type=float, default=[1.0], help="multiples of the learning rates; seed 0 chooses"
    )
    quality.add_argument("--data", default="data/demo", help="folder of the demo")
    quality.add_argument("--device", default="auto", help="auto, cpu or cuda")
    return p


def carry_out(flags: argparse.Namespace) -> None:
    """Run the study that the flags name."""
    output = Path(flags.output)
    if flags.study == "to-quality":
        from clips.studies.to_quality import Target, ToQuality, print_result, read_variants

        target = Target(tuple(flags.figures), flags.threshold)
        options = {name: getattr(flags, name) for name in ("seeds", "every", "rates", "data", "device")}
        study = ToQuality(output, read_variants(flags.variant), target, **options)
        print_result(study.carry_out(dry_run=flags.dry_run))
        return
    common = {name: getattr(flags, name) for name in ("seeds", "samples", "jobs", "dry_run")}
    if flags.study == "equal-time":
        from clips.studies.equal_time import compare

        compare(output, **common)
    elif flags.study == "towers":
        from clips.studies.towers import compare_towers

        compare_towers(output, flags.tower, **common)
    elif flags.study == "sizes":
        from clips.studies.sizes import compare_sizes

        compare_sizes(output, flags.set, **common)
    else:
        from clips.studies.claims import reproduce

        letters = flags.claims.replace(" ", "").split(",")
        reproduce(output, letters, llava_report=Path(flags.llava_report), settings=flags.set, **common)


def main() -> None:
    carry_out(parser().parse_args())


if __name__ == "__main__":
    sys.exit(run_command(main))
