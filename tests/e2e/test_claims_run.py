"""scripts/compare_pretraining.py with real, tiny runs: stopped in the middle, gone on, and run again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from lab_runs import run_main, write_run

from clips.common.rundir import read_metrics
from clips.data.demo import ensure_demo
from clips.lab.pretraining import train
from clips.studies.sizes import sizes_study
from clips.studies.variants import terminal

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings that name small data; the validation split is also an artist never trained on."""
    made = ensure_demo(tmp_path_factory.mktemp("data"), sizes={"train": 300, "val": 40, "test": 80})
    settings = ["phases.*.batch_size=16", "data.workers=0", *(f"data.{s}={made / s}" for s in ("train", "val", "test"))]
    return [*settings, f'data.further_tests=[{{"name": "unseen", "data": "{made / "val"}"}}]']


def test_a_stopped_grid_goes_on_and_finished_runs_are_never_run_again(
    tmp_path: Path, data: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "claims"
    flags = ["claims", "--claims", "b,e", "--seeds", "2", "--samples", "64", "--output", output]
    flags += ["--llava-report", tmp_path / "none.json", "--set", *data]
    with subprocess.Popen(
        [sys.executable, "scripts/compare_pretraining.py", *map(str, flags)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    ) as first:
        try:
            finished = wait_for(output, first)
        finally:
            first.send_signal(signal.SIGTERM)
        assert first.wait(120) == 128 + signal.SIGTERM, first.stderr.read()[-2000:]
    assert not (output / "claims.json").exists()
    before = {path: path.stat().st_mtime_ns for path in finished}

    assert run_main(monkeypatch, "compare_pretraining", *flags) == 0
    assert {path: path.stat().st_mtime_ns for path in finished} == before
    result = json.loads((output / "claims.json").read_text())
    runs = [run for variant in result["variants"].values() for run in variant["runs"]]
    assert {run["name"] for run in runs} == {f"{n}-seed{s}" for n in ("web", "sentence", "captioner") for s in (0, 1)}
    for run in runs:
        assert (run["config"]["train"]["seed"], run["config"]["phases"][0]["samples"]) == (run["seed"], 64)
        assert 0 <= run["figures"]["unseen/long_r1"] <= 100
    assert result["questions"]["e"]["verdict"] == "not run"
    assert "python scripts/compare_encoders.py" in (output / "claims.html").read_text()

    capsys.readouterr()
    assert run_main(monkeypatch, "compare_pretraining", *flags) == 0
    assert "0 of 6 to run" in capsys.readouterr().err
    again = json.loads((output / "claims.json").read_text())
    assert (again["variants"], again["seconds"]) == (result["variants"], result["seconds"])

    assert run_main(monkeypatch, "compare_pretraining", *flags, "data.epoch=3") == 2
    assert run_main(monkeypatch, "compare_pretraining", *flags[:5], "--samples", "128", *flags[7:]) == 2
    assert "phases.0.samples: 64 → 128" in capsys.readouterr().err


def test_the_study_of_sizes_trains_and_measures_pictures_of_several_aspects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of its variants one is trained; from its run the others' figures are copied, and the study reports them."""
    made = ensure_demo(tmp_path / "data", sizes={"train": 200, "val": 20, "test": 40}, aspects=True)
    settings = ["phases.*.batch_size=16", "data.workers=0", *(f"data.{s}={made / s}" for s in ("train", "val", "test"))]
    study = sizes_study(2, 64, settings)
    native = study.runs["native"][0]
    train([native], tmp_path / "sizes", 1, terminal())
    evaluation = json.loads((tmp_path / "sizes" / native.name / "evaluation.json").read_text())
    assert evaluation["image_size"] == [[60, 60], [90, 40], [40, 90]]
    metrics = read_metrics(tmp_path / "sizes" / native.name, "train")
    for run in study.everything():
        if run != native:
            write_run(tmp_path / "sizes" / run.name, run, evaluation, metrics)
    flags = ["sizes", "--seeds", "2", "--samples", "64", "--output", tmp_path / "sizes", "--set", *settings]
    assert run_main(monkeypatch, "compare_pretraining", *flags) == 0
    result = json.loads((tmp_path / "sizes" / "sizes.json").read_text())
    assert [(c["a"], c["b"]) for c in result["questions"]["sizes"]["contrasts"]] == [
        ("native", "squash"), ("drawn", "squash"), ("native", "drawn"),
    ]  # fmt: skip
    assert "squashed to the square" in (tmp_path / "sizes" / "sizes.html").read_text()


def wait_for(output: Path, process: subprocess.Popen) -> list[Path]:
    """The evaluations of the runs that are finished, once there is one."""
    for _ in range(600):
        if pages := list(output.glob("*/report/index.html")):
            return [page.parent.parent / "evaluation.json" for page in pages]
        assert process.poll() is None, process.stderr.read()[-2000:]
        time.sleep(0.5)
    raise AssertionError("no run ended in 5 minutes")


def test_time_to_quality_is_measured_once_and_read_for_any_target(
    tmp_path: Path, data: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [*data, "phases.0.samples=64", "phases.0.schedule=linear"]
    flags = ["to-quality", "--variant", "tiny", "demo", *settings, "--seeds", "2", "--every", "32"]
    flags += ["--figures", "part_t2i_r1", "--output", tmp_path]
    assert run_main(monkeypatch, "compare_pretraining", *flags, "--threshold", "0", "--rates", "0.5", "1") == 0
    tiny = json.loads((tmp_path / "to-quality.json").read_text())["variants"]["tiny"]
    assert (set(tiny["searched"]), tiny["reached"]) == ({"0.5", "1"}, 2)
    assert tiny["samples"] == {"median": 32, "lowest": 32, "highest": 32}
    assert all(tiny[cost]["lowest"] > 0 for cost in ("seconds", "cpu_seconds", "validation_seconds"))
    for run in tiny["runs"]:
        assert run["samples_of_the_run"] == 64
        assert all(run[tested]["part_t2i_r1"] is not None for tested in ("test", "unseen"))
    run = tmp_path / f"tiny-x{tiny['rates']:g}-seed1"
    assert [line["samples"] for line in read_metrics(run, "eval")] == [32, 64]
    assert all(line["step_cpu_seconds"] > 0 for line in read_metrics(run, "train"))

    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/evaluation.json")}
    assert len(before) == 3, "two rates for seed 0, the better one for seed 1"
    flags += ["--rates", f"{tiny['rates']:g}"]
    capsys.readouterr()
    assert run_main(monkeypatch, "compare_pretraining", *flags, "--threshold", "100") == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert "tiny: no row, reached by 0 of 2 seeds" in capsys.readouterr().out
    assert "not reached" in (tmp_path / "to-quality.html").read_text()
    assert run_main(monkeypatch, "compare_pretraining", *flags, "--every", "48") == 2
    assert "train.eval_every: 32 → 48" in capsys.readouterr().err
