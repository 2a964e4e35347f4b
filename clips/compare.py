"""CLIPS against the CLIP baseline on the demo, fairly: both tuned by the same search, equal samples and equal time.

1. Search: both recipes at half the samples with their learning rates × 0.25, 0.5, 1 and 2, one seed; the best by the
   validation split's mean of sentence R@1 (both ways) and zero-shot accuracy is kept.
2. Equal samples: both with their best rates, each seed.
3. Equal time: the baseline again, for as many samples as it can see in the time that CLIPS took.

Every cell is an ordinary run of scripts/pretrain_clips.py under `output/`, so a comparison that is stopped goes on
where it was. Figures are those of the test split.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table
from scipy import stats

from clips.errors import CommandError, Stopped
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
    """One training run."""

    recipe: str
    name: str
    multiplier: float
    samples: int
    seed: int


def compare(output: Path, seeds: int, samples: int, jobs: int) -> None:
    """Run what is missing of the comparison, `jobs` cells at a time, and write `comparison.json` and a table."""
    console = Console(stderr=True)
    recipes = {"CLIPS": "demo", "CLIP": "clip_baseline"}
    grid = [
        Cell(name, f"search-{name}-x{multiplier:g}", multiplier, samples // 2, 0)
        for name in recipes.values()
        for multiplier in MULTIPLIERS
    ]
    scores = {cell: validation_score(run) for cell, run in train(grid, output, jobs, console).items()}
    best = {
        name: max((cell for cell in grid if cell.recipe == name), key=scores.get).multiplier
        for name in recipes.values()
    }
    console.print(f"kept learning-rate multipliers: {best}")

    def group(name: str, label: str, count: int) -> list[Cell]:
        return [Cell(name, f"{label}-seed{seed}", best[name], count, seed) for seed in range(seeds)]

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


def train(cells: list[Cell], output: Path, jobs: int, console: Console) -> dict[Cell, Path]:
    """The run directory of each cell, trained unless it is finished."""
    with ThreadPoolExecutor(jobs) as pool:
        return dict(zip(cells, pool.map(lambda cell: train_one(cell, output, jobs, console), cells), strict=True))


def train_one(cell: Cell, output: Path, jobs: int, console: Console) -> Path:
    run = output / cell.name
    if (run / "evaluation.json").exists() and (run / "report" / "index.html").exists():
        return run
    phase = recipe(cell.recipe).phases[0]
    console.print(f"training {cell.name}: {cell.samples:,} samples, learning rates × {cell.multiplier:g}")
    command = [
        sys.executable,
        str(SCRIPT),
        *("--recipe", cell.recipe, "--name", cell.name, "--output-dir", str(output), "--seed", str(cell.seed)),
        *("--samples", str(cell.samples), "--set", "train.eval_every=0", "train.checkpoint_every=0"),
        *(f"phases.0.lr={phase.lr * cell.multiplier}", f"phases.0.muon_lr={phase.muon_lr * cell.multiplier}"),
    ]
    Commands(jobs).run(command, output / f"{cell.name}.log")
    return run


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
        """`function` of each item, `jobs` at a time. After an error no further one begins.

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
                return list(pool.map(function, items))
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def validation_score(run: Path) -> float:
    """Mean of the last validation figures that the search goes by."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["kind"] == "eval"][-1]
    return round(mean(last[key] for key in ("sentence_i2t_r1", "sentence_t2i_r1", "zero_shot_top1")), 2)


def figures(run: Path) -> dict[str, float]:
    """A run's test figures in percent, and how long its training steps take on an otherwise idle machine."""
    found = json.loads((run / "evaluation.json").read_text())["figures"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    # The fastest stretch: whatever else the machine does only ever slows training down.
    seconds = steps[-1]["samples"] / max(line["samples_per_s"] for line in steps)
    return {name: found[name]["value"] for name in FIGURES} | {"train_seconds": round(seconds, 1)}


def difference(ours: list[dict], theirs: list[dict], name: str) -> dict[str, float]:
    """Mean difference over seeds with a 95 % Welch interval (seeds are independent runs)."""
    a, b = [row[name] for row in ours], [row[name] for row in theirs]
    interval = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    return {"mean": mean(a) - mean(b), "ci95": [float(interval.low), float(interval.high)]}


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
            row.append(f"{d['mean']:+.1f} [{d['ci95'][0]:+.1f}, {d['ci95'][1]:+.1f}]" if d else "")
        out.add_row(name, *row)
    return out
