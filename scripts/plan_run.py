#!/usr/bin/env python
"""Estimate a run before its first step: parameters, memory per rank, FLOPs per sample, and days."""

import argparse
import sys

from clips.common.errors import run_command
from clips.common.flags import SET, Parser
from clips.common.paths import DS_CONFIGS
from clips.recipes import RECIPES, recipe


def parser() -> argparse.ArgumentParser:
    p = Parser(__doc__)
    words = "pretrain: a recipe's run; llava: both LLaVA stages on its image tower"
    p.add_argument("what", nargs="?", default="pretrain", choices=("pretrain", "llava"), help=words)
    p.add_argument("--recipe", default="demo", choices=RECIPES, help="recipe of clips/recipes.py")
    p.add_argument("--gpus", type=int, default=8, help="GPUs over all machines")
    p.add_argument("--kind", default="h100", help="GPU: b200, h200, h100, a100, a100-40, l40s or rtx4090")
    p.add_argument("--mfu", type=float, default=0.2, help="share of the GPU's peak FLOPS that is reached")
    engines = sorted(path.stem for path in DS_CONFIGS.glob("zero*.json"))
    p.add_argument("--engine", default="zero0", choices=engines, help="pretrain: a file of ds_configs/ by name")
    p.add_argument("--set", help="fields of clips/config.py", **SET)
    names = "llava: smollm2-135m, qwen2.5-7b, llama3-8b, vicuna-7b or vicuna-13b"
    p.add_argument("--language-model", default="vicuna-7b", help=names)
    p.add_argument("--lora", action="store_true", help="llava: train adapters in stage 2, not the full language model")
    p.add_argument("--tiles", help="llava: columns x rows of tiles beside the full image, such as 2x2")
    p.add_argument("--frames", type=int, default=0, help="llava: frames per video, with --tiles; 0 is no videos")
    return p


def main() -> None:
    flags = parser().parse_args()
    from clips.engine.metrics import Machine
    from clips.training.rehearsal import print_pretraining

    run = recipe(flags.recipe).override(flags.set)
    machine = Machine(flags.kind, flags.gpus, flags.mfu)
    if flags.what == "pretrain":
        print_pretraining(run, machine, flags.engine)
        return
    from clips.weights.hf_vit import stock_fields
    from mllm.training.rehearsal import Planned, print_stages

    vision = run.model.vision
    tower = {**stock_fields(vision), "image_size": vision.image_size, "patch_size": vision.patch_size}
    planned = Planned(flags.language_model, tower, flags.tiles, flags.frames)
    print_stages(planned, machine, lora=flags.lora)


if __name__ == "__main__":
    sys.exit(run_command(main))
