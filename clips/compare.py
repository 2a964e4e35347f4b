"""CLIPS against the CLIP baseline on the demo, fairly: both tuned by the same search, equal samples and equal time.

1. Search: both recipes at half the samples with their learning rates × 0.25, 0.5, 1 and 2, one seed; the best by the
   validation split's mean of sentence R@1 (both ways) and zero-shot accuracy is kept.
2. Equal samples: both with their best rates, each seed.
3. Equal time: the baseline again, for as many samples as it can see in the time that CLIPS took.

Every cell is an ordinary run of scripts/pretrain_clips.py under `output/`, so a comparison that is stopped goes on
where it was. Figures are those of the test split.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from scipy import stats

from clips.config import RunConfig
from clips.config import difference as differing_fields
from clips.errors import CommandError, Stopped, UserError
from clips.recipes import recipe

T, R = TypeVar("T"), TypeVar("R")

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "pretrain_clips.py"
MULTIPLIERS = (0.25, 0.5, 1.0, 2.0)
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
        return (run / "evaluation.json").exists() and (run / "report" / "index.html").exists()


def compare(output: Path, seeds: int, samples: int, jobs: int) -> None:
    """Run what is missing of the comparison, `jobs` cells at a time, and write `comparison.json` and a table."""
    console = Console(stderr=True)
    recipes = {"CLIPS": "demo", "CLIP": "clip_baseline"}
    grid = {
        (name, multiplier): tuned(name, f"search-{name}-x{multiplier:g}", multiplier, samples // 2, 0)
        for name in recipes.values()
        for multiplier in MULTIPLIERS
    }
    runs = train(list(grid.values()), output, jobs, console)
    scores = {key: validation_score(runs[cell]) for key, cell in grid.items()}
    best = {name: max(MULTIPLIERS, key=lambda multiplier: scores[name, multiplier]) for name in recipes.values()}
    console.print(f"kept learning-rate multipliers: {best}")

    def group(name: str, label: str, count: int) -> list[Cell]:
        return [tuned(name, f"{label}-seed{seed}", best[name], count, seed) for seed in range(seeds)]

    equal = {"CLIPS": group("demo", "clips", samples), "CLIP, equal samples": group("clip_baseline", "clip", samples)}
    runs = train([cell for cells in equal.values() for cell in cells], output, jobs, console)
    groups = {name: [figures(runs[cell]) for cell in cells] for name, cells in equal.items()}
    seconds = {name: min(row["train_seconds"] for row in rows) for name, rows in groups.items()}
    longer = int(samples * seconds["CLIPS"] / seconds["CLIP, equal samples"])
    cells = group("clip_baseline", "clip-equal-time", longer)
    runs = train(cells, output, jobs, console)
    groups["CLIP, equal time"] = [figures(runs[cell]) for cell in cells]

    differences = {
        group: {name: difference(groups["CLIPS"], rows, name) for name in FIGURES}
        for group, rows in groups.items()
        if group != "CLIPS"
    }
    result = {
        "command": " ".join(sys.argv),
        "samples": {"equal samples": samples, "equal time": longer},
        "multipliers": best,
        "groups": groups,
        "clips_minus": differences,
    }
    (output / "comparison.json").write_text(json.dumps(result, indent=2) + "\n")
    console.print(table(groups, differences))
    console.print(f"written to {output / 'comparison.json'}")


def tuned(name: str, label: str, multiplier: float, samples: int, seed: int) -> Cell:
    """Recipe `name` with its learning rates multiplied."""
    phase = recipe(name).phases[0]
    rates = (f"phases.0.lr={phase.lr * multiplier}", f"phases.0.muon_lr={phase.muon_lr * multiplier}")
    return Cell(name, label, samples, seed, rates)


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


@contextmanager
def locked(directory: Path, commands: Commands) -> Iterator[int]:
    """Hold `directory` for this process and for children that get the yielded descriptor; waits for another holder.

    A child that outlives a killed parent keeps it, so that a second run never trains beside it.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    with open(directory.parent / f".{directory.name}.lock", "w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if commands.stopping.wait(1):
                    raise CommandError("stopped") from None
        yield file.fileno()


class Commands:
    """Commands beside each other, each with its share of the cores and with what it prints in a file."""

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs
        self.running: set[subprocess.Popen[bytes]] = set()
        self.stopping = threading.Event()

    def run(self, command: Sequence[str], log: Path, **popen: Any) -> None:
        """Run one to its end and append its output to `log`. Raises CommandError with the log's end if it fails.

        `popen` are further arguments of `subprocess.Popen`.
        """
        if self.stopping.is_set():
            raise CommandError("stopped")
        env = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // self.jobs))}
        with log.open("a") as file:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=env, **popen)
        self.running.add(process)
        if self.stopping.is_set():  # the signal came between the check above and here
            process.terminate()
        code = process.wait()
        self.running.discard(process)
        if code != 0:
            end = "\n  ".join(log.read_text(errors="replace").splitlines()[-5:])
            raise CommandError(f"{log.stem} ended with exit code {code}; the end of {log}:\n  {end}")

    def map(self, function: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """`function` of each item, `jobs` at a time. After an error no further one begins, those that run end first.

        SIGTERM and Ctrl-C are passed on to the commands that run (which save first) and raise Stopped.
        """

        def stop(number: int, frame: object) -> None:
            self.stopping.set()
            for process in list(self.running):
                process.terminate()
            raise Stopped("stopped by a signal; the same command goes on where it was", exit_code=128 + number)

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            with ThreadPoolExecutor(self.jobs) as pool:
                futures = [pool.submit(function, item) for item in items]
                done, waiting = wait(futures, return_when=FIRST_EXCEPTION)
                for future in waiting:
                    future.cancel()
                for future in done:
                    future.result()
            return [future.result() for future in futures]
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def validation_score(run: Path) -> float:
    """Mean of the last validation figures that the search goes by."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["kind"] == "eval"][-1]
    return round(mean(last[key] for key in ("sentence_i2t_r1", "sentence_t2i_r1", "zero_shot_top1")), 2)


def figures(run: Path, names: Sequence[str] = FIGURES) -> dict[str, float]:
    """A run's test figures in percent, and how long its training steps take on an otherwise idle machine."""
    found = json.loads((run / "evaluation.json").read_text())["figures"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    # The fastest stretch: whatever else the machine does only ever slows training down.
    seconds = steps[-1]["samples"] / max(line["samples_per_s"] for line in steps)
    return {name: found[name]["value"] for name in names} | {"train_seconds": round(seconds, 1)}


def difference(ours: list[dict], theirs: list[dict], name: str) -> dict[str, Any]:
    """Mean difference over seeds with a 95 % Welch interval: None where the seeds show no spread at all.

    Welch, not pairs by seed: a seed sets the order of the data and the first weights alike in both, but what that
    leaves in common after training is small, and pairing costs half of the degrees of freedom (three seeds: 2 instead
    of up to 4, so intervals up to 1.5 times as wide). What is in common makes this interval too wide, not too narrow.
    """
    a, b = [row[name] for row in ours], [row[name] for row in theirs]
    if len({*a}) == len({*b}) == 1:
        return {"mean": mean(a) - mean(b), "ci95": None}
    with warnings.catch_warnings():  # one side alone without spread is no mistake: Welch's variances are apart
        warnings.simplefilter("ignore", RuntimeWarning)
        interval = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    return {"mean": mean(a) - mean(b), "ci95": [float(interval.low), float(interval.high)]}


def show_difference(found: dict[str, Any]) -> str:
    """`+1.2 [+0.3, +2.1]`"""
    ends = f" [{found['ci95'][0]:+.1f}, {found['ci95'][1]:+.1f}]" if found["ci95"] else ""
    return f"{found['mean']:+.1f}{ends}".replace("-", "−")


def table(groups: dict[str, list[dict]], differences: dict[str, dict]) -> Table:
    out = Table(title="test split, % (mean ± standard deviation over seeds)", title_justify="left")
    out.add_column("figure")
    for group in groups:
        out.add_column(group, justify="right")
    for group in differences:
        out.add_column(f"CLIPS − {group} [95 %]", justify="right")
    for name in (*FIGURES, "train_seconds"):
        cells = [[row[name] for row in rows] for rows in groups.values()]
        row = [f"{mean(c):.1f} ± {stdev(c):.1f}" if len(c) > 1 else f"{mean(c):.1f}" for c in cells]
        for by_name in differences.values():
            d = by_name.get(name)
            row.append(show_difference(d) if d else "")
        out.add_row(name, *row)
    return out
