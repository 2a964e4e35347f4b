#!/usr/bin/env python
"""Pretrain a CLIPS encoder: the demo by default, your own image / web caption / long caption triples with --data."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from clips.common.errors import run_command


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--recipe", default="demo", help="what to train: a name from clips/recipes.py (default: demo)")
    p.add_argument("--name", help="run directory under --output-dir (default: the recipe's name)")
    p.add_argument("--output-dir", default="runs", help="where runs are written (default: runs)")
    p.add_argument(
        "--data",
        help="training data: a folder, pattern or URL of tar shards, or a .csv/.jsonl/.parquet table "
        "(default: the recipe's, which is the demo data for demo and clip_baseline)",
    )
    p.add_argument("--val-data", help="validation data, evaluated during training (default: the demo's, or none)")
    p.add_argument("--test-data", help="test data, evaluated at the end (default: the demo's, or none)")
    p.add_argument(
        "--fields",
        nargs="+",
        action="extend",
        metavar="PART=FIELD",
        help="where a sample keeps image, web and long caption, e.g. web=json:alt, or a table's columns "
        "(default: image=jpg;jpeg;png;webp web=json:org_caption long=txt)",
    )
    p.add_argument("--image-root", help="tables: the folder that image paths are relative to (default: the table's)")
    p.add_argument(
        "--samples", type=int, help="samples to see in each phase; the warm-up keeps its share (default: the recipe's)"
    )
    p.add_argument("--batch-size", type=int, help="samples per optimizer step, over all ranks (default: the recipe's)")
    p.add_argument("--seed", type=int, default=0, help="seed of weights, order and augmentation (default: 0)")
    p.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    p.add_argument("--ds-config", help="DeepSpeed engine settings, such as ds_configs/zero2.json (default: ZeRO 0)")
    p.add_argument(
        "--timeout-minutes", type=float, default=30, help="how long ranks wait for one that hangs (default: 30)"
    )
    p.add_argument(
        "--resume",
        default="auto",
        help="auto (go on where the run stopped), never, or a checkpoint directory (default: auto)",
    )
    p.add_argument(
        "--allow-config-change", action="store_true", help="go on although the configuration differs (default: no)"
    )
    p.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="FIELD=VALUE",
        help="any other field of clips/config.py, e.g. optim.kind=muon (default: none)",
    )
    p.add_argument(
        "--debug", action="store_true", help="the recipe's tiny twin: three steps on the demo data (default: no)"
    )
    p.add_argument("--dry-run", action="store_true", help="print the plan and stop (default: no)")
    p.add_argument(
        "--profile",
        type=int,
        default=0,
        metavar="STEPS",
        help="record where the time of so many steps goes, in the run's profile/ (default: 0, off)",
    )
    p.add_argument("--wandb", action="store_true", help="also log to Weights & Biases (default: no)")
    p.add_argument("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    return p


def main() -> None:
    flags = parser().parse_args()
    from clips.training.cli import pretrain_from_flags

    pretrain_from_flags(flags)


if __name__ == "__main__":
    sys.exit(run_command(main))
