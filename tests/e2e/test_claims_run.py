"""scripts/reproduce_claims.py with real, tiny runs: stopped in the middle, gone on, and run again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, run_python

from clips.data.demo import ensure_demo

pytestmark = pytest.mark.slow
SCRIPT = "scripts/reproduce_claims.py"


def test_a_stopped_grid_goes_on_and_finished_runs_are_never_run_again(tmp_path: Path) -> None:
    output = tmp_path / "claims"
    data = ensure_demo(tmp_path / "data", sizes={"train": 300, "val": 40, "test": 80})
    flags = ["--claims", "b,e", "--seeds", "2", "--samples", "64", "--output", output]
    flags += ["--llava-report", tmp_path / "none.json", "--set", "phases.*.batch_size=16", "data.workers=0"]
    flags += [f"data.{split}={data / split}" for split in ("train", "val", "test")]
    with subprocess.Popen(
        [sys.executable, SCRIPT, *map(str, flags)],
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

    done = run_python(SCRIPT, *flags, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {path: path.stat().st_mtime_ns for path in finished} == before
    assert "python scripts/compare_encoders.py" in done.stderr
    result = json.loads((output / "claims.json").read_text())
    runs = [run for variant in result["variants"].values() for run in variant["runs"]]
    assert {run["name"] for run in runs} == {f"{n}-seed{s}" for n in ("web", "sentence", "captioner") for s in (0, 1)}
    for run in runs:
        assert run["config"]["train"]["seed"] == run["seed"]
        assert run["config"]["phases"][0]["samples"] == 64
        assert 0 <= run["figures"]["long_r1"] <= 100
    tokens = {name: variant["text_tokens"] for name, variant in result["variants"].items()}
    assert tokens["sentence"] == tokens["captioner"]  # the same pieces of the same captions
    assert tokens["web"] == {"web": tokens["sentence"]["web"]}
    assert tokens["web"]["web"] < tokens["sentence"]["sub"] < result["test_text_tokens"]["long"]
    assert result["claims"]["e"]["verdict"] == "not run"
    assert {"claims.html", "claims.md", "claim-b.png"} <= {path.name for path in output.iterdir()}

    again = run_python(SCRIPT, *flags)
    assert again.returncode == 0
    assert "training" not in again.stderr
    assert json.loads((output / "claims.json").read_text())["variants"] == result["variants"]

    other = run_python(SCRIPT, *flags, "--samples", "128")
    assert other.returncode == 2
    assert "phases.0.samples: 64 → 128" in other.stderr


def wait_for(output: Path, process: subprocess.Popen) -> list[Path]:
    """The evaluations of the runs that are finished, once there is one."""
    for _ in range(600):
        if pages := list(output.glob("*/report/index.html")):
            return [page.parent.parent / "evaluation.json" for page in pages]
        assert process.poll() is None, process.stderr.read()[-2000:]
        time.sleep(0.5)
    raise AssertionError("no run ended in 5 minutes")
