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
import sys
from pathlib import Path
from statistics import mean, stdev

from rich.console import Console
from rich.table import Table

from clips.common.escape import for_rich
from clips.recipes import recipe
from clips.studies.cells import FIGURES, Cell, figures, train
from clips.studies.welch import difference, show_difference

MULTIPLIERS = (0.25, 0.5, 1.0, 2.0)


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
    console.print(f"written to {for_rich(str(output / 'comparison.json'))}")


def tuned(name: str, label: str, multiplier: float, samples: int, seed: int) -> Cell:
    """Recipe `name` with its learning rates multiplied."""
    phase = recipe(name).phases[0]
    rates = (f"phases.0.lr={phase.lr * multiplier}", f"phases.0.muon_lr={phase.muon_lr * multiplier}")
    return Cell(name, label, samples, seed, rates)


def validation_score(run: Path) -> float:
    """Mean of the last validation figures that the search goes by."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["kind"] == "eval"][-1]
    return round(mean(last[key] for key in ("sentence_i2t_r1", "sentence_t2i_r1", "zero_shot_top1")), 2)


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
