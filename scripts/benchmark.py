#!/usr/bin/env python
"""Measure training here: steps beside open_clip's, the parts of a step, whole programs beside open_clip's."""

import argparse
import sys

from clips.common.errors import run_command
from clips.common.flags import Parser


def parser() -> argparse.ArgumentParser:
    p = Parser(__doc__)
    p.add_argument("what", choices=("train", "profile", "program", "to-quality"), help="what to measure")
    p.add_argument("--device", default="auto", help="auto, cpu or cuda")
    p.add_argument("--repeats", type=int, default=5, help="turns of each compared part")
    p.add_argument("--demo-dir", default="data/demo", help="the demo data")
    p.add_argument("--out", help="JSON file for the figures")
    p.add_argument("--json", action="store_true", help="print the figures as JSON, not as a table")
    p.add_argument("--against", choices=("open_clip",), default="open_clip", help="program: whose trainer")
    p.add_argument("--size", choices=("demo", "s16", "b16"), default="demo", help="program: towers and batch")
    p.add_argument(
        "--objective",
        choices=("clip", "clips"),
        default="clip",
        help="program: CLIP's on both sides, or CLIPS and CoCa",
    )
    p.add_argument("--captions", choices=("long", "web"), default="long", help="program: which caption CLIP trains on")
    p.add_argument(
        "--their-python", default=sys.executable, help="program: the Python with open_clip's trainer (default: this)"
    )
    p.add_argument(
        "--variant",
        nargs="+",
        action="append",
        default=[],
        metavar=("NAME", "RECIPE FIELD=VALUE"),
        help="to-quality: what is measured, fields as in --set; again for each variant, none: CLIPS and CLIP, each "
        "with Muon and AdamW",
    )
    p.add_argument("--figures", nargs="+", default=["sentence_i2t_r1", "sentence_t2i_r1"], help="to-quality: of what")
    p.add_argument("--threshold", type=float, default=50.0, help="to-quality: what all figures must reach, in percent")
    p.add_argument("--seeds", type=int, default=3, help="to-quality: runs of each variant")
    p.add_argument("--every", type=int, default=2560, help="to-quality: samples between two validations")
    p.add_argument(
        "--rates",
        nargs="+",
        type=float,
        default=[1.0],
        help="to-quality: multiples of the learning rates, of which each variant gets its best, by seed 0",
    )
    p.add_argument("--average", type=int, default=0, help="to-quality: measure the mean of so many checkpoints too")
    p.add_argument("--output", default="runs/to_quality", help="to-quality: where the runs are written")
    return p


def main() -> None:
    flags = parser().parse_args()
    from clips.studies.benchmark import benchmark, benchmark_programs, benchmark_to_quality

    common = {name: getattr(flags, name) for name in ("device", "demo_dir", "out")}
    common["as_json"] = flags.json
    if flags.what == "program":
        common |= {"repeats": flags.repeats, "their_python": flags.their_python}
        benchmark_programs(flags.size, flags.objective, flags.captions, **common)
    elif flags.what == "to-quality":
        common |= {name: getattr(flags, name) for name in ("output", "seeds", "every", "rates", "average")}
        benchmark_to_quality(flags.variant, flags.figures, flags.threshold, **common)
    else:
        benchmark(flags.what, repeats=flags.repeats, **common)


if __name__ == "__main__":
    sys.exit(run_command(main))
