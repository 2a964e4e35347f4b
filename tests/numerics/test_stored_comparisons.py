"""Comparisons that commit 9c3575c made: today's engine gives every metric again, to the last digit.

Layouts may differ, numbers may not. The stored files are described in tests/data/lab/README.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from lab_runs import STORED, stored, write_runs

from clips.common.page import as_html
from clips.studies.claims import CLAIMS, VARIANTS, reproduce, variant_study
from clips.studies.equal_time import compare, equal_time_study, search_runs
from clips.studies.variants import judge
from mllm.compare.analysis import computed
from mllm.compare.comparison import comparison_of
from mllm.compare.report import page
from mllm.compare.verify import opened


def rows_of(variants: Mapping[str, Any]) -> dict[str, list[dict[str, float]]]:
    return {name: [run["metrics"] for run in variant["runs"]] for name, variant in variants.items()}


def assert_contains(new: Mapping[str, Any], old: Mapping[str, Any]) -> None:
    """Every entry of `old` is in `new`, equal."""
    assert {name: new[name] for name in old} == old


def assert_same_groups(result: Mapping[str, Any], old: Mapping[str, Any], names: Mapping[str, str]) -> None:
    """Metrics of every run and their differences from the first group, as the old layout had them."""
    new, first = rows_of(result["variants"]), next(iter(names))
    (question,) = result["questions"].values()
    (differences,) = (value for key, value in old.items() if key.endswith("_minus"))
    for name, label in names.items():
        for run, before in zip(new[name], old["groups"][label], strict=True):
            assert_contains(run, before)
    for contrast in question["contrasts"]:
        assert contrast["a"] == first
        assert_contains(contrast["metrics"], differences[names[contrast["b"]]])
    assert len(question["contrasts"]) == len(names) - 1


def test_equal_time(tmp_path: Path) -> None:
    record = stored("equal_time")
    plan, old = record["asked"], record["report"]
    longer = old["samples"]["equal time"]
    study = equal_time_study(old["multipliers"], **plan, longer=longer)
    write_runs(tmp_path, [*search_runs(plan["samples"]).values(), *study.everything()], record["runs"])
    result = compare(tmp_path, jobs=1, **plan)
    assert (result["multipliers"], result["equal_time_samples"]) == (old["multipliers"], longer)
    names = {"clips": "CLIPS", "clip": "CLIP, equal samples", "clip-equal-time": "CLIP, equal time"}
    assert_same_groups(result, old, names)


def assert_same_contrasts(new: Sequence[Mapping[str, Any]], old: Sequence[Mapping[str, Any]]) -> None:
    for ours, before in zip(new, old, strict=True):
        assert ours["verdict"] == "undecided"  # of three seeds, which had a verdict then
        assert_contains(ours, {name: value for name, value in before.items() if name != "verdict"})


def test_claims(tmp_path: Path) -> None:
    record = stored("claims")
    old, plan = record["report"], record["asked"]
    study = variant_study(
        list(old["variants"]), range(plan["seeds"]), plan["samples"], (), name="claims", title="", questions=CLAIMS
    )
    write_runs(tmp_path, study.everything(), record["runs"])
    del old["claims"]["e"]  # it was read from the report of a comparison of encoders
    options = {name: plan[name] for name in ("seeds", "samples")}
    result = reproduce(tmp_path, [*old["claims"]], jobs=1, **options)
    assert rows_of(result["variants"]) == rows_of(old["variants"])
    assert result["deciding_metric"] == old["deciding_metric"]
    for key, claim in old["claims"].items():
        assert_same_contrasts(result["questions"][key]["contrasts"], claim["contrasts"])


def test_captions() -> None:
    """A real comparison of 3 sets: the one of docs/recaption.md."""
    old = stored("captions")
    question = replace(
        CLAIMS["a"], variants=tuple(old["variants"]), contrasts=tuple((c["a"], c["b"]) for c in old["contrasts"])
    )
    result = judge(question, rows_of(old["variants"]))
    assert_same_contrasts(result["contrasts"], old["contrasts"])
    assert result["contrasts"][0]["metric"] == old["deciding_metric"]


@pytest.mark.parametrize("name", ["claims", "captions"])
def test_results_of_real_trainings_are_what_their_runs_give(name: str) -> None:
    """Their layout was converted once."""
    result = json.loads((STORED / "real" / f"{name}.json").read_text(encoding="utf-8"))
    rows = rows_of(result["variants"])
    for question in result["questions"].values():
        if "variants" in question:
            same = replace(
                CLAIMS["a"],
                variants=tuple(question["variants"]),
                contrasts=tuple((c["a"], c["b"]) for c in question["contrasts"]),
            )
            judged = judge(same, rows)
            assert (judged["contrasts"], judged["verdict"]) == (question["contrasts"], question["verdict"])
    of_photographs = {"web_longer", "sentence_longer"}
    assert name == "captions" or set(rows) == set(VARIANTS) - of_photographs


@pytest.mark.parametrize("name", ["made-up", "real"])
def test_encoders(name: str) -> None:
    """Seeds and images are crossed; every metric, interval and verdict is computed again from the raw answers.

    The intervals, and the verdicts that follow from them, are not those of 9c3575c: the interval was bounded on
    purpose, since it had no width where seeds agree by chance (clips/lab/stats.py, `half_of_interval`).
    Means and standard deviations are those of 9c3575c.
    """
    with opened(STORED / "encoders" / f"{name}.tar.xz") as output:
        old = json.loads((output / "report.json").read_text(encoding="utf-8"))
        again = json.loads(json.dumps(computed(comparison_of(old["plan"], output), old["plan"])))
    # McNemar's test, the A/A calibration and needed numbers left: the interval alone decides.
    gone = {"wins", "losses", "p_mcnemar", "p_holm", "variance", "items_needed", "needed"}
    metrics = [metric for encoder in old["encoders"].values() for metric in encoder["metrics"].values()]
    for row in (*old["differences"], *metrics):
        for key in row.keys() & gone:
            del row[key]
    for loose in old["loose_answers"].values():  # its examples are no metrics, and left
        del loose["normalised"]["examples"], loose["prefix"]["examples"]
    # `scorer` is a hash of the scorer's source, which also changes with its sentences.
    # `blind_questions` left, too: `needs_image` is measured on the other questions.
    for part in old.keys() - {"command", "time", "environment", "calibration", "scorer", "blind_questions"}:
        assert again[part] == old[part], part
    assert as_html(page(old, None))
