"""scripts/kill_test.py in short: real kills of ranks, launchers and workers, and a difference that it would find."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from launched import python, run, small_data

from clips.studies.kill_test import PLACES, VICTIMS, compare, kills_for

pytestmark = [pytest.mark.slow, pytest.mark.cold]


def test_a_short_run_under_kills_equals_the_one_in_peace(tmp_path: Path) -> None:
    words = ("--recipe", "s16", "--debug", "--samples", "1920", *small_data(tmp_path / "data"))
    settings = ("--set", "train.precision=fp32", "train.checkpoint_every=160", "train.eval_every=640")
    out = tmp_path / "out"
    # A seed whose kills come early: a worker or rank at the start, the launcher in a step, a rank in a save.
    done = run(
        python("scripts/kill_test.py", "--kills", "3", "--seed", "3740", "--output", out, "--", *words, *settings),
        timeout=900,
    )
    assert done.code == 0, done.text
    assert done.text.splitlines()[-1].startswith("3 SIGKILLs (")
    assert done.text.splitlines()[-1].endswith("equal those in peace, bit for bit")
    assert len(json.loads((out / "kill_test.json").read_text())["kills"]) == 3

    assert compare(out / "in-peace", out / "killed") == []
    metrics = out / "killed" / "metrics.jsonl"
    whole = metrics.read_text()
    metrics.write_text(whole.replace('"loss": 1', '"loss": 2', 1))
    assert [line.partition(" ")[0] for line in compare(out / "in-peace", out / "killed")] == ["train"]
    metrics.write_text(whole)
    shutil.rmtree(out / "killed" / "export")
    assert compare(out / "in-peace", out / "killed")[0].startswith("exports: export/")


def test_kills_are_spread_over_places_and_victims() -> None:
    kills = kills_for(10_000, 20, seed=1)
    assert {kill.place for kill in kills} == set(PLACES)
    assert {kill.victim for kill in kills} == set(VICTIMS)
    assert [kill.victim for kill in kills if kill.after >= 10_000].count("launcher") == 1
    assert [kill.after for kill in kills] == sorted(kill.after for kill in kills)
    assert kills == kills_for(10_000, 20, seed=1) != kills_for(10_000, 20, seed=2)
