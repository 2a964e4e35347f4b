#!/usr/bin/env python
"""Measure what an encoder is worth: one LLaVA-style model per encoder and seed, same questions, intervals, floors."""

import argparse
import sys

from clips.common.errors import run_command


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    p.add_argument(
        "--encoders",
        default="clips,clip,random,blind",
        help="names as of train_llava.sh --vision, with commas between; bare clips and clip are pretrained here, "
        "clips:DIR takes a run or export, in which {seed} stands for the pretraining seed",
    )
    p.add_argument(
        "--seeds",
        type=int,
        help="pretraining seeds: encoders of each kind that is trained here (default: 5, --quick: 1)",
    )
    p.add_argument(
        "--llava-seeds",
        type=int,
        help="LLaVA runs of each encoder, on its pretraining seeds in turn (default: one more than --seeds, to tell "
        "both kinds of seed apart; --quick: 3; as many as --seeds where no encoder is trained here)",
    )
    p.add_argument("--output", default="runs/compare", help="where encoders, cells and the report are written")
    p.add_argument("--jobs", type=int, default=0, help="cells beside each other; 0: two on a CPU, one on a GPU")
    p.add_argument("--quick", action="store_true", help="less of everything, in about half an hour; the report says so")
    p.add_argument(
        "--budget",
        type=float,
        help="share of each stage's samples that a cell trains (default: 0.3 on the demo, --quick: 0.1, else 1)",
    )
    p.add_argument("--dry-run", action="store_true", help="print the plan and the estimated time, run nothing")
    p.add_argument("--train-flags", default="", help="further flags of train_llava.sh for every cell, in one string")
    p.add_argument("--pretrain-flags", default="", help="further flags of pretrain_clips.py for clips and clip alike")
    p.add_argument(
        "--calibrate",
        metavar="DIR",
        help="only: A/A test and power of the intervals, from the answers of a finished comparison",
    )
    p.add_argument(
        "--order",
        metavar="DIR,DIR",
        help="only: whether the order of the encoders holds over finished comparisons (another language model, another "
        "budget) and over their sorts of pictures; the first decides",
    )
    p.add_argument("--device", default="auto", help="auto, cpu or cuda")
    p.add_argument("--gpus", type=int, default=1, help="GPUs of each cell (deepspeed launcher)")
    p.add_argument("--question-file", help="your own questions with answers, instead of the demo's")
    p.add_argument("--question-images", help="folder or tar of their pictures")
    p.add_argument(
        "--limit",
        type=int,
        help="only so many questions of each file, drawn evenly over kinds and answers (default: 400 of the demo's, "
        "--quick: 200, else all)",
    )
    p.add_argument("--benchmarks", default="", help="tasks of lmms-eval, with commas between: gqa,pope,textvqa_val,mme")
    p.add_argument("--include-path", help="folder with further tasks of lmms-eval, in its YAML format")
    p.add_argument("--karpathy", help="also retrieval of clips and clip on COCO or Flickr30K: the Karpathy split file")
    p.add_argument("--image-root", help="folder of its images (default: that of the file)")
    p.add_argument(
        "--decides",
        metavar="FIGURE",
        help="the figure that the comparison is made for, fixed before the first cell: accuracy/KIND, cider_d "
        "(default: accuracy, of all questions)",
    )
    alone = p.add_argument_group("finished comparisons (these run nothing)")
    alone.add_argument(
        "--verify",
        metavar="DIR",
        help="compute every figure again from the raw answers of this output directory or archive, without a model",
    )
    alone.add_argument("--pack", metavar="DIR", help="verify this output directory and pack it into DIR.tar.xz")
    return p


def main() -> None:
    flags = parser().parse_args()
    if flags.verify or flags.pack:
        from mllm.compare.verify import pack_from_flags, verify_from_flags

        if flags.verify:
            verify_from_flags(flags.verify)
        if flags.pack:
            pack_from_flags(flags.pack)
        return
    from mllm.compare.run import compare_from_flags

    compare_from_flags(flags)


if __name__ == "__main__":
    sys.exit(run_command(main))
