#!/usr/bin/env python
"""Pretrain a CLIPS encoder: the demo by default, your own image / web caption / long caption triples with --data."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from clips.errors import run_command


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--recipe", default="demo", help="what to train: a name from clips/recipes.py")
    p.add_argument("--name", help="run directory under --output-dir (default: the recipe's name)")
    p.add_argument("--output-dir", default="runs", help="where runs are written")
    p.add_argument(
        "--data", help="training data: a folder, pattern or URL of tar shards, or a .csv/.jsonl/.parquet table"
    )
    p.add_argument("--val-data", help="validation data, evaluated during training")
    p.add_argument("--test-data", help="test data, evaluated at the end")
    p.add_argument(
        "--fields",
        nargs="+",
        action="extend",
        metavar="PART=FIELD",
        help="where a sample keeps image, web and long caption",
    )
    p.add_argument("--image-root", help="tables: the folder that image paths are relative to")
    p.add_argument("--samples", type=int, help="samples to see in each phase (default: the recipe's)")
    p.add_argument("--batch-size", type=int, help="samples per optimizer step, over all ranks (default: the recipe's)")
    p.add_argument("--seed", type=int, default=0, help="seed of the weights, the order and the augmentation")
    p.add_argument("--device", default="auto", help="auto, cpu or cuda")
    p.add_argument("--ds-config", help="DeepSpeed engine settings, such as ds_configs/zero2.json (default: ZeRO 0)")
    p.add_argument(
        "--resume", default="auto", help="auto (go on where the run stopped), never, or a checkpoint directory"
    )
    p.add_argument("--allow-config-change", action="store_true", help="go on although the configuration differs")
    p.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="FIELD=VALUE",
        help="any other field, e.g. optim.kind=muon",
    )
    p.add_argument("--debug", action="store_true", help="the recipe's tiny twin: three steps on the demo data")
    p.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    p.add_argument("--wandb", action="store_true", help="also log to Weights & Biases")
    p.add_argument("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    return p


def main() -> None:
    flags = parser().parse_args()
    from clips.cli import pretrain_from_flags

    pretrain_from_flags(flags)


if __name__ == "__main__":
    sys.exit(run_command(main))
