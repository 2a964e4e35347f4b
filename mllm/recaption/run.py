"""Recaptioning as a command: one process, or one a GPU, that take shards of one folder until none is left.

Nothing is shared but the folder, so that processes of other machines may work on it too, begin later and end as they
like. The parent of several processes computes nothing; it starts one again that was killed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.context import SpawnProcess
from pathlib import Path

import torch
from rich.console import Console

from clips import ensure_any_demo
from clips.common.errors import BrokenDataError, CommandError, UserError, reporting
from clips.common.escape import for_rich
from clips.common.runtime import choose_device
from mllm.data.demo import SHOW
from mllm.recaption.asking import Prompt
from mllm.recaption.manifest import Folder, agree_so_far, done_manifest
from mllm.recaption.options import DEMO, Options, options_from_flags
from mllm.recaption.plan import demo_captioners, print_plan
from mllm.recaption.process import child, open_pairs, stopping, work_on
from mllm.recaption.progress import Board
from mllm.recaption.report import write_report
from mllm.recaption.shards import Shard, shards_of
from mllm.recaption.work import check_broken

LOOK = 0.25
"""Seconds between two looks at the processes."""
FAILURES = 3
"""Ends of a process in a row, without a call in between, after which it is not started again."""


@dataclass(frozen=True)
class Share:
    """Which shards are this command's: every `size`-th."""

    rank: int = 0
    size: int = 1


def recaption_from_flags(flags: argparse.Namespace) -> None:
    """What scripts/recaption.py does. UserError for what does not fit, BrokenDataError for too many broken pictures."""
    console, share = Console(emoji=False, stderr=True), share_of(flags.rank, flags.world_size, os.environ)
    if "LOCAL_RANK" in os.environ and torch.cuda.is_available():  # srun may show each task its own GPU alone
        os.environ["LOCAL_RANK"] = str(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    prompt = Prompt.read(flags.prompt)
    if flags.data is None:
        ensure_any_demo(DEMO)
        flags.shards = flags.shards or 1
        prompt = prompt if flags.prompt else Prompt(SHOW[0])  # which its models were asked in training
    asked = [(flags.captioner, Path(flags.out))] if flags.captioner else demo_captioners(Path(flags.out))
    for captioner, out in asked:
        options = options_from_flags(flags, prompt, captioner, out)
        recaption(options, share, flags.processes, flags.price, console, dry_run=flags.dry_run)


def share_of(rank: int | None, size: int | None, environment: os._Environ[str] | dict[str, str]) -> Share:
    """From the flags, else from what torchrun or srun set; LOCAL_RANK is set for srun's tasks too."""
    if (rank is None) != (size is None):
        raise UserError("--rank and --world-size go together: which of how many parts of the shards this command does")
    if rank is None or size is None:
        if "RANK" in environment:
            rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        elif environment.get("SLURM_STEP_NUM_TASKS", "1") != "1":
            rank, size = int(environment["SLURM_PROCID"]), int(environment["SLURM_STEP_NUM_TASKS"])
            environment.setdefault("LOCAL_RANK", environment.get("SLURM_LOCALID", "0"))
        else:
            rank, size = 0, 1
    if not 0 <= rank < size:
        raise UserError(f"--rank {rank} must be from 0 to {size - 1}, one below --world-size")
    return Share(rank, size)


def recaption(
    options: Options,
    share: Share,
    processes: int | None,
    price: Sequence[float] | None,
    console: Console,
    *,
    dry_run: bool = False,
) -> None:
    """Caption what is not done of this command's share; whoever ends last writes the page."""
    source = open_pairs(options)
    shards = shards_of(source)[: options.shards]
    if not shards:
        raise UserError(f"{options.data!r} holds no pairs")
    folder = Folder(options.out)
    agree_so_far(folder, options.settings(), options.captioner.partition(":")[0])
    mine = shards[share.rank :: share.size]
    missing = [shard for shard in mine if done_manifest(folder, shard) is None]
    count = processes or default_processes(options)
    count = max(1, min(count, len(missing)))
    print_plan(options, folder, shards, missing, count, price, console)
    if dry_run:
        return
    with stopping():
        if missing:
            folder.root.mkdir(parents=True, exist_ok=True)
            if count == 1:
                work_on(options, source, mine, Board(folder, missing, console))
            else:
                run_processes(options, mine, count, Board(folder, missing, console))
    names = folder.manifests()
    others = sum(shard.name not in names for shard in shards)
    done = [
        manifest for shard in (mine if others else shards) if (manifest := done_manifest(folder, shard)) is not None
    ]
    broken = sum(manifest["rejected"].get("broken", 0) for manifest in done)
    check_broken(broken, sum(manifest["counts"]["pairs"] for manifest in done), options)
    if others:
        console.print(f"{others:,} shards are for others to do; the last one writes {for_rich(str(folder.report))}")
        return
    for left in (folder.claims, folder.root / "work"):  # of processes that were killed when a shard was whole
        shutil.rmtree(left, ignore_errors=True)
    with reporting(f"the captions are whole, and {folder.report} could not be written"):
        write_report(options, folder, [shard.name for shard in shards], done, console)


def default_processes(options: Options) -> int:
    """One a GPU for a model in the process, where nobody else starts processes; else one."""
    if (
        options.captioner.startswith("endpoint:")
        or "LOCAL_RANK" in os.environ
        or options.device not in ("auto", "cuda")
    ):
        return 1
    if choose_device(options.device).type != "cuda":
        return 1
    return torch.cuda.device_count()


def run_processes(options: Options, shards: Sequence[Shard], count: int, board: Board) -> None:
    """`count` processes at work, each started again after a kill; CommandError where what is left cannot be done."""
    context = get_context("spawn")
    failures = [0] * count
    running: dict[int, SpawnProcess] = {}

    def start(number: int) -> None:
        os.environ["LOCAL_RANK"] = str(number)  # by which the process chooses its GPU
        running[number] = context.Process(target=child, args=(options, list(shards), os.getpid()))
        running[number].start()

    try:
        with board.showing():
            for number in range(count):
                start(number)
            calls = 0
            while running:
                time.sleep(LOOK)
                tally = board.show()
                if tally.pairs > calls:
                    calls, failures = tally.pairs, [0] * count
                for number, process in list(running.items()):
                    if process.exitcode is None:
                        continue
                    del running[number]
                    if process.exitcode in (UserError.exit_code, BrokenDataError.exit_code):
                        raise ProcessEnded(process.exitcode)
                    if process.exitcode != 0:
                        failures[number] += 1
                        board.say(f"process {number} ended with exit code {process.exitcode}")
                        if failures[number] < FAILURES:
                            start(number)
    finally:
        os.environ.pop("LOCAL_RANK", None)
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.join()
    if any(done_manifest(board.folder, shard) is None for shard in shards):
        raise CommandError(
            f"{FAILURES} times in a row each process ended without a call of its captioner: the reason stands above. "
            "The same command goes on"
        )


class ProcessEnded(CommandError):
    """A child has said why; its exit code is the command's."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("a process cannot go on: the reason stands above")
        self.exit_code = exit_code
