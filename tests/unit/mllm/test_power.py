"""The difference that a comparison sees: the plan's figure, and the spreads that it rests on."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from conftest import ROOT

from clips.common.files import read_json
from clips.lab.stats import interval, over_groups, verdict
from mllm.compare.comparison import LIMIT, Comparison
from mllm.compare.figures import (
    ANSWER_VARIANCE,
    ENCODER_VARIANCE,
    OF_QUESTIONS,
    PICTURE_VARIANCE,
    RUN_VARIANCE,
    detectable_difference,
)
from mllm.compare.report import design_in_words

STORED = read_json(ROOT / "tests" / "data" / "lab" / "real" / "encoders.json")["encoders"]
BY_SEED = [
    [np.array(STORED[name]["metrics"][metric]["by_seed"]) for name in ("clips", "clip", "caption")]
    for metric in ("accuracy", "accuracy@seen")
]
"""Right answers in each run of the pretrained encoders, for two sorts of pictures."""


def test_the_plan_s_spread_is_that_of_all_pairs_of_pretrained_encoders() -> None:
    """One pair is no measure: the largest of these variances is almost four times the smallest."""
    pairs = [pair for of in BY_SEED for pair in combinations(of, 2)]
    measured = [float((a - b).var(ddof=1)) for a, b in pairs]
    assert pytest.approx(np.mean(measured), rel=0.02) == RUN_VARIANCE + ENCODER_VARIANCE + ANSWER_VARIANCE
    assert max(measured) > 3 * min(measured)
    luck = [float((a * (1 - a)).mean() + (b * (1 - b)).mean()) / OF_QUESTIONS for a, b in pairs]
    assert pytest.approx(np.mean(luck), rel=0.02) == ANSWER_VARIANCE


@pytest.mark.parametrize(
    ("seeds", "runs", "design", "points"),
    [
        (5, 5, "5 encoders of each kind, 1 LLaVA run on each", (9.7, 8.8, 8.0)),
        (5, None, "5 encoders of each kind, 6 LLaVA runs on them in turn", (9.4, 8.5, 7.7)),
        (8, 8, "8 encoders of each kind, 1 LLaVA run on each", (6.7, 6.0, 5.4)),
        (8, 24, "8 encoders of each kind, 3 LLaVA runs on each", (5.0, 4.7, 4.4)),
    ],
)
def test_designs_in_words_and_what_they_see(
    seeds: int, runs: int | None, design: str, points: tuple[float, ...]
) -> None:
    """With 400 questions (the default), 800 and 6,400."""
    comparison = Comparison(seeds=seeds, llava_runs=runs)
    assert design_in_words(seeds, comparison.runs) == design
    assert [100 * detectable_difference(comparison, n) for n in (LIMIT, 800, 6400)] == pytest.approx(points, abs=0.1)
    page = (ROOT / "docs" / "comparison.md").read_text(encoding="utf-8")
    assert f"| {design} | {' | '.join(map(str, points))} |" in page


@pytest.mark.parametrize("questions", [400, 3200])
def test_simulated_comparisons_of_the_default_design_find_it_in_80_of_100(questions: int) -> None:
    """Luck of pretrainings and of LLaVA runs is that of whole models: no number of questions averages it out."""
    comparison, rng = Comparison(), np.random.default_rng(0)
    runs, wins, tries = comparison.runs, 0, 600
    groups = np.arange(runs) % comparison.seeds
    seen = detectable_difference(comparison, questions)
    for _ in range(tries):
        ours, theirs = (
            rng.normal(0, (ENCODER_VARIANCE / 2) ** 0.5, comparison.seeds)[groups, None]
            + rng.normal(0, (RUN_VARIANCE / 2) ** 0.5, (runs, 1))
            + rng.normal(0, (PICTURE_VARIANCE / 2 * OF_QUESTIONS) ** 0.5, questions)
            + rng.normal(0, (ANSWER_VARIANCE / 2 * OF_QUESTIONS) ** 0.5, (runs, questions))
            for _ in range(2)
        )
        ci95 = interval(over_groups(seen + ours - theirs, groups), np.arange(questions)).ci95
        by_seed = [over_groups(scores, groups).mean(1).tolist() for scores in (seen + ours, theirs)]
        wins += verdict(ci95, *by_seed) == "win"
    assert wins / tries == pytest.approx(0.8, abs=0.05)
