"""The A/A test: intervals that keep their promise on stored answers, and ones that do not are seen."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from clips.common.errors import UserError
from mllm.compare import calibration
from mllm.compare.calibration import (
    AIM,
    AnsweredRuns,
    calibrate,
    calibration_sentences,
    observed,
    print_calibration,
    simulated,
    stored_runs,
)
from mllm.compare.statistics import Estimate

PICTURES, QUESTIONS = 80, 2


def write_answers(
    directory: Path, *, seeds: int, llava: int = 1, spread: float = 0.03, skills: dict[str, float] | None = None
) -> None:
    """Cells as a comparison leaves them: answers of runs whose luck differs, to questions that differ."""
    rng = np.random.default_rng(0)
    ease = np.repeat(rng.normal(0, 0.12, PICTURES), QUESTIONS) + rng.normal(0, 0.12, PICTURES * QUESTIONS)
    for encoder, skill in (skills or {"clips": 0.6, "clip": 0.5}).items():
        own = rng.normal(0, 0.1, PICTURES * QUESTIONS)  # what this encoder finds easier than others
        for pretraining in range(seeds):
            luck = rng.normal(0, spread)
            for run in range(llava):
                seed = pretraining + 1000 * run
                cell = directory / "cells" / f"{encoder}-{seed}"
                (cell / "evaluation").mkdir(parents=True)
                record = {"encoder": encoder, "vision": f"{encoder}:seed{pretraining}", "seed": seed}
                (cell / "cell.json").write_text(json.dumps(record | {"pretraining_seed": pretraining}))
                right = rng.random(len(ease)) < np.clip(skill + luck + rng.normal(0, spread) + ease + own, 0.02, 0.98)
                lines = [
                    {"question_id": i, "image": f"{i // QUESTIONS}.png", "correct": bool(ok)}
                    for i, ok in enumerate(right)
                ]
                (cell / "evaluation" / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 seeds of two encoders: enough for groups of twelve against twelve."""
    directory = tmp_path_factory.mktemp("answered")
    write_answers(directory, seeds=24)
    return directory


def test_stored_answers_of_one_encoder_differ_from_themselves_in_about_5_of_100_pairs(many: Path) -> None:
    """What `compare_encoders.py --calibrate` prints: 200 pairs of disjoint seeds or more, and the power."""
    console = Console(record=True, width=160, file=io.StringIO())
    results = print_calibration(many, console)
    (result,) = results.values()
    assert list(results) == ["answers.jsonl"]
    assert {row["about"] for row in result["observed"]} == {"clips", "clip"}
    for row in (*result["observed"], *result["simulated"]):
        assert row["tries"] >= 200
        assert row["power"]["1"] < row["power"]["2"] < row["power"]["5"]
    shares = [row["false"] for row in result["observed"]]
    assert AIM[0] <= np.mean(shares) <= AIM[1]
    assert AIM[0] <= result["simulated"][0]["false"] <= AIM[1]
    text = console.export_text()
    assert "clip − clips" in text
    assert "as a 95 % interval should" in text


def test_an_interval_that_is_too_narrow_is_found_out(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that counts every answer for itself, as if neither runs nor questions of a picture had luck in common."""

    def naive(scores: np.ndarray, clusters: np.ndarray) -> Estimate:
        reach = 1.96 * scores.std() / scores.size**0.5
        return Estimate(scores.mean(), scores.mean() - reach, scores.mean() + reach)

    monkeypatch.setattr(calibration, "interval", naive)
    (runs,) = stored_runs(many).values()
    found = calibrate(runs, pairs=200, tries=200)
    assert min(row["false"] for rows in found.values() for row in rows) > AIM[1]
    assert all("not as a 95 % interval should" in line for line in calibration_sentences(found)[:2])


def test_a_gap_that_is_put_in_is_as_large_as_said(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    means = []

    def keep(scores: np.ndarray, clusters: np.ndarray) -> Estimate:
        means.append(float(scores.mean()))
        return Estimate(0.0, -1.0, 1.0)

    monkeypatch.setattr(calibration, "interval", keep)
    (runs,) = stored_runs(many).values()
    observed("clips", runs, pairs=300)
    by_gap = np.reshape(means, (300, 4)).mean(0)
    assert by_gap - by_gap[0] == pytest.approx([0, 0.01, 0.02, 0.05], abs=0.002)


def test_runs_on_one_encoder_never_stand_on_both_sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_answers(tmp_path, seeds=4, llava=2)
    (runs,) = stored_runs(tmp_path).values()
    assert runs.scores["clips"].shape == (8, PICTURES * QUESTIONS)
    assert runs.shared["clips"].tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    marked = np.repeat(2.0 ** runs.shared["clips"][:, None], PICTURES * QUESTIONS, 1)
    runs = AnsweredRuns({"clips": marked}, runs.shared, runs.clusters)
    seen = []
    monkeypatch.setattr(calibration, "interval", lambda s, c: seen.append(s[:, 0]) or Estimate(0.0, -1.0, 1.0))
    monkeypatch.setattr(calibration, "GAPS", ())
    found = observed("clips", runs, pairs=50)
    assert found is not None
    assert (found.seeds, found.distinct, found.pictures) == (2, 3, PICTURES // 2)
    assert all(abs(difference) > 0.5 for pair in seen for difference in pair)


def test_too_few_seeds_are_no_test(tmp_path: Path) -> None:
    write_answers(tmp_path, seeds=3)
    (runs,) = stored_runs(tmp_path).values()
    found = calibrate(runs, tries=50)
    assert found["observed"] == []
    assert len(found["simulated"]) == 1
    assert "needs four seeds" in calibration_sentences(found)[-1]
    one = AnsweredRuns(
        {n: s[:1] for n, s in runs.scores.items()}, dict.fromkeys(runs.shared, np.zeros(1, int)), runs.clusters
    )
    assert simulated("clips", "clip", one) is None


def test_what_is_no_finished_comparison_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no cells"):
        stored_runs(tmp_path)
    write_answers(tmp_path, seeds=2)
    answers = tmp_path / "cells" / "clips-1" / "evaluation" / "answers.jsonl"
    text = answers.read_text()
    answers.write_text(text.replace('"0.png"', '"other.png"'))
    with pytest.raises(UserError, match="answers other questions"):
        stored_runs(tmp_path)
    answers.unlink()
    with pytest.raises(UserError, match=r"not every encoder has answered answers\.jsonl"):
        stored_runs(tmp_path)
    (tmp_path / "cells" / "clips-1" / "cell.json").write_text('{"encoder": "clips", "vision": "blind", "seed": 1}')
    with pytest.raises(UserError, match="older comparison"):
        stored_runs(tmp_path)
