"""The pretraining runs of an experiment, each as a process of its own, and the figures that they leave."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TimeElapsedColumn, TimeRemainingColumn

from clips.common.files import read_json
from clips.common.jobs import Commands, locked
from clips.common.rundir import UNSEEN, is_finished, read_metrics, refuse
from clips.config import RunConfig
from clips.config import difference as differing_fields
from clips.training.cli import config_from_flags, parser

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
RATES = ("lr", "muon_lr")
"""Fields of a phase that a multiple of the learning rates multiplies."""


@dataclass(frozen=True)
class PretrainingRun:
    """A recipe, at so many samples and with some settings (`--set`) of its own."""

    recipe: str
    name: str
    samples: int | None
    """Of each phase; None: as the recipe and `settings` say."""
    seed: int
    settings: tuple[str, ...] = ()
    device: str = "auto"

    def command(self, output: Path) -> list[str]:
        """The command that trains it in `output`/`name`; it evaluates and saves at its end only."""
        return [
            *("scripts/pretrain_clips.py", "--recipe", self.recipe, "--name", self.name, "--output-dir", str(output)),
            *(() if self.samples is None else ("--samples", str(self.samples))),
            *("--seed", str(self.seed), "--device", self.device),
            *("--set", "train.eval_every=0", "train.checkpoint_every=0", *self.settings),
        ]

    def config(self) -> RunConfig:
        """What `command` makes of its flags; raises UserError for settings that it would refuse."""
        _, *flags = self.command(Path())
        return config_from_flags(parser().parse_args(flags))

    def is_finished(self, output: Path) -> bool:
        """Whether `output` holds it, evaluated. Raises UserError where another run has its name."""
        run = output / self.name
        if not (run / "config.json").exists():
            return False
        changes = differing_fields(RunConfig.load(run / "config.json"), self.config())
        refuse(changes, f"{run} holds a run with other settings", "Give another --output")
        return (run / "evaluation.json").exists() and is_finished(run)


def with_rates(run: PretrainingRun, multiplier: float) -> PretrainingRun:
    """`run` with the learning rates of all its phases multiplied."""
    phases = run.config().phases
    rates = [(f"phases.{i}.{name}", getattr(phase, name)) for i, phase in enumerate(phases) for name in RATES]
    return replace(run, settings=(*run.settings, *(f"{path}={rate * multiplier}" for path, rate in rates)))


def train(
    runs: Sequence[PretrainingRun], output: Path, jobs: int, console: Console, threads: int | None = None
) -> dict[PretrainingRun, Path]:
    """The directory of each run, trained unless it is finished; a bar of the samples that are done.

    `threads` of each run; by default its share of the cores.
    """
    missing = {run: run.config().samples for run in runs if not run.is_finished(output)}
    commands = Commands(jobs, threads)
    columns = (
        "{task.description}",
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        "left",
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not missing) as progress:
        bar = progress.add_task(f"{len(missing)} runs", total=sum(missing.values()))

        def work(run: PretrainingRun) -> None:
            with locked(output / run.name, commands) as lock:
                if not run.is_finished(output):  # by whoever held the lock
                    console.print(f"training {run.name}: {missing[run]:,} samples", highlight=False)
                    _, *flags = run.command(output)
                    command = [sys.executable, str(SCRIPT), *flags]
                    commands.run(command, output / f"{run.name}.log", pass_fds=[lock])
            progress.advance(bar, missing[run])

        commands.map(work, list(missing))
    return {run: output / run.name for run in runs}


def read_figures(run: Path, names: Sequence[str] = FIGURES) -> dict[str, float]:
    """A run's test figures in percent, and how long its training steps take on an otherwise idle machine.

    Those of further test sets are called SET/FIGURE; the set that decides comes first (`clips.common.rundir.UNSEEN`).
    """
    found, steps = read_json(run / "evaluation.json")["figures"], read_metrics(run, "train")
    # The fastest stretch: whatever else the machine does only ever slows training down.
    seconds = steps[-1]["samples"] / max(line["samples_per_s"] for line in steps)
    further = [name for name in found if "/" in name and name.rpartition("/")[2] in names]
    further.sort(key=lambda name: not name.startswith(f"{UNSEEN}/"))
    return {name: found[name]["value"] for name in (*further, *names)} | {"train_seconds": round(seconds, 1)}
