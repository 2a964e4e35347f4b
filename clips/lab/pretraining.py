"""Studies of pretraining: their runs, and the metrics that these leave."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clips.common.paths import SCRIPTS
from clips.common.rundir import UNSEEN, is_finished, read_evaluation, read_metrics, refuse
from clips.config import RunConfig, changed_fields
from clips.lab.grid import Run, Step
from clips.lab.run import Runner
from clips.training.cli import config_from_flags, parser

SCRIPT = SCRIPTS / "pretrain_clips.py"
PRETRAINING = "pretraining"


def pretraining_run_of(
    directory: Path, flags: Sequence[str], variant: str, seed: int, *, is_done: Callable[[Path], bool] = is_finished
) -> Run:
    """Return the lab's run of scripts/pretrain_clips.py with `flags`, which must name `directory` as the run's.

    Its `check` raises UserError if `directory` was made with other settings.
    """
    config = config_from_flags(parser().parse_args(list(flags)))

    def check() -> None:
        if (directory / "config.json").is_file():
            changes = changed_fields(RunConfig.load(directory / "config.json"), config)
            mend = f"Give another --output, or remove {directory}"
            refuse(changes, f"{directory} holds a run with other settings", mend)

    step = Step(PRETRAINING, (sys.executable, str(SCRIPT), *flags), lambda: is_done(directory))
    about = f"{config.recipe}, {config.samples:,} samples"
    return Run(variant, f"seed {seed}", directory, (step,), check, about=about)


@dataclass(frozen=True)
class PretrainingRun:
    """A recipe at a number of samples, with further settings (`--set`)."""

    recipe: str
    name: str
    samples: int
    """Samples of each phase."""
    seed: int
    settings: tuple[str, ...] = ()

    def command(self, output: Path) -> list[str]:
        """Return the command that trains the run in `output`/`name`. The run evaluates and saves only at its end."""
        return [
            *("scripts/pretrain_clips.py", "--recipe", self.recipe, "--name", self.name, "--output", str(output)),
            *("--samples", str(self.samples), "--seed", str(self.seed), "--device", "auto"),
            *("--set", "train.eval_every=0", "train.checkpoint_every=0", *self.settings),
        ]

    def config(self) -> RunConfig:
        """Return the configuration of the command's flags. Raises UserError for settings that it would refuse."""
        _, *flags = self.command(Path())
        return config_from_flags(parser().parse_args(flags))

    def planned(self, output: Path, variant: str = "") -> Run:
        """Return the `Run` (clips/lab/grid.py) that trains it below `output`.

        `variant` is its row of the table, by default its name without the seed.
        """
        _, *flags = self.command(output)
        row = variant or self.name.removesuffix(f"-seed{self.seed}")
        return pretraining_run_of(output / self.name, flags, row, self.seed, is_done=_is_measured)


def _is_measured(run: Path) -> bool:
    return (run / "evaluation.json").exists() and is_finished(run)


def with_rates(run: PretrainingRun, multiplier: float) -> PretrainingRun:
    """Return `run` with the learning rates of all its phases multiplied."""
    phases = run.config().phases
    rates = [(f"phases.{i}.{key}", getattr(phase, key)) for i, phase in enumerate(phases) for key in ("lr", "muon_lr")]
    return replace(run, settings=(*run.settings, *(f"{path}={rate * multiplier}" for path, rate in rates)))


def train(runs: Sequence[PretrainingRun], output: Path, jobs: int) -> dict[PretrainingRun, Path]:
    """Train the runs that are not finished, and return the directory of each run."""
    runner = Runner([run.planned(output) for run in runs], jobs)
    runner.run(runner.runs)
    return {run: output / run.name for run in runs}


def test_metrics(run: Path) -> dict[str, dict[str, Any]]:
    """Return the metrics of a run on its own test data by name; empty if it was not evaluated."""
    return read_evaluation(run / "evaluation.json").get("metrics", {})


def measured_metrics(run: Path, names: Sequence[str]) -> dict[str, float]:
    """Return the test metrics `names` of a run in percent, and `train_seconds`, the time of its training steps.

    Metrics of further test sets are called SET/METRIC; those of the held-out set `UNSEEN`, which decide, come first.
    The time is what all samples would take at the speed of the fastest stretch, as on an idle machine.
    """
    metrics, steps = test_metrics(run), read_metrics(run, "train")
    # The fastest stretch counts, because whatever else the machine does only slows training down.
    seconds = steps[-1]["samples"] / max(line["samples_per_s"] for line in steps)
    further = [name for name in metrics if "/" in name and name.rpartition("/")[2] in names]
    further.sort(key=lambda name: not name.startswith(f"{UNSEEN}/"))
    return {name: metrics[name]["value"] for name in (*further, *names)} | {"train_seconds": round(seconds, 1)}
