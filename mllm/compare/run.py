"""What an encoder is worth: the same LLaVA-style model on each encoder, several seeds, the same questions.

1. Encoders trained here that are missing are pretrained: `clips` with the recipe demo, `clip` with clip_baseline on
   the same data, for the same samples and steps.
2. A cell is one encoder and one seed: stage 1, stage 2 and the evaluation, as ordinary runs of the scripts. Cells of
   one seed share the start of the adapters, the order of the samples and every other setting; the projector starts in
   the same way (on the demo: fitted in closed form to the captions, on each encoder's own features).
3. mllm/compare/figures.py turns what the cells left into figures, mllm/compare/report.py those into the report.

    OUTPUT/encoders/clips-seed0/    a pretraining run       OUTPUT/cells/random-seed2/    a cell: mllm/training/run.py
    OUTPUT/cells/random-seed2.log   what it printed         OUTPUT/report.{json,md,html}

A finished cell is never run again, one that was cut goes on from its last checkpoint, and one with other settings
than those asked for is refused. A cell is locked while a process works on it, also by a child that outlived a killed
comparison.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from clips.common.files import read_json, write_atomically
from clips.common.jobs import Commands, locked
from clips.common.rundir import is_finished
from clips.common.runtime import choose_device
from mllm.compare.checks import assert_same_samples, check_cells, check_inputs, load_encoders
from mllm.compare.plan import RECIPES, Cell, Plan, benchmarks_done, has_benchmarks, is_done, plan_from_flags
from mllm.compare.view import Grid, print_plan
from mllm.training.stages import STAGES


def pretrain(plan: Plan, commands: Commands, console: Console) -> None:
    """Train the encoders that are missing, then make sure that the baseline saw what CLIPS saw."""

    def run(item: tuple[Path, tuple[str, int]]) -> None:
        path, (kind, seed) = item
        with locked(path, commands) as lock:
            if not is_finished(path):
                console.print(f"pretraining {path.name} (recipe {RECIPES[kind]})", highlight=False)
                command = plan.pretrain_command(path, kind, seed)
                commands.run(command, path.parent / f"{path.name}.log", pass_fds=[lock])

    commands.map(run, [item for item in plan.pretraining.items() if not is_finished(item[0])])
    for seed in range(plan.kinds_pretrained):
        pair = [plan.pretrained(kind, seed) for kind in RECIPES]
        if all(path in plan.pretraining for path in pair):
            assert_same_samples(*pair)


def run_cell(plan: Plan, cell: Cell, commands: Commands, say: Callable[[Cell, str], None]) -> None:
    """Whatever is missing of a cell, each part as a process of its own."""
    say(cell, "waits for its lock")
    with locked(cell.directory, commands) as lock:
        cell.directory.mkdir(exist_ok=True)
        record = {"encoder": cell.encoder, "vision": cell.vision, "seed": cell.seed, "evaluation": plan.evaluation}
        write_atomically(cell.directory / "cell.json", json.dumps(record, indent=2) + "\n")
        parts = [
            (stage.name, plan.train_command(cell, number), (cell.directory / stage.name / "done.json").is_file())
            for number, stage in STAGES.items()
        ]
        parts.append(("evaluation", plan.evaluation_command(cell), cell.figures.is_file() or not plan.asks))
        if plan.benchmarks:
            parts.append(("benchmarks", plan.benchmark_command(cell), has_benchmarks(plan, cell)))
        for part, command, is_there in parts:
            if is_there:
                continue
            say(cell, part)
            begin = time.monotonic()
            try:
                commands.run(command, cell.log, pass_fds=[lock])
            finally:
                _add_cost(cell, part, time.monotonic() - begin)
        if plan.benchmarks:
            tasks = json.dumps({"tasks": sorted({*benchmarks_done(cell), *plan.benchmarks})})
            write_atomically(cell.directory / "benchmarks" / "tasks.json", tasks + "\n")
    say(cell, "done")


def _add_cost(cell: Cell, part: str, seconds: float) -> None:
    costs = read_json(cell.directory / "cost.json")
    costs[part] = round(costs.get(part, 0.0) + seconds, 1)
    write_atomically(cell.directory / "cost.json", json.dumps(costs) + "\n")


def compare_from_flags(flags: argparse.Namespace) -> None:
    """What scripts/compare_encoders.py does."""
    plan, console = plan_from_flags(flags), Console(stderr=True)
    check_inputs(plan)
    print_plan(plan, console)
    if flags.dry_run:
        return
    compare(plan, console, sys.argv)


def compare(plan: Plan, console: Console, command: Sequence[str] = ()) -> Path:
    """Run what is missing and write the report; returns the page's path."""
    from mllm.compare.figures import collect, measure_encoders
    from mllm.compare.report import write_report

    commands = Commands(plan.jobs)
    (plan.output / "cells").mkdir(parents=True, exist_ok=True)
    load_encoders(plan)
    disable_progress_bar()  # of encoders that are loaded again for their figures: the grid is the view
    pretrain(plan, commands, console)
    check_cells(plan)
    if plan.asks:
        plan.question_files  # noqa: B018 - builds the demo once, before several processes want it
    grid = Grid(plan, console)
    with grid.live():
        commands.map(
            lambda cell: run_cell(plan, cell, commands, grid.say),
            [cell for cell in plan.cells if not is_done(plan, cell)],
        )
    if plan.karpathy:
        runs = {Path(cell.vision.partition(":")[2]) for cell in plan.cells if cell.vision.partition(":")[0] in RECIPES}
        todo = [run for run in sorted(runs) if not (run / f"evaluation-{plan.karpathy.stem}.json").is_file()]
        commands.map(lambda run: commands.run(plan.retrieval_command(run), plan.output / f"{run.name}.log"), todo)
    report = collect(plan, measure_encoders(plan, torch.device(choose_device(plan.device))), command)
    page = write_report(report, plan.output, plan.question_files[1] if plan.asks else None)
    console.print(
        f"\n[bold]{plan.output}[/bold] holds the comparison:\n"
        f"  page        {page}\n"
        f"  figures     {plan.output}/report.json, {plan.output}/report.md\n"
        f"  cells       {plan.output}/cells/  (each a run directory with its model)\n"
        f"Next:\n  python scripts/chat.py --model-path {plan.cells[0].directory}/model",
        highlight=False,
        soft_wrap=True,
    )
    return page
