"""How many of 100 comparisons see a difference: the plan's figure, and the spreads that it rests on."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from mllm.compare.cells import llava_runs
from mllm.compare.comparison import Comparison
from mllm.compare.plan import ENCODER_VARIANCE, OF_QUESTIONS, RUN_VARIANCE, power, power_in_words
from mllm.compare.words import design_in_words

BY_SEED = {
    "unseen artist": {
        "clips": [0.465, 0.4375, 0.4525],
        "clip": [0.4175, 0.4125, 0.395],
        "caption": [0.4325, 0.4375, 0.4425],
    },
    "seen artists": {
        "clips": [0.4625, 0.44, 0.4775],
        "clip": [0.4275, 0.405, 0.3975],
        "caption": [0.4625, 0.4775, 0.4425],
    },
}
"""Right answers of each run of the pretrained encoders, 400 questions: docs/results/compare.json, made at b693801."""


def test_the_plan_s_spread_is_that_of_all_pairs_of_pretrained_encoders() -> None:
    """One pair alone, clips − clip on the unseen artist, spreads half as much, and promised 71 of 100 cases."""
    pairs = [(np.array(of[a]), np.array(of[b])) for of in BY_SEED.values() for a, b in combinations(of, 2)]
    measured = [float((a - b).var(ddof=1)) for a, b in pairs]
    assert pytest.approx(np.mean(measured), rel=0.02) == RUN_VARIANCE + ENCODER_VARIANCE
    assert measured[0] < 0.55 * np.mean(measured)


@pytest.mark.parametrize(
    ("seeds", "runs", "design", "cases"),
    [
        (3, 3, "3 encoders of each kind, 1 LLaVA run on each", 53),
        (3, 9, "3 encoders of each kind, 3 LLaVA runs on each", 68),
        (5, None, "5 encoders of each kind, 6 LLaVA runs on them in turn", 95),
    ],
)
def test_designs_in_words_and_what_they_see(seeds: int, runs: int | None, design: str, cases: int) -> None:
    comparison = Comparison(seeds=seeds, llava_runs=runs)
    assert design_in_words(seeds, llava_runs(comparison)) == design
    assert 100 * power(comparison, OF_QUESTIONS, 0.05) == pytest.approx(cases, abs=1.5)
    page = (ROOT / "docs" / "comparison.md").read_text(encoding="utf-8")
    assert f"| {design} | {cases} |" in page


def test_the_plan_says_what_it_cannot_see(tmp_path: Path) -> None:
    questions = tmp_path / "questions.jsonl"
    lines = [f'{{"question_id": {i}, "text": "How many?", "answer": "{i % 4}"}}\n' for i in range(40)]
    questions.write_text("".join(lines))
    own = Comparison(encoders=("clips", "blind"), seeds=3, questions=questions, train_flags=("--data_path", "x.json"))
    assert power_in_words(own).startswith("this comparison sees 5 points in ")
    assert power_in_words(own).endswith("by the demo's spreads, for want of its own")
    assert power(own, 40, 0.05) < power(own, 400, 0.05)
    assert "tells nothing about other runs" in power_in_words(replace(own, seeds=1, llava_runs=1))
