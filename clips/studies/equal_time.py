"""CLIPS against the CLIP baseline on the demo, fairly: both tuned by the same search, equal samples and equal time.

1. Search: both recipes at half the samples with their learning rates × 0.25, 0.5, 1 and 2, one seed; the best by the
   validation split's mean of sentence R@1 (both ways) and zero-shot accuracy is kept.
2. Equal samples: both with their best rates, each seed.
3. Equal time: the baseline again, for as many samples as it can see in the time that CLIPS took.

Every run is an ordinary one of scripts/pretrain_clips.py under `output/`, so a comparison that is stopped goes on
where it was. Figures are those of the test split.
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import mean, stdev

from rich.console import Console
from rich.table import Table

from clips.common.escape import for_rich
from clips.common.files import write_json
from clips.common.rundir import read_metrics
from clips.lab.pretraining import PretrainingRun, read_figures, train, with_rates
from clips.lab.stats import difference, show_difference

SECONDS = "train_seconds"
"""Of what `read_figures` reads the one that is no figure of the test split."""
MULTIPLIERS = (0.25, 0.5, 1.0, 2.0)


def compare(output: Path, seeds: int, samples: int, jobs: int) -> None:
    """Run what is missing of the comparison, `jobs` runs at a time, and write `comparison.json` and a table."""
    console = Console(emoji=False, stderr=True)
    recipes = {"CLIPS": "demo", "CLIP": "clip_baseline"}
    search = {
        (name, multiplier): tuned(name, f"search-{name}-x{multiplier:g}", multiplier, samples // 2, 0)
        for name in recipes.values()
        for multiplier in MULTIPLIERS
    }
    directories = train(list(search.values()), output, jobs, console)
    scores = {key: validation_score(directories[run]) for key, run in search.items()}
    best = {name: max(MULTIPLIERS, key=lambda multiplier: scores[name, multiplier]) for name in recipes.values()}
    console.print(f"kept learning-rate multipliers: {best}")

    def group(name: str, label: str, count: int) -> list[PretrainingRun]:
        return [tuned(name, f"{label}-seed{seed}", best[name], count, seed) for seed in range(seeds)]

    equal = {"CLIPS": group("demo", "clips", samples), "CLIP, equal samples": group("clip_baseline", "clip", samples)}
    directories = train([run for runs in equal.values() for run in runs], output, jobs, console)
    groups = {name: [read_figures(directories[run]) for run in runs] for name, runs in equal.items()}
    seconds = {name: min(row["train_seconds"] for row in rows) for name, rows in groups.items()}
    longer = int(samples * seconds["CLIPS"] / seconds["CLIP, equal samples"])
    runs = group("clip_baseline", "clip-equal-time", longer)
    directories = train(runs, output, jobs, console)
    groups["CLIP, equal time"] = [read_figures(directories[run]) for run in runs]

    differences = differences_from("CLIPS", groups)
    result = {
        "command": " ".join(sys.argv),
        "samples": {"equal samples": samples, "equal time": longer},
        "multipliers": best,
        "groups": groups,
        "clips_minus": differences,
    }
    write_json(output / "comparison.json", result)
    console.print(table_of_figures(groups, "CLIPS", differences))
    console.print(f"written to {for_rich(str(output / 'comparison.json'))}")


def tuned(name: str, label: str, multiplier: float, samples: int, seed: int) -> PretrainingRun:
    """Recipe `name` with its learning rates multiplied."""
    return with_rates(PretrainingRun(name, label, samples, seed), multiplier)


def validation_score(run: Path) -> float:
    """Mean of the last validation figures that the search goes by."""
    last = read_metrics(run, "eval")[-1]
    return round(mean(last[key] for key in ("sentence_i2t_r1", "sentence_t2i_r1", "zero_shot_top1")), 2)


def differences_from(first: str, groups: dict[str, list[dict]]) -> dict[str, dict]:
    """Group → figure → `first` minus that group, with its interval; for every other group."""
    return {
        group: {name: difference(groups[first], rows, name) for name in rows[0] if name != SECONDS}
        for group, rows in groups.items()
        if group != first
    }


def table_of_figures(groups: dict[str, list[dict]], first: str, differences: dict[str, dict]) -> Table:
    title = "test split, % (mean ± standard deviation over seeds); where there is one, the unseen artist decides"
    out = Table(title=title, title_justify="left")
    out.add_column("figure")
    for group in groups:
        out.add_column(group, justify="right")
    for group in differences:
        out.add_column(f"{first} − {group} [95 %]", justify="right")
    for name in groups[first][0]:
        columns = [[row[name] for row in rows] for rows in groups.values()]
        row = [f"{mean(c):.1f} ± {stdev(c):.1f}" if len(c) > 1 else f"{mean(c):.1f}" for c in columns]
        for by_name in differences.values():
            d = by_name.get(name)
            row.append(show_difference(d) if d else "")
        out.add_row(name, *row)
    return out
