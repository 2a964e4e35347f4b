"""One pretraining run of an experiment, as a process of its own, and the figures that it leaves."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TimeElapsedColumn, TimeRemainingColumn

from clips.common.errors import UserError
from clips.common.jobs import Commands, locked
from clips.config import RunConfig
from clips.config import difference as differing_fields
from clips.recipes import recipe
from clips.training.finish import is_finished

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "pretrain_clips.py"
FIGURES = (
    "sentence_i2t_r1",
    "sentence_t2i_r1",
    "part_i2t_r1",
    "part_t2i_r1",
    "web_i2t_r1",
    "web_t2i_r1",
    "zero_shot_top1",
    "linear_probe_top1",
)


@dataclass(frozen=True)
class Cell:
    """One training run: a recipe, at so many samples and with some settings (`--set`) of its own."""

    recipe: str
    name: str
    samples: int
    seed: int
    settings: tuple[str, ...] = ()

    def command(self, output: Path) -> list[str]:
        """The command that trains it in `output`/`name`; it evaluates and saves at its end only."""
        return [
            *("scripts/pretrain_clips.py", "--recipe", self.recipe, "--name", self.name, "--output-dir", str(output)),
            *("--samples", str(self.samples), "--seed", str(self.seed)),
            *("--set", "train.eval_every=0", "train.checkpoint_every=0", *self.settings),
        ]

    def config(self) -> RunConfig:
        """What `command` makes of its flags."""
        run = recipe(self.recipe)
        warmup = [p.warmup_samples * self.samples // p.samples for p in run.phases]
        return run.override(
            [f"train.seed={self.seed}", f"phases.*.samples={self.samples}"]
            + [f"phases.{i}.warmup_samples={count}" for i, count in enumerate(warmup)]
            + ["train.eval_every=0", "train.checkpoint_every=0", *self.settings]
        )

    def is_finished(self, output: Path) -> bool:
        """Whether `output` holds it, evaluated. Raises UserError where another run has its name."""
        run = output / self.name
        if not (run / "config.json").exists():
            return False
        if changes := differing_fields(RunConfig.load(run / "config.json"), self.config()):
            raise UserError(
                f"{run} holds a run with other settings:\n  " + "\n  ".join(changes) + "\nGive another --output"
            )
        return (run / "evaluation.json").exists() and is_finished(run)


def train(cells: list[Cell], output: Path, jobs: int, console: Console) -> dict[Cell, Path]:
    """The run directory of each cell, trained unless it is finished; a bar of the samples that are done."""
    missing = [cell for cell in cells if not cell.is_finished(output)]
    commands = Commands(jobs)
    columns = (
        "{task.description}",
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        "left",
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not missing) as progress:
        bar = progress.add_task(f"{len(missing)} runs", total=sum(cell.samples for cell in missing))

        def run(cell: Cell) -> None:
            with locked(output / cell.name, commands) as lock:
                if not cell.is_finished(output):  # by whoever held the lock
                    console.print(f"training {cell.name}: {cell.samples:,} samples", highlight=False)
                    _, *flags = cell.command(output)
                    command = [sys.executable, str(SCRIPT), *flags]
                    commands.run(command, output / f"{cell.name}.log", pass_fds=[lock])
            progress.advance(bar, cell.samples)

        commands.map(run, missing)
    return {cell: output / cell.name for cell in cells}


def figures(run: Path, names: Sequence[str] = FIGURES) -> dict[str, float]:
    """A run's test figures in percent, and how long its training steps take on an otherwise idle machine."""
    found = json.loads((run / "evaluation.json").read_text())["figures"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    # The fastest stretch: whatever else the machine does only ever slows training down.
    seconds = steps[-1]["samples"] / max(line["samples_per_s"] for line in steps)
    return {name: found[name]["value"] for name in names} | {"train_seconds": round(seconds, 1)}
