"""What an encoder is worth: the same LLaVA-style model on each encoder, several seeds, the same questions.

1. Encoders trained here that are missing are pretrained: `clips` with the recipe demo, `clip` with clip_baseline on
   the same data, for the same samples and steps.
2. A cell is one encoder, one pretraining seed and one LLaVA seed: stage 1, stage 2 and the evaluation, as ordinary
   runs of the scripts. Cells of one LLaVA seed share the start of the adapters, the order of the samples and every
   other setting; the projector starts in the same way (on the demo: fitted in closed form to the captions, on each
   encoder's own features).
3. mllm/compare/figures.py and probe.py turn what the cells left into figures, collect.py joins them, report.py shows
   them.

    OUTPUT/encoders/clips-seed0/    a pretraining run       OUTPUT/cells/random-seed2/    a cell: mllm/training/run.py
    OUTPUT/cells/random-seed2.log   what it printed         OUTPUT/report.{json,md,html}
    OUTPUT/compare.json             what was fixed before the first cell, and OUTPUT/questions/: mllm/compare/plan.py

A finished cell is never run again, one that was cut goes on from its last checkpoint, and one with other settings
than those asked for is refused. A cell is locked while a process works on it, also by a child that outlived a killed
comparison.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from clips.common.errors import CommandError
from clips.common.escape import for_rich
from clips.common.files import read_json, sha256, write_json
from clips.common.jobs import Commands, locked
from clips.common.rundir import is_finished
from clips.common.runtime import choose_device
from mllm.compare.benchmarks import benchmark_command, benchmark_log, missing_benchmarks
from mllm.compare.calibration import print_calibration
from mllm.compare.cells import (
    RECIPES,
    WITH_TEXTS,
    Cell,
    PretrainedEncoder,
    cells_of,
    encoders_to_pretrain,
    is_done,
)
from mllm.compare.checks import assert_same_samples, check_cells, check_inputs, load_encoders
from mllm.compare.collect import collect, keep_encoders
from mllm.compare.commands import (
    evaluation_command,
    pretrain_command,
    retrieval_command,
    retrieval_figures,
    train_command,
)
from mllm.compare.comparison import (
    Comparison,
    asks_questions,
    comparison_from_flags,
    evaluation_settings,
    question_files,
)
from mllm.compare.fix import fix
from mllm.compare.order import print_order
from mllm.compare.plan import PLAN
from mllm.compare.probe import measure_encoders
from mllm.compare.report import write_report
from mllm.compare.view import DONE, PRETRAINING, StateTable, print_overview
from mllm.training.stages import STAGES

Say = Callable[[Cell | PretrainedEncoder, str], None]
"""Told what a run begins to do."""


def compare_from_flags(flags: argparse.Namespace) -> None:
    """What scripts/compare_encoders.py does."""
    if flags.calibrate:
        print_calibration(Path(flags.calibrate), Console(emoji=False))
        return
    if flags.order:
        print_order([Path(name) for name in flags.order.split(",") if name], Console(emoji=False))
        return
    comparison, console = comparison_from_flags(flags), Console(emoji=False, stderr=True)
    check_inputs(comparison)
    print_overview(comparison, console)
    if flags.dry_run:
        return
    compare(comparison, console, sys.argv)


def compare(comparison: Comparison, console: Console, command: Sequence[str] = ()) -> Path:
    """Run what is missing and write the report; returns the page's path."""
    commands = Commands(comparison.jobs)
    (comparison.output / "cells").mkdir(parents=True, exist_ok=True)
    load_encoders(comparison)
    disable_progress_bar()  # of encoders that are loaded again for their figures: the table is the view
    # Asked for here, before several processes want it: it builds the demo where it is missing.
    image_folder = question_files(comparison)[1] if asks_questions(comparison) else None
    plan = fix(comparison)
    fixed = comparison.output / PLAN
    console.print(f"fixed in {for_rich(str(fixed))}, SHA-256 {sha256(fixed)}", highlight=False, soft_wrap=True)
    cells, table = cells_of(comparison), StateTable(comparison, console)
    with table.live():
        pretrain_encoders(comparison, commands, table.say)
        check_cells(comparison)
        commands.map(
            lambda cell: run_cell(comparison, cell, commands, table.say),
            [cell for cell in cells if not is_done(comparison, cell)],
        )
    split = comparison.karpathy
    if split is not None:
        with_texts = [cell for cell in cells if cell.kind in WITH_TEXTS]
        runs = sorted({run for cell in with_texts if (run := cell.pretraining_run) is not None})

        def retrieve(run: Path) -> None:
            commands.run(retrieval_command(comparison, split, run), comparison.output / f"{run.name}.log")

        commands.map(retrieve, [run for run in runs if not retrieval_figures(split, run).is_file()])
    keep_encoders(comparison.output, measure_encoders(comparison, choose_device(comparison.device)))
    report = collect(comparison, plan, command)
    page = write_report(report, comparison.output, image_folder)
    output = for_rich(str(comparison.output))
    console.print(
        f"\n[bold]{output}[/bold] holds the comparison:\n"
        f"  page        {for_rich(str(page))}\n"
        f"  figures     {output}/report.json, {output}/report.md\n"
        f"  cells       {output}/cells/  (each a run directory with its model)\n"
        f"Next:\n  python scripts/chat.py --model {for_rich(str(cells[0].directory))}/model",
        highlight=False,
        soft_wrap=True,
    )
    name_failed_benchmarks(comparison, cells)
    return page


