"""The flags of scripts/pretrain_clips.py, and the RunConfig that they describe."""

import argparse
import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from clips.common import rundir
from clips.common.distributed import Start
from clips.common.errors import Stopped, UserError
from clips.common.flags import SET, Parser, at_least
from clips.config import TRAINING_FIELDS, RunConfig, parse_fields, parse_mix, parse_test_data
from clips.engine.log import HELP as REPORT_TO
from clips.engine.log import TENSORBOARD, loggers
from clips.recipes import RECIPES, TOWERS, debug_twin, recipe, with_tower


def parser() -> Parser:
    """Return the parser of scripts/pretrain_clips.py."""
    p = Parser("Pretrain a CLIPS encoder: the demo, or your own image / web caption / long caption triples (--data).")
    p.add_argument("--recipe", choices=RECIPES, help="what is trained (default: demo, or small for data of your own)")
    p.add_argument(
        "--tower",
        default="clips",
        choices=TOWERS,
        help="shape of the image tower: clips (the recipe's own), siglip (no CLS, tanh-GELU: what vLLM and "
        "SGLang run as SigLIP), clip (a LayerNorm before the blocks, as in CLIP) or clip_model (both towers as "
        "transformers' CLIPModel has them, which is then exported)",
    )
    p.add_argument("--name", help="run directory under --output (default: the recipe's name)")
    p.add_argument("--output", default="runs", help="where runs are written")
    data = p.add_mutually_exclusive_group()
    data.add_argument(
        "--data",
        help="training data: a folder, pattern or URL of tar shards, a .csv/.tsv/.json/.jsonl/.parquet table, a folder "
        "of the datasets library, hf:OWNER/NAME of the hub, or a folder of images with texts beside them "
        "(default: the recipe's, which is the demo data for demo and clip_baseline)",
    )
    data.add_argument("--mix", nargs="+", action="extend", metavar="NAME=SHARE:DATA", help="several sets, by shares")
    data.add_argument("--karpathy", metavar="FILE", help="COCO or Flickr with all splits of A. Karpathy's JSON file")
    p.add_argument("--val-data", help="validation data (default: the demo's, a share that small holds out, or none)")
    p.add_argument("--key", metavar="COLUMN", help="hold out rows with equal values together (default: equal images)")
    p.add_argument(
        "--test-data", nargs="+", metavar="DATA", help="first DATA, then NAME=DATA (default: the demo's, or none)"
    )
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
        "--verify-data", action="store_true", help="compare the SHA-256 of the training data's files with the import's"
    )
    p.add_argument("--samples", type=int, help="samples of each phase, warm-up scales along (default: the recipe's)")
    p.add_argument("--batch-size", type=int, help="samples per step, the rates scale along (default: the recipe's)")
    p.add_argument("--init-from", metavar="WEIGHTS", help="run, export, hub id or timm:NAME (default: random weights)")
    p.add_argument(
        "--on-spike", choices=("continue", "skip"), help="record a spike, or skip it too (default: the recipe's)"
    )
    p.add_argument("--seed", type=int, default=0, help="seed of weights, order and augmentation")
    p.add_argument("--device", default="auto", help="auto, cpu or cuda")
    p.add_argument("--ds-config", help="DeepSpeed engine settings, such as ds_configs/zero2.json (default: ZeRO 0)")
    p.add_argument("--timeout-minutes", type=float, default=30, help="how long ranks wait for one that hangs")
    p.add_argument("--resume", default="auto", help="auto: go on where the run stopped; never; or a checkpoint")
    p.add_argument("--allow-config-change", action="store_true", help="go on although the configuration differs")
    p.add_argument("--set", help="any other field of clips/config.py, e.g. optim.weight_decay=0.1", **SET)
    p.add_argument("--debug", action="store_true", help="three tiny steps of the recipe, on the demo or --data")
    p.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    p.add_argument("--profile", type=at_least(0), default=0, metavar="STEPS", help="steps to profile into profile/")
    p.add_argument("--report-to", default=TENSORBOARD, help=REPORT_TO)
    p.add_argument("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    return p


def pretrain_from_flags(flags: argparse.Namespace) -> None:
    """Run scripts/pretrain_clips.py: train the run that `flags` describe. Raises Stopped after Ctrl-C."""
    try:
        with Start(flags.timeout_minutes) as start:
            _pretrain(flags, start)
    except KeyboardInterrupt:  # before or after the loop, or for the second time in it
        message = "stopped by Ctrl-C; the same command goes on from the last checkpoint"
        raise Stopped(message, exit_code=128 + signal.SIGINT) from None


def _pretrain(flags: argparse.Namespace, start: Start) -> None:
    architecture = _recorded(flags)
    if flags.init_from is not None and not architecture:  # weights that a run has begun with are not read again
        from clips.weights.initial import read_initial  # imports torch: not before the flags are known to be right

        architecture = read_initial(flags.init_from).architecture
    run = config_from_flags(flags, architecture)

    # These import all of torch and deepspeed: not before the flags are known to be right.
    from clips.training.pretraining import pretrain

    pretrain(
        run, _run_dir(flags), start, device=flags.device, ds_config=flags.ds_config, resume=flags.resume,
        allow_config_change=flags.allow_config_change, dry_run=flags.dry_run, report_to=loggers(flags.report_to),
        profile_steps=flags.profile, verify_data=flags.verify_data,
    )  # fmt: skip


def recipe_name(flags: argparse.Namespace) -> str:
    """Return --recipe, or by default `small` for the user's own data and `demo` for the demo's."""
    is_users = flags.data not in (None, "demo") or flags.mix or flags.karpathy
    return flags.recipe or ("small" if is_users else "demo")


def _run_dir(flags: argparse.Namespace) -> Path:
    name = recipe_name(flags)
    return Path(flags.output) / (flags.name or (f"{name}-debug" if flags.debug else name))


def _recorded(flags: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that the run in the flags' directory took over from its initial weights, by path."""
    record = rundir.began_with(_run_dir(flags))
    return record["architecture"] if record and record["source"] == flags.init_from else {}


def config_from_flags(flags: argparse.Namespace, architecture: Mapping[str, Any] | None = None) -> RunConfig:
    """Return the configuration of a run from the command line.

    The recipe (or with --debug its smoke test) is changed by the architecture of --init-from, then by the flags, then
    by --set. `architecture` has fields of RunConfig by path; by default it is the one that the run has recorded. Raises
    UserError for flags that contradict each other, and for values that are not valid.
    """
    run = with_tower(recipe(recipe_name(flags)), flags.tower)
    if flags.debug:
        run = debug_twin(run)
    named = {"train": flags.data, "val": flags.val_data, "image_root": flags.image_root, "key": flags.key}
    data = replace(run.data, **{key: value for key, value in named.items() if value is not None})
    if flags.karpathy:
        file = flags.karpathy
        data = replace(data, train=f"{file}#train+restval", val=data.val or f"{file}#val", test=f"{file}#test")
    if flags.test_data:
        test, further = parse_test_data(flags.test_data)
        data = replace(data, test=test, further_tests=further)
    if flags.mix:
        data = replace(data, train="mix", mix=parse_mix(flags.mix))
    if flags.fields:
        data = replace(data, fields=parse_fields(flags.fields, data.fields))
    run = replace(run, data=data, train=replace(run.train, seed=flags.seed, init_from=flags.init_from))
    architecture = _recorded(flags) if architecture is None else architecture
    has_captioner = run.model.captioner is not None  # it is taken over only where the recipe has one
    values = {path: value for path, value in architecture.items() if path != "model.captioner" or has_captioner}
    for path, name in TRAINING_FIELDS.items():
        if path in values:
            values[path] = values[path] | {name: getattr(getattr(run.model, path.removeprefix("model.")), name)}
    if flags.on_spike is not None:
        values["train.on_spike"] = flags.on_spike
    if flags.batch_size:
        optim = run.override([text for text in flags.set if text.startswith("optim.")]).optim
    for i, phase in enumerate(run.phases):
        if flags.debug and "model.vision" in architecture:  # the smoke test's sizes are multiples of the recipe's patch
            values[f"phases.{i}.image_size"] = architecture["model.vision"]["patch_size"] * (2 + i)
        if flags.samples is not None:
            values[f"phases.{i}.samples"] = flags.samples
            # The warm-up keeps its share of the phase: a recipe's own could be longer than the whole of a short run.
            values[f"phases.{i}.warmup_samples"] = phase.warmup_samples * flags.samples // phase.samples
        if flags.batch_size is not None:
            values[f"phases.{i}.batch_size"] = flags.batch_size
            if flags.batch_size > 0:  # else the configuration itself says what is wrong
                factor = optim.lr_factor(flags.batch_size, phase.batch_size)
                values |= {f"phases.{i}.{rate}": getattr(phase, rate) * factor for rate in ("lr", "muon_lr")}
    run = run.override(flags.set, values)
    if flags.init_from is not None and flags.tower != "clips":
        raise UserError(f"--tower {flags.tower}: the weights of --init-from bring their own image tower; leave it out")
    if run.train.init_from != flags.init_from:
        raise UserError("--set train.init_from: give --init-from, which brings the weights' architecture too")
    if flags.key and (run.data.val or not run.data.held_out or run.data.train in ("demo", "mix")):
        raise UserError("--key is of the share of --data that is held out: --set data.held_out=0.05, no --val-data")
    if not run.data.train:
        raise UserError(f"recipe {run.recipe} needs training data: --data 'shards/*.tar', or a table (docs/data.md)")
    return run
