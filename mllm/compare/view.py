"""How far a comparison is, for people: the plan, the grid of cells, the time left."""

from __future__ import annotations

import math
import re
from contextlib import nullcontext
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from clips.common.files import read_json
from clips.common.rundir import is_finished
from mllm.compare.plan import Cell, Plan, _questions, is_done, stage_samples
from mllm.training.stages import STAGES

ASSUMED = {"align": 8.0, "instruct": 4.3, "evaluation": 16.0}
"""Samples and questions per second of one core on the demo: the time estimate as long as no cell has been measured."""
ASSUMED_PRETRAINING_S = 200.0
"""Seconds of one core for one pretraining run of the demo."""
# ---------------------------------------------------------------------------------------------- the plan for people
PROGRESS = re.compile(r"\[(\w+) +([\d,]+)/([\d,]+)\].* left ([\d.]+) min|(answers): +(\d+)%")


def progress_of(cell: Cell) -> str:
    """How far the last line of a cell's log says that its part is."""
    if not cell.log.is_file():
        return ""
    with cell.log.open("rb") as file:
        file.seek(max(0, cell.log.stat().st_size - 4096))
        found = list(PROGRESS.finditer(file.read().decode(errors="replace")))
    if not found:
        return ""
    _, step, steps, left, _, percent = found[-1].groups()
    return f"{percent} %" if percent else f"{100 * _number(step) // _number(steps)} %, {left} min left"


def _number(text: str) -> int:
    return int(text.replace(",", ""))


class Grid:
    """Encoders × seeds with what each cell is at; a table that lives on a terminal, one line a change elsewhere."""

    def __init__(self, plan: Plan, console: Console) -> None:
        self.plan, self.console = plan, console
        self.states = {cell: "done" if is_done(plan, cell) else "waits" for cell in plan.cells}

    def say(self, cell: Cell, state: str) -> None:
        self.states[cell] = state
        if not self.console.is_terminal:
            self.console.print(f"{cell.name}: {state}{self._accuracy(cell, state)}", highlight=False)

    def _accuracy(self, cell: Cell, state: str) -> str:
        if state != "done" or not cell.figures.is_file():
            return ""
        overall = read_json(cell.figures).get("exact_match", {}).get("overall")
        return f", {overall['accuracy']:.1%} right" if overall else ""

    def __rich__(self) -> Table:
        table = Table("encoder", *(f"seed {seed}" for seed in range(self.plan.seeds)), title_justify="left")
        for name in self.plan.names:
            table.add_row(name, *(self._text(cell) for cell in self.states if cell.encoder == name))
        return table

    def _text(self, cell: Cell) -> str:
        state = self.states[cell]
        if state == "waits":
            return "[dim]waits[/]"
        if state == "done":
            return f"[green]done{self._accuracy(cell, state)}[/]"
        return f"[bold]{state}[/] {progress_of(cell)}"

    def live(self) -> Any:
        is_terminal = self.console.is_terminal
        return Live(get_renderable=self.__rich__, console=self.console) if is_terminal else nullcontext()


def seconds_of_cell(plan: Plan) -> tuple[float, str]:
    """Estimated seconds of one cell, and where the estimate comes from."""
    finished = [read_json(cell.directory / "cost.json") for cell in plan.cells if is_done(plan, cell)]
    measured = [sum(costs.values()) for costs in finished if costs]
    if measured:
        return sum(measured) / len(measured), f"the mean of {len(measured)} finished cells"
    cell, seconds = plan.cells[0], 0.0
    for number, stage in STAGES.items():
        seconds += stage_samples(plan, cell, number) / ASSUMED[stage.name]
    if plan.asks:
        seconds += sum(_questions(path, plan.questions) for path in plan.question_files[0]) / ASSUMED["evaluation"]
    rates = ", ".join(f"{rate:g}/s {name}" for name, rate in ASSUMED.items())
    return seconds, f"an assumption for one core, no cell is finished yet ({rates})"


def print_plan(plan: Plan, console: Console) -> None:
    """Encoders to pretrain, the grid, the samples of each stage, and how long it will take."""
    cell = plan.cells[0]
    encoders = [path for path in plan.pretraining if not is_finished(path)]
    todo = [cell for cell in plan.cells if not is_done(plan, cell)]
    each, source = seconds_of_cell(plan)
    total = math.ceil(len(todo) / plan.jobs) * each
    total += math.ceil(len(encoders) / plan.jobs) * ASSUMED_PRETRAINING_S
    budget = ", ".join(f"{s.name} {stage_samples(plan, cell, n):,} samples" for n, s in STAGES.items())
    console.print(Grid(plan, console))
    facts = {
        "pretrain": ", ".join(path.name for path in encoders) or "nothing",
        "cells": f"{len(todo)} of {len(plan.cells)} to run, {plan.jobs} at a time",
        "each cell": budget + (f" ({plan.share:.0%} of the stages' own)" if plan.share < 1 else ""),
        "time": f"about {total / 60:.0f} min: {each / 60:.1f} min a cell, {source}",
        "writes to": str(plan.output),
    }
    for name, value in facts.items():
        console.print(f"  [bold]{name:<10}[/] {value}", highlight=False, soft_wrap=True)