def name_failed_benchmarks(comparison: Comparison, cells: Sequence[Cell]) -> None:
    """Raise CommandError where a task of lmms-eval has no scores yet."""
    failed = [
        (task, benchmark_log(cell.directory, task))
        for cell in cells
        for task in missing_benchmarks(comparison, cell.directory)
    ]
    if failed:
        raise CommandError(
            "lmms-eval left no scores, or scored questions that it could not answer; the report goes without them, "
            "and the same command tries again:\n" + "\n".join(f"  {task}: see {log}" for task, log in failed)
        )


def pretrain_encoders(comparison: Comparison, commands: Commands, say: Say) -> None:
    """Train the encoders that are missing, then make sure that the baseline saw what CLIPS saw."""

    def run(encoder: PretrainedEncoder) -> None:
        with locked(encoder.directory, commands) as lock:
            if not is_finished(encoder.directory):
                say(encoder, PRETRAINING)
                commands.run(pretrain_command(comparison, encoder), encoder.log, pass_fds=[lock])
        say(encoder, DONE)

    encoders = encoders_to_pretrain(comparison)
    commands.map(run, [encoder for encoder in encoders if not is_finished(encoder.directory)])
    of_seed: dict[int, dict[str, Path]] = {}
    for encoder in encoders:
        of_seed.setdefault(encoder.seed, {})[encoder.kind] = encoder.directory
    for directories in of_seed.values():
        first, *others = (directories[kind] for kind in RECIPES if kind in directories)
        for other in others:
            assert_same_samples(first, other)


def run_cell(comparison: Comparison, cell: Cell, commands: Commands, say: Say) -> None:
    """Whatever is missing of a cell, each part as a process of its own."""
    say(cell, "waits for its lock")
    with locked(cell.directory, commands) as lock:
        cell.directory.mkdir(exist_ok=True)
        before = read_json(cell.directory / "cell.json")
        record: dict[str, Any] = {"encoder": cell.encoder, "vision": cell.vision}
        record |= {"pretraining_seed": cell.pretraining_seed, "seed": cell.seed}
        record["evaluation"] = evaluation_settings(comparison)
        record |= {"plan": before.get("plan", sha256(comparison.output / PLAN)), "commands": before.get("commands", {})}
        write_json(cell.directory / "cell.json", record)
        parts = [
            (stage.name, train_command(comparison, cell, number), (cell.directory / stage.name / "done.json").is_file())
            for number, stage in STAGES.items()
        ]
        answered = cell.figures.is_file() or not asks_questions(comparison)
        parts.append(("evaluation", evaluation_command(comparison, cell), answered))
        for part, command, is_there in parts:
            if is_there:
                continue
            say(cell, part)
            record["commands"][part] = shlex.join(["python", *command[1:]])
            write_json(cell.directory / "cell.json", record)
            with _timed(cell, part):
                commands.run(command, cell.log, pass_fds=[lock])
        for task in missing_benchmarks(comparison, cell.directory):
            say(cell, task)
            log = benchmark_log(cell.directory, task)
            shutil.rmtree(log.parent, ignore_errors=True)  # of a call that failed
            log.parent.mkdir(parents=True)
            with _timed(cell, "benchmarks"):
                try:
                    commands.run(benchmark_command(comparison, cell.directory, task), log, pass_fds=[lock])
                except CommandError:  # one task is not worth the others: it is named in the end
                    if commands.stopping.is_set():
                        raise
    say(cell, DONE)


@contextmanager
def _timed(cell: Cell, part: str) -> Iterator[None]:
    begin = time.monotonic()
    try:
        yield
    finally:
        costs = read_json(cell.directory / "cost.json")
        costs[part] = round(costs.get(part, 0.0) + time.monotonic() - begin, 1)
        write_json(cell.directory / "cost.json", costs)
