"""CLIPS against the CLIP baseline on the demo: the same search of learning rates, equal samples and equal time.

1. Search: both recipes at half the samples with their learning rates times 0.25, 0.5, 1 and 2, one seed. The best rate
   by the validation split's mean of sentence R@1 (both directions) and zero-shot accuracy is kept.
2. Equal samples: both recipes at their best rates, each seed.
3. Equal time: the baseline again, for as many samples as it sees in the time that CLIPS took.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from clips.common.live import say
from clips.common.page import Page
from clips.common.rundir import read_metrics
from clips.lab.pretraining import PretrainingRun, measured_metrics, train, with_rates
from clips.lab.run import Runner
from clips.studies.variants import DECIDING, SECONDS, Hypothesis, Study, Variant
from clips.studies.variants_page import page

MULTIPLIERS = (0.25, 0.5, 1.0, 2.0)
PAIR = ("demo", "clip_baseline")
RECIPES = {"clips": "demo", "clip": "clip_baseline", "clip-equal-time": "clip_baseline"}
LABELS = {"clips": "CLIPS", "clip": "CLIP, equal samples", "clip-equal-time": "CLIP, equal time"}
QUESTION = Hypothesis(
    title="CLIPS against CLIP at equal samples and at equal time",
    variants=tuple(RECIPES),
    contrasts=(("clips", "clip"), ("clips", "clip-equal-time")),
)
LIMITS = "The drawings have generated captions, and the models are tiny. They are no evidence about natural images."


def compare(
    output: Path, seeds: int, samples: int, jobs: int, *, decides: str = DECIDING, dry_run: bool = False
) -> dict[str, Any] | None:
    """Run what is missing, `jobs` runs at a time, and write equal-time.json and equal-time.html into `output`.

    Return the result, or None with `dry_run`, which only prints the plan.
    """
    search = search_runs(samples)
    if dry_run:  # the search finds the rates, then the runs of equal samples find the samples of equal time
        runs = [run.planned(output, f"{recipe} × {rate:g}") for (recipe, rate), run in search.items()]
        then = f"{3 * seeds} runs at the best rates, a third of them for equal time"
        Runner(runs, jobs).print_plan(f"the search in {output}", {"then": then})
        return None
    directories = train(list(search.values()), output, jobs)
    scores = {key: validation_score(directories[run]) for key, run in search.items()}
    best = {recipe: max(MULTIPLIERS, key=lambda rate: scores[recipe, rate]) for recipe in PAIR}
    say(f"kept learning-rate multipliers: {best}")
    equal = equal_time_study(best, seeds, samples, samples).runs
    directories = train([*equal["clips"], *equal["clip"]], output, jobs)
    clips, clip = (
        min(measured_metrics(directories[r], ())[SECONDS] for r in equal[name]) for name in ("clips", "clip")
    )
    longer = int(samples * clips / clip)
    study = replace(equal_time_study(best, seeds, samples, longer), decides=decides)
    return study.carry_out(output, jobs, equal_time_page, more={"multipliers": best, "equal_time_samples": longer})


def search_runs(samples: int) -> dict[tuple[str, float], PretrainingRun]:
    """Return the runs of the search by recipe and multiple of the learning rates."""
    return {
        (recipe, rate): with_rates(PretrainingRun(recipe, f"search-{recipe}-x{rate:g}", samples // 2, 0), rate)
        for recipe in PAIR
        for rate in MULTIPLIERS
    }


def equal_time_study(best: Mapping[str, float], seeds: int, samples: int, longer: int) -> Study:
    """Return the study. `best` has each recipe's multiple of its learning rates; `longer`: samples of equal time."""
    variants = {name: Variant(LABELS[name], recipe) for name, recipe in RECIPES.items()}
    counts = {"clips": samples, "clip": samples, "clip-equal-time": longer}
    runs = {
        name: [with_rates(v.run(name, seed, counts[name]), best[v.recipe]) for seed in range(seeds)]
        for name, v in variants.items()
    }
    return Study("equal-time", "CLIPS against CLIP", variants, runs, {"equal": QUESTION})


def validation_score(run: Path) -> float:
    """Return the mean of the last validation metrics; the learning rates are chosen by it."""
    last = read_metrics(run, "eval")[-1]
    return round(mean(last[key] for key in ("sentence_i2t_r1", "sentence_t2i_r1", "zero_shot_top1")), 2)


def equal_time_page(result: Mapping[str, Any]) -> Page:
    """Render the result of the study at equal training time as a page."""
    note = f"{result['samples']:,} samples, for CLIP at equal time {result['equal_time_samples']:,}; "
    note += f"{result['seeds']} seeds; learning rates times {result['multipliers']}"
    return page(result, QUESTION.title, note, LIMITS)
