"""How far a comparison is, for people: what it will do, the table of its cells, the time left."""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from clips.common.escape import for_rich
from clips.common.files import read_json, read_json_records
from clips.common.progress import Progress, read_progress, training_progress
from clips.common.rundir import METRICS, UNSEEN, is_finished
from mllm.compare.cells import Cell, PretrainedEncoder, cells_of, encoder_names, encoders_to_pretrain, is_done
from mllm.compare.commands import pretrain_config, stage_samples
from mllm.compare.comparison import Comparison, asks_questions, budget_share, question_files, question_limit
from mllm.evaluation.evaluate import PROGRESS
from mllm.training.stages import STAGES

ASSUMED = {"align": 4.2, "instruct": 1.45, "evaluation": 6.3}
"""Samples and questions per second of one core on the demo: the time estimate as long as no cell has been measured."""
ASSUMED_PRETRAINING = {"clips": 140.0, "clip": 240.0, "caption": 260.0, "caption+web": 160.0}
"""Samples per second of one core in pretraining on the demo."""
ASSUMED_OVERHEAD_S = 45.0
"""Of one core for each cell and each encoder: starts of processes, features of the pictures, evaluation, exports."""
NUMBERS = {stage.name: number for number, stage in STAGES.items()}
WAITS, PRETRAINING, DONE = "waits", "pretraining", "done"


@dataclass
class State:
    doing: str
    """The part that runs (a stage, "evaluation", …), or WAITS or DONE."""
    since: float = field(default_factory=time.time)
    """Seconds since the epoch."""


class StateTable:
    """Encoders × seeds with what each run is at; lives on a terminal, elsewhere one line is printed a change."""

    def __init__(self, comparison: Comparison, console: Console) -> None:
        self.comparison, self.console = comparison, console
        self.cells, self.encoders = cells_of(comparison), encoders_to_pretrain(comparison)
        done: dict[Cell | PretrainedEncoder, bool] = {cell: is_done(comparison, cell) for cell in self.cells}
        done |= {encoder: is_finished(encoder.directory) for encoder in self.encoders}
        self.states = {run: State(DONE if finished else WAITS) for run, finished in done.items()}
        self.planned: dict[tuple[str, str], int] = {}

    def say(self, run: Cell | PretrainedEncoder, doing: str) -> None:
        """`run` begins `doing`; called from several threads, each for its own run."""
        self.states[run] = State(doing)
        if not self.console.is_terminal:
            what = f"encoder {run.name}" if isinstance(run, PretrainedEncoder) else run.name
            self.console.print(f"{for_rich(what)}: {doing}{self._accuracy(run)}", highlight=False)

    def _accuracy(self, run: Cell | PretrainedEncoder) -> str:
        if self.states[run].doing != DONE or not isinstance(run, Cell):
            return ""
        figures = read_json(run.figures)
        overall = figures.get(UNSEEN, figures).get("exact_match", {}).get("overall")
        return f", {overall['accuracy']:.1%} right" if overall else ""

    def progress(self, run: Cell | PretrainedEncoder) -> Progress | None:
        """How far what `run` is doing has come; None before its first sign of life."""
        state = self.states[run]
        metrics = run.directory / METRICS
        if isinstance(run, PretrainedEncoder):
            found = training_progress(metrics, self._planned(run, PRETRAINING))
        elif state.doing in NUMBERS:
            found = training_progress(metrics, self._planned(run, state.doing), stage=state.doing)
        else:
            found = read_progress(run.evaluation / PROGRESS)
        return found if found and found.time >= state.since else None  # older ones are of a process that was killed

    def _planned(self, run: Cell | PretrainedEncoder, doing: str) -> int:
        """Samples that it is to see: the same for all cells, and for all encoders of a kind; worked out once."""
        key = (doing, "" if isinstance(run, Cell) else run.kind)
        if key not in self.planned:
            if isinstance(run, Cell):
                self.planned[key] = stage_samples(self.comparison, run, NUMBERS[doing])
            else:
                self.planned[key] = pretrain_config(self.comparison, run).samples
        return self.planned[key]

    def __rich__(self) -> Table:
        table = Table("encoder", *dict.fromkeys(cell.run for cell in self.cells), title_justify="left")
        for kind in dict.fromkeys(encoder.kind for encoder in self.encoders):
            table.add_row(f"{kind}, pretraining", *(self._text(run) for run in self.encoders if run.kind == kind))
        for name in encoder_names(self.comparison):
            table.add_row(name, *(self._text(cell) for cell in self.cells if cell.encoder == name))
        return table

    def _text(self, run: Cell | PretrainedEncoder) -> str:
        doing = self.states[run].doing
        if doing == WAITS:
            return f"[dim]{WAITS}[/]"
        if doing == DONE:
            return f"[green]{DONE}{self._accuracy(run)}[/]"
        return f"[bold]{doing}[/] {self.progress(run) or ''}"

    def live(self) -> AbstractContextManager[Any]:
        is_terminal = self.console.is_terminal
        return Live(get_renderable=self.__rich__, console=self.console) if is_terminal else nullcontext()


