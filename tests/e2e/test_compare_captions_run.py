"""scripts/compare_captions.py with real, tiny runs: from the plan to the page, and again without training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from lab_runs import run_main

from clips.common.rundir import UNSEEN
from clips.data.demo import ensure_demo

pytestmark = pytest.mark.slow


def test_a_set_of_captions_beside_web_captions_alone(
    tmp_path: Path, several_artists: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    data = ensure_demo("data/demo", sizes={"train": 24, "val": 8, "test": 40, UNSEEN: 40})
    output = tmp_path / "runs" / "compare_captions"
    command = ["compare_captions", "--sets", f"exact={data}/train", "--seeds", "2", "--samples", "64"]
    command += ["--set", "phases.*.batch_size=16", "data.workers=0"]

    assert run_main(monkeypatch, *command, "--dry-run") == 0
    planned = capsys.readouterr().err
    for said in ("4 of 4 to run", "64 samples", "min, by assumed"):
        assert said in planned
    assert not list(output.glob("*-seed*")), "a plan trains nothing"

    assert run_main(monkeypatch, *command) == 0
    result = json.loads((output / "captions.json").read_text())
    assert list(result["variants"]) == ["exact", "web"]
    assert result["pictures"] == 24

    # Both test sets, of which that by an artist never trained on decides.
    assert result["deciding_figure"] == "unseen/sentence_r1"
    for variant in result["variants"].values():
        for run in variant["runs"]:
            for name in ("sentence_r1", "zero_shot_top1", "linear_probe_top1"):
                assert {name, f"unseen/{name}"} <= run["figures"].keys()
            assert [part["name"] for part in run["config"]["data"]["further_tests"]] == [UNSEEN]
    page = (output / "captions.html").read_text()
    assert "(unseen artist)" in page
    assert "with seen artists" in page

    before = {path: path.stat().st_mtime_ns for path in output.glob("*/evaluation.json")}
    capsys.readouterr()
    assert run_main(monkeypatch, *command) == 0
    assert "0 of 4 to run" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in before} == before
    again = json.loads((output / "captions.json").read_text())
    for part in ("variants", "questions", "seconds"):
        assert again[part] == result[part]
