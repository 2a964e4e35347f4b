"""How many of 100 comparisons see a difference: the plan's figure, and the spreads that it rests on."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from clips.common.files import read_json
from mllm.compare.cells import llava_runs
from mllm.compare.comparison import Comparison
from mllm.compare.plan import ENCODER_VARIANCE, OF_QUESTIONS, RUN_VARIANCE, power, power_in_words
from mllm.compare.words import design_in_words

STORED = read_json(ROOT / "docs" / "results" / "compare.json")["encoders"]
BY_SEED = [
    [np.array(STORED[name]["metrics"][metric]["by_seed"]) for name in ("clips", "clip", "caption")]
    for metric in ("accuracy", "accuracy@seen")
]
"""Right answers in each run of the pretrained encoders, for two sorts of pictures."""


def test_the_plan_s_spread_is_that_of_all_pairs_of_pretrained_encoders() -> None:
    """One pair is no measure: the largest of these variances is almost four times the smallest."""
    measured = [float((a - b).var(ddof=1)) for of in BY_SEED for a, b in combinations(of, 2)]
    assert pytest.approx(np.mean(measured), rel=0.02) == RUN_VARIANCE + ENCODER_VARIANCE
    assert max(measured) > 3 * min(measured)


@pytest.mark.parametrize(
    ("seeds", "runs", "design", "cases"),
    [
        (3, 3, "3 encoders of each kind, 1 LLaVA run on each", 18),
        (3, 9, "3 encoders of each kind, 3 LLaVA runs on each", 24),
        (5, 5, "5 encoders of each kind, 1 LLaVA run on each", 39),
        (5, None, "5 encoders of each kind, 6 LLaVA runs on them in turn", 40),
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
