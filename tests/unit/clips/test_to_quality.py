"""Time to quality: the crossing as a run's metrics have it, over seeds, and the leaderboard that it ends on."""

from __future__ import annotations

import datetime
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT

from clips.common.errors import UserError
from clips.lab.pretraining import PretrainingRun, with_rates
from clips.studies import to_quality as study
from clips.studies.to_quality import (
    COLUMNS,
    ENOUGH_SEEDS,
    HEAD,
    VARIANTS,
    Target,
    ToQuality,
    leaderboard,
    merit,
    reached,
    read_variants,
    spread,
    summary,
    table_rows,
)
from clips.studies.variants import Variant
from clips.training import meter
from clips.training.meter import Meter
from clips.weights.checkpoint import TrainState

BOTH = ("sentence_i2t_r1", "sentence_t2i_r1")
TARGET = Target(BOTH, 95.0)


# ------------------------------------------------------------------------------------------------------- one run
def lines_of(figures: list[tuple[float, float]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Ten steps of eight samples, logged at 4, 8 and 10, validated at every second step from the second on."""
    steps = [
        {"step": step, "samples": 8 * step, "step_seconds": seconds, "step_cpu_seconds": seconds / 2}
        for step, seconds in ((4, 1.0), (8, 3.0), (10, 0.5))
    ]
    evals = [
        {"step": 2 * i, "samples": 16 * i, "validation_seconds": 7.0, **dict(zip(BOTH, both, strict=True))}
        for i, both in enumerate(figures, 1)
    ]
    return steps, evals


def write_run(run: Path, figures: list[tuple[float, float]]) -> None:
    steps, evals = lines_of(figures)
    run.mkdir()
    lines = [{"kind": "train", **line} for line in steps] + [{"kind": "eval", **line} for line in evals]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_first_validation_at_which_all_figures_are_there(tmp_path: Path) -> None:
    """Also where a later one falls below again: the end stands beside it."""
    write_run(tmp_path / "run", [(10, 10), (96, 94.9), (95, 95), (99, 90), (97, 96)])
    test = {BOTH[0]: 93.0, BOTH[1]: 91.0, f"unseen/{BOTH[0]}": 71.0, "zero_shot_top1": 1.0}
    found = reached(tmp_path / "run", test, TARGET)
    assert (found["samples"], found["samples_of_the_run"]) == (48, 80)
    assert found["seconds"] == 4 * 1.0 + 2 * 3.0
    assert found["cpu_seconds"] == found["seconds"] / 2
    assert found["validation_seconds"] == 3 * 7.0
    assert found["last"] == {BOTH[0]: 97, BOTH[1]: 96}
    assert found["test"] == {BOTH[0]: 93.0, BOTH[1]: 91.0}
    assert found["unseen"] == {BOTH[0]: 71.0, BOTH[1]: None}
    assert found["distance"] == 0


def test_a_target_that_is_not_reached_is_told_with_the_distance(tmp_path: Path) -> None:
    write_run(tmp_path / "run", [(99, 94), (94, 99), (99.0, 90.5)])
    found = reached(tmp_path / "run", {}, TARGET)
    assert [found[name] for name in study.COSTS] == [None] * 4
    assert found["distance"] == pytest.approx(4.5)
    assert found["test"] == dict.fromkeys(BOTH)


def test_a_figure_that_was_not_measured_is_refused_with_those_that_were(tmp_path: Path) -> None:
    write_run(tmp_path / "run", [(1, 2)])
    with pytest.raises(UserError, match=r"--figures web_r1: .*there are: sentence_i2t_r1, sentence_t2i_r1$"):
        reached(tmp_path / "run", {}, Target((BOTH[0], "web_r1"), 1.0))


def test_what_happens_aside_costs_no_processor_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(meter.time, "process_time", lambda: clock[0])
    measuring = Meter(torch.device("cpu"), TrainState(seed=0))
    clock[0] += 3
    with measuring.aside():
        clock[0] += 40
    clock[0] += 2
    assert clock[0] - measuring.cpu_since == 5


def test_broken_samples_are_pairs_however_they_were_pinned() -> None:
    """An older torch pins a tuple as a list, which no dict takes: too many broken samples were a TypeError."""
    measuring = Meter(torch.device("cpu"), TrainState(seed=0))
    measuring.add({"loss": torch.zeros(())}, [["a.tar#0", "image: cut off"], ["a.tar#0", "image: cut off"]])
    assert list(dict.fromkeys(measuring.skipped)) == [("a.tar#0", "image: cut off")]


# ------------------------------------------------------------------------------------------------------- variants
def test_variants_are_read_from_flags() -> None:
    assert read_variants([]) == list(VARIANTS)
    short = ["short", "demo", "phases.0.samples=48000", "phases.0.schedule=linear"]
    assert read_variants([["a", "clip_baseline"], short]) == [
        Variant("a", "clip_baseline"), Variant("short", "demo", tuple(short[2:]))
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([["alone"]], "give a name, which becomes a folder's, a recipe"),
        ([["a", "phases.0.samples=8"]], "give a name, which becomes a folder's, a recipe"),
        ([["../a", "demo"]], "give a name, which becomes a folder's"),
        ([["a", "demo"], ["a", "demo"]], "a name is given twice: a, a"),
    ],
)
def test_variants_that_cannot_be_read(entries: list[list[str]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_variants(entries)


@pytest.mark.parametrize(
    ("variant", "options", "message"),
    [
        (Variant("a", "no-such"), {}, "--recipe 'no-such' is not known"),
        (Variant("a", "demo", ("phases.0.sample=8",)), {}, "no field 'sample'"),
        (Variant("a", "demo", ("train.eval_every=64",)), {}, "a-x1-seed0: its settings change the validations"),
        (Variant("a", "demo", ("train.seed=7",)), {}, "change the validations or the seed"),
        (Variant("a", "demo"), {"every": 0}, "--every 0: both must be at least 1"),
        (Variant("a", "demo"), {"rates": (1.0, 0.0)}, "--rates 1.0 0.0: multiples must be above 0"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_trains(
    tmp_path: Path, variant: Variant, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        ToQuality(tmp_path / "out", [Variant("fine", "demo"), variant], TARGET, **options)
    assert not (tmp_path / "out").exists()


def test_rates_are_multiplied_in_every_phase_after_what_the_settings_say() -> None:
    run = PretrainingRun("s16", "x", None, 0, ("data.train=a.csv", "phases.1.lr=0.25", "phases.*.muon_lr=0.5"))
    before, after = run.config().phases, with_rates(run, 2.0).config().phases
    assert before[1].lr == 0.25
    assert len(before) == 3
    for old, new in zip(before, after, strict=True):
        assert (new.lr, new.muon_lr, new.samples) == (2 * old.lr, 2 * old.muon_lr, old.samples)


# ------------------------------------------------------------------------------------------------------- over seeds
def record(samples: int | None, distance: float = 0.0) -> dict[str, Any]:
    def cost(factor: float) -> float | None:
        return None if samples is None else samples * factor

    return {
        "samples": samples, "seconds": cost(0.01), "cpu_seconds": cost(0.008), "validation_seconds": cost(0.001),
        "samples_of_the_run": 80_000, "distance": distance, "seed": 0, "machine": "cpu × 1, bf16", "data": "demo 2",
        "last": dict.fromkeys(BOTH, 95.0 - distance), "test": {BOTH[0]: 96.0, BOTH[1]: 95.5},
        "unseen": {BOTH[0]: 76.0, BOTH[1]: 75.5},
    }  # fmt: skip


def test_a_seed_that_never_gets_there_moves_the_median() -> None:
    found = summary([record(300), record(100), record(200)])
    assert found["reached"] == 3
    assert found["samples"] == {"median": 200, "lowest": 100, "highest": 300}
    assert found["seconds"] == {"median": 2.0, "lowest": 1.0, "highest": 3.0}
    found = summary([record(None), record(100), record(200)])
    assert found["reached"] == 2
    assert found["samples"] == {"median": 200, "lowest": 100, "highest": None}
    assert spread(found["samples"]) == "200 [100–not reached]"
    found = summary([record(None), record(100), record(None)])
    assert found["samples"] == {"median": None, "lowest": 100, "highest": None}
    assert spread(found["samples"]) == "not reached [100–not reached]"
    assert spread(summary([record(None)])["samples"]) == "not reached"
    assert json.dumps(found, allow_nan=False)


def test_rates_are_chosen_by_samples_then_by_what_is_missing_at_the_end() -> None:
    order = [record(None, 30.0), record(None, 4.0), record(70_000), record(60_000)]
    assert sorted(order[::-1], key=merit) == order


def found_of(**groups: list[dict[str, Any]]) -> dict[str, Any]:
    seeds = len(next(iter(groups.values())))
    about = {"recipe": "demo", "settings": ["phases.0.schedule=linear"], "rates": 1.0}
    variants = {name: about | summary(records) for name, records in groups.items()}
    return {"target": {"figures": BOTH, "threshold": 95.0}, "seeds": seeds, "variants": variants}


def test_the_table_drops_nobody() -> None:
    found = found_of(fast=[record(100), record(120)], slow=[record(None, 5.0), record(None, 7.0)])
    rows = [dict(zip(HEAD, row, strict=True)) for row in table_rows(found)]
    assert [(row["variant"], row["reached"], row["samples"]) for row in rows] == [
        ("fast", "2 of 2", "110 [100–120]"), ("slow", "0 of 2", "not reached")
    ]  # fmt: skip
    assert [row["last validation"] for row in rows] == ["95.0 / 95.0", "89.0 / 89.0"]


# ------------------------------------------------------------------------------------------------------- leaderboard
SPREAD = re.compile(r"([\d,]+)(?: \[([\d,]+)–([\d,]+)\])?")


def check_row(line: str) -> datetime.date:
    """Assert that a row of the leaderboard says what it must; its date."""
    cells = dict(zip(COLUMNS, re.split(r"(?<!\\)\|", line.strip())[1:-1], strict=True))
    cells = {name: cell.strip() for name, cell in cells.items()}
    assert all(cells.values()), line
    assert re.fullmatch(r"[0-9a-f]{7,40}", cells["commit"]), f"a commit without changes: {cells['commit']}"
    assert re.fullmatch(r".+: \w+(?:, \w+)* ≥ \d+(?:\.\d+)?", cells["target"])
    assert re.fullmatch(r".+, (?:fp32|bf16)", cells["machine"])
    for name in ("samples", "seconds", "processor s"):
        match = SPREAD.fullmatch(cells[name])
        assert match, f"{name}: {cells[name]}"
        median, *ends = (int(number.replace(",", "")) for number in match.groups() if number)
        assert median > 0
        assert not ends or ends[0] <= median <= ends[1]
    figures = cells["target"].rpartition(":")[2].split(",")
    for column in ("unseen artist", "test"):
        tested = [float(number) for number in cells[column].split(" / ")]
        assert len(tested) == len(figures)
        assert all(0 <= number <= 100 and math.isfinite(number) for number in tested)
    return datetime.date.fromisoformat(cells["date"])


def test_a_row_is_printed_for_what_every_seed_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    commit = study.commit
    monkeypatch.setattr(study, "commit", lambda: "f04440a")
    good, bad = [record(n) for n in (100, 120, 140)], [record(100), record(120), record(None)]
    rows, without = leaderboard(found_of(good=good, bad=bad))
    assert len(rows) == 1
    assert check_row(rows[0]) == datetime.date.today()
    assert "good: demo phases.0.schedule=linear" in rows[0]
    assert re.fullmatch(r"[0-9a-f]{7,40}(-dirty)?|unknown", commit())
    with pytest.raises(AssertionError, match="a commit without changes: f04440a-dirty"):
        check_row(rows[0].replace(" f04440a ", " f04440a-dirty "))
    assert without == ["bad: no row, reached by 2 of 3 seeds; a row needs 3 or more and all of them"]
    few = leaderboard(found_of(few=good[: ENOUGH_SEEDS - 1]))
    assert few == ([], ["few: no row, reached by 2 of 2 seeds; a row needs 3 or more and all of them"])


def test_every_row_of_the_page_says_what_it_must_and_stands_in_order() -> None:
    page = (ROOT / "docs" / "leaderboard.md").read_text()
    section = page.split("\n## The table\n")[1].split("\n## ")[0]
    head, rule, *rows = re.findall(r"^\|.*\|$", section, flags=re.MULTILINE)
    assert [cell.strip() for cell in head.split("|")[1:-1]] == list(COLUMNS)
    assert set(rule) <= set("|-")
    dates = [check_row(row) for row in rows]
    assert dates == sorted(dates)
