#!/usr/bin/env python
"""Tell memory, time, GPU hours, money and disk of a run before its first step, and refuse what cannot fit."""

import argparse
import sys

from clips.common.errors import run_command
from clips.common.flags import SET, Parser


def parser() -> argparse.ArgumentParser:
    p = Parser(__doc__)
    p.add_argument(
        "what",
        nargs="?",
        default="pretrain",
        choices=("pretrain", "llava", "recaption", "table"),
        help="pretrain a recipe; both LLaVA stages on its image tower; caption pictures with such a model; or the "
        "tables of docs/planning.md",
    )
    p.add_argument("--recipe", default="demo", help="a name from clips/recipes.py")
    p.add_argument("--gpus", type=int, default=8, help="GPUs over all machines")
    p.add_argument("--kind", default="h100", help="a name from clips/common/cards.py, such as h100, a100, rtx4090")
    p.add_argument("--price", type=float, help="price of one GPU hour, in any currency (default: none, no cost)")
    p.add_argument("--mfu", type=float, default=0.2, help="share of the GPU's peak that is reached")
    p.add_argument("--engine", help="a file of ds_configs/ by name, such as zero2 (default: the first that fits)")
    p.add_argument("--set", help="fields of clips/config.py", **SET)
    p.add_argument("--language-model", default="vicuna-7b", help="llava, recaption: a name from mllm/training/plan.py")
    p.add_argument("--lora", action="store_true", help="llava: adapters in stage 2, not the whole language model")
    p.add_argument("--bits", type=int, default=16, choices=(4, 8, 16), help="llava: of the frozen language model")
    p.add_argument("--tiles", help="llava, recaption: columns x rows of tiles beside the whole picture, such as 2x2")
    p.add_argument("--frames", type=int, default=0, help="llava: frames of a video, with --tiles; 0: no videos")
    p.add_argument("--samples", type=int, default=1_000_000_000, help="recaption: how many pictures")
    return p


def main() -> None:
    flags = parser().parse_args()
    from clips.training import plan

    if flags.what == "table":
        from clips.common.page import markdown
        from clips.common.rehearsal import AGREEMENT_HEAD
        from mllm.training.rehearsal import agreements

        print(plan.planning_table(flags.kind, flags.price, flags.mfu))
        print("", markdown(AGREEMENT_HEAD, plan.agreements() + agreements()), sep="\n")
        return
    run, machine = plan.asked_for(flags)
    if flags.what == "pretrain":
        plan.print_pretraining(run, machine, flags.engine)
        return
    from mllm.training import plan as stages

    tower = plan.image_tower(run)
    sees = {"tiles": flags.tiles, "frames": flags.frames if flags.what == "llava" else 0}
    model = stages.Planned.of(flags.language_model, tower, lora=flags.lora, bits=flags.bits, **sees)
    if flags.what == "llava":
        stages.print_stages(model, machine)
    else:
        stages.print_recaptioning(model, machine, flags.samples)


if __name__ == "__main__":
    sys.exit(run_command(main))
