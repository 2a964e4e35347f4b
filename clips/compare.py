"""CLIPS against the CLIP baseline on the demo, fairly: both tuned by the same search, equal samples and equal time.

1. Search: both recipes at half the samples with their learning rates × 0.5, 1 and 2, one seed; the best by the
   validation split's mean of sentence R@1 (both ways) and zero-shot accuracy is kept.
2. Equal samples: both with their best rates, each seed.
3. Equal time: the baseline again, for as many samples as it can see in the time that CLIPS took.

Every cell is an ordinary run of scripts/pretrain_clips.py under `output/`, so a comparison that is stopped goes on
where it was. Figures are those of the test split.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev

from rich.console import Console
from rich.table import Table
from scipy import stats

from clips.errors import CommandError
from clips.recipes import recipe

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "pretrain_clips.py"
MULTIPLIERS = (0.5, 1.0, 2.0)
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


def compare(output: Path, seeds: int, samples: int) -> None:
    """Run what is missing of the comparison and write `comparison.json` and a table."""
    console = Console(stderr=True)
    best = {}
    for name in ("demo", "clip_baseline"):
        scores = {}
        for multiplier in MULTIPLIERS:
            cell = Cell(name, f"search-{name}-x{multiplier:g}", multiplier, samples // 2, 0)
            scores[multiplier] = validation_score(train(cell, output, console))
        best[name] = max(scores, key=scores.get)
        console.print(f"{name}: validation score by learning-rate multiplier {scores}, kept × {best[name]:g}")

    groups: dict[str, list[dict]] = {"CLIPS": [], "CLIP, equal samples": [], "CLIP, equal time": []}
    for seed in range(seeds):
        for group, name in (("CLIPS", "demo"), ("CLIP, equal samples", "clip_baseline")):
            run = train(Cell(name, f"{name}-seed{seed}", best[name], samples, seed), output, console)
            groups[group].append(figures(run))
    ratio = mean(r["train_seconds"] for r in groups["CLIPS"]) / mean(
        r["train_seconds"] for r in groups["CLIP, equal samples"]
    )
    longer = int(samples * ratio)
    for seed in range(seeds):
        cell = Cell("clip_baseline", f"clip_baseline-equal-time-seed{seed}", best["clip_baseline"], longer, seed)
        groups["CLIP, equal time"].append(figures(train(cell, output, console)))

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


def train(cell: Cell, output: Path, console: Console) -> Path:
    """The run directory of `cell`, trained unless it is finished."""
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
    with (output / f"{cell.name}.log").open("w") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode
    if code != 0:
        raise CommandError(f"{cell.name} ended with exit code {code}; see {log.name}")
    return run


def validation_score(run: Path) -> float:
    """Mean of the last validation figures that the search goes by."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["kind"] == "eval"][-1]
    return round(mean(last[key] for key in ("sentence_i2t_r1", "sentence_t2i_r1", "zero_shot_top1")), 2)


def figures(run: Path) -> dict[str, float]:
    """A run's test figures in percent, and how long its training steps took."""
    found = json.loads((run / "evaluation.json").read_text())["figures"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    seconds = steps[-1]["samples"] / median(line["samples_per_s"] for line in steps)  # not shaken by a busy moment
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
