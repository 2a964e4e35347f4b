"""The command of recaptioning: its plan, the work of this process, and the page at the end."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from clips import Fields, demo_split, ensure_any_demo, is_of_demo, parse_fields
from clips.common.errors import UserError, reporting
from clips.common.files import check_target, from_json, read_bytes
from clips.common.flags import from_flags
from clips.common.live import in_words
from clips.common.page import table_of
from clips.common.rundir import take_newest
from clips.common.signals import stopping
from mllm.data.demo import SHOW
from mllm.model.load import newest_model
from mllm.recaption.asking import Prompt
from mllm.recaption.manifest import Folder, agree_so_far, done_manifest, unfinished
from mllm.recaption.options import DEMO, Options
from mllm.recaption.process import open_pairs, work_on
from mllm.recaption.progress import Board, measured
from mllm.recaption.registry import finds_the_demo_in
from mllm.recaption.report import write_report
from mllm.recaption.shards import Shard, shards_of
from mllm.recaption.work import check_broken

ENOUGH = 100
"""Captions after which their measured speed goes into the plan."""
FITTING = "Name one that knows such pictures: --captioner hf:MODEL or endpoint:URL (docs/recaption.md)"


def recaption_from_flags(flags: argparse.Namespace) -> None:
    """The command scripts/recaption.py. Raises UserError for wrong flags, BrokenDataError for too many broken pairs."""
    if not flags.dry_run:
        check_target(flags.output)
    choose_gpu(os.environ)
    prompt = Prompt.read(flags.prompt)
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"  # of the processes of one machine
    console = Console(emoji=False, stderr=True, quiet=not is_first)
    if not flags.data:
        ensure_any_demo(DEMO)
        flags.data, flags.shards = demo_split(DEMO, "train"), flags.shards or 1
        prompt = prompt if flags.prompt else Prompt(SHOW[0])  # the demo's models were trained on this question
    if flags.captioner:
        asked = [(flags.captioner, flags.output)]
    elif is_of_demo(flags.data):
        asked = demo_captioners(flags.output)
    else:
        raise UserError(f"--captioner is missing: only for the demo runs/ is searched. {FITTING}")
    if not flags.force and finds_the_demo_in(flags.data, flags.captioner):
        raise UserError(
            f"--captioner {flags.captioner} was trained on the demo: it would find the demo's things in "
            f"{flags.data}. {FITTING}. --force takes it all the same"
        )
    fields = parse_fields(flags.fields, Fields())
    for captioner, output in asked:
        options = from_flags(Options, flags, output=output, captioner=captioner, prompt=prompt, fields=fields)
        recaption(options, console, dry_run=flags.dry_run)


def choose_gpu(environment: os._Environ[str] | dict[str, str]) -> None:
    """Set LOCAL_RANK, by which a process of srun or torchrun chooses its GPU."""
    if environment.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        environment.setdefault("LOCAL_RANK", environment.get("SLURM_LOCALID", "0"))
    if "LOCAL_RANK" in environment and torch.cuda.is_available():  # srun may show each task its own GPU alone
        environment["LOCAL_RANK"] = str(int(environment["LOCAL_RANK"]) % torch.cuda.device_count())


def demo_captioners(output: Path) -> list[tuple[str, Path]]:
    """(captioner, folder) without --captioner: the newest chatting model, and the newest CLIPS captioner of runs/."""
    found = []
    with contextlib.suppress(UserError):  # the message below names both ways
        found.append((f"llava:{newest_model()}", output / "llava"))
    runs = []
    for path in Path("runs").glob("*/config.json"):  # below these are the cells of experiments
        try:
            captioner = from_json(read_bytes(path))["model"]["captioner"] or {}
        except (OSError, ValueError, KeyError, TypeError):
            continue  # not the config of a pretraining run
        if captioner.get("inputs") == "tokens" and (path.parent / "export").is_dir():
            runs.append((path.stat().st_mtime, path.parent))
    if runs:
        found.append((f"clips:{take_newest('CLIPS captioner', runs)}", output / "clips"))
    if not found:
        raise UserError(
            "no captioner: there is no model trained here (bash scripts/train_llava.sh), nor a run of "
            "pretrain_clips.py with --set model.captioner.inputs=tokens. --captioner names another (docs/recaption.md)"
        )
    return found


def recaption(options: Options, console: Console, *, dry_run: bool = False) -> None:
    """Caption all unfinished shards, then write the page. Raises UserError if the data hold no pairs."""
    source = open_pairs(options)
    shards = shards_of(source)[: options.shards]
    if not shards:
        raise UserError(f"{options.data!r} holds no pairs")
    folder = Folder(options.output)
    agree_so_far(folder, options.settings(), options.captioner.partition(":")[0])
    missing = unfinished(folder, shards)
    print_plan(options, folder, shards, missing, console)
    if dry_run:
        return
    with stopping():
        if missing:
            folder.root.mkdir(parents=True, exist_ok=True)
            work_on(options, source, shards, Board(folder, missing, console))
    done = [manifest for shard in shards if (manifest := done_manifest(folder, shard)) is not None]
    broken = sum(manifest["rejected"].get("broken", 0) for manifest in done)
    check_broken(broken, sum(manifest["counts"]["pairs"] for manifest in done), options)
    for left in (folder.locks, folder.root / "work"):
        shutil.rmtree(left, ignore_errors=True)
    with reporting(f"the captions are whole, and {folder.report} could not be written"):
        write_report(options, folder, [shard.name for shard in shards], done, console)


def print_plan(
    options: Options, folder: Folder, shards: Sequence[Shard], missing: Sequence[Shard], console: Console
) -> None:
    """Print pairs, captioner, time and tokens; time and tokens if ENOUGH captions of the folder are measured."""
    pairs, left = sum(map(len, shards)), sum(map(len, missing))
    so_far = measured(folder)
    time = tokens = "known after the first captions (scripts/plan_run.py recaption estimates it)"
    if not left:
        time = tokens = "nothing to do"
    elif so_far["pairs"] >= ENOUGH and so_far["seconds"]:
        time = in_words(left * so_far["seconds"] / so_far["pairs"]) + " of one process, as measured in this folder"
        each = so_far["tokens"] / so_far["pairs"]
        tokens = f"{left * each:,.0f} to write, {each:.0f} a pair (measured here, second attempts included)"
    bad = {"drop": "left out", "keep": "kept"}[options.on_bad]
    rows = (
        ("pairs", f"{pairs:,} in {len(shards):,} shards, of which {left:,} in {len(missing):,} are not done"),
        ("captioner", options.captioner),
        ("time", time),
        ("tokens", f"{tokens}, at most {options.max_new_tokens} a caption"),
        ("output", f"{options.output}, refused captions are tried again and then {bad}"),
    )
    console.print(table_of("recaptioning", (), rows))