def seconds_of_cell(comparison: Comparison) -> tuple[float, str]:
    """Estimated seconds of one cell, and where the estimate comes from."""
    cells = cells_of(comparison)
    finished = [read_json(cell.directory / "cost.json") for cell in cells if is_done(comparison, cell)]
    measured = [sum(costs.values()) for costs in finished if costs]
    if measured:
        return sum(measured) / len(measured), f"the mean of {len(measured)} finished cells"
    seconds = ASSUMED_OVERHEAD_S
    for number, stage in STAGES.items():
        seconds += stage_samples(comparison, cells[0], number) / ASSUMED[stage.name]
    if asks_questions(comparison):
        limit = question_limit(comparison)
        counts = [len(read_json_records(path)) for path in question_files(comparison)[0].values()]
        seconds += sum(min(count, limit or count) for count in counts) / ASSUMED["evaluation"]
    rates = ", ".join(f"{rate:g}/s {name}" for name, rate in ASSUMED.items())
    return seconds, f"an assumption for one core, no cell is finished yet ({rates})"


def seconds_of_pretraining(comparison: Comparison, encoder: PretrainedEncoder) -> float:
    """Estimated seconds of one core."""
    return ASSUMED_OVERHEAD_S + pretrain_config(comparison, encoder).samples / ASSUMED_PRETRAINING[encoder.kind]


def print_overview(comparison: Comparison, console: Console) -> None:
    """Encoders to pretrain, the cells, the samples of each stage, and how long it will take."""
    cells, share = cells_of(comparison), budget_share(comparison)
    encoders = [encoder for encoder in encoders_to_pretrain(comparison) if not is_finished(encoder.directory)]
    todo = [cell for cell in cells if not is_done(comparison, cell)]
    each, source = seconds_of_cell(comparison)
    total = math.ceil(len(todo) / comparison.jobs) * each
    total += sum(seconds_of_pretraining(comparison, encoder) for encoder in encoders) / comparison.jobs
    budget = ", ".join(f"{s.name} {stage_samples(comparison, cells[0], n):,} samples" for n, s in STAGES.items())
    console.print(StateTable(comparison, console))
    facts = {
        "pretrain": ", ".join(encoder.name for encoder in encoders) or "nothing",
        "cells": f"{len(todo)} of {len(cells)} to run, {comparison.jobs} at a time",
        "each cell": budget + (f" ({share:.0%} of the stages' own)" if share < 1 else ""),
        "time": f"about {total / 60:.0f} min: {each / 60:.1f} min a cell, {source}",
        "writes to": str(comparison.output),
    }
    for name, value in facts.items():
        console.print(f"  [bold]{name:<10}[/] {for_rich(value)}", highlight=False, soft_wrap=True)
