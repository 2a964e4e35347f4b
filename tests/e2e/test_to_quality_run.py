"""scripts/benchmark.py to-quality with real, tiny runs: measured, averaged, not run again for another target."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import run_python

from clips.common.rundir import checkpoints, read_metrics
from clips.common.tensors import read_weights
from clips.data.demo import ensure_demo
from clips.evaluation.evaluate import evaluate
from clips.weights.load import load_model

pytestmark = pytest.mark.slow
NAMES = ["tiny", "tiny, mean of 2"]


def test_cells_are_measured_once_and_read_for_any_target(tmp_path: Path) -> None:
    data = ensure_demo(tmp_path / "data", sizes={"train": 300, "val": 40, "test": 40})
    settings = [f"data.{split}={data / split}" for split in ("train", "val", "test")]
    settings.append(f'data.further_tests=[{{"name": "unseen", "data": "{data / "val"}"}}]')
    settings += ["data.workers=0", "phases.*.batch_size=16", "phases.0.samples=64", "phases.0.schedule=linear"]
    flags = ["to-quality", "--variant", "tiny", "demo", *settings, "--seeds", "2", "--every", "32", "--average", "2"]
    flags += ["--figures", "part_t2i_r1", "--output", tmp_path / "runs"]

    done = run_python("scripts/benchmark.py", *flags, "--json", "--threshold", "0", "--rates", "0.5", "1", timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert list(found["variants"]) == NAMES
    weights, means = (found["variants"][name] for name in NAMES)
    assert set(weights["searched"]) == {"0.5", "1"}
    assert (weights["reached"], means["reached"]) == (2, 2)
    assert weights["samples"] == {"median": 32, "lowest": 32, "highest": 32}
    assert means["samples"]["median"] == 64, "the first mean is there with the second checkpoint"
    assert weights["seconds"]["lowest"] > 0
    assert 0 < weights["cpu_seconds"]["median"] < means["cpu_seconds"]["median"]
    assert weights["validation_seconds"]["median"] > 0
    assert [run["samples_of_the_run"] for run in weights["runs"]] == [64, 64]
    for tested in ("test", "unseen"):
        assert all(run[tested]["part_t2i_r1"] is not None for run in weights["runs"] + means["runs"])

    run = tmp_path / "runs" / f"tiny-x{weights['rates']:g}-seed1-kept"
    assert [line["samples"] for line in read_metrics(run, "eval")] == [32, 64]
    assert all(line["step_cpu_seconds"] > 0 for line in read_metrics(run, "train"))
    newest, older = (read_weights(path / "model.safetensors") for path in checkpoints(run))
    loaded = load_model(run)
    loaded.model.load_state_dict({name: (newest[name] + older[name]) / 2 for name in newest})
    figure = evaluate(loaded.model, loaded.tokenizer, loaded.run, "val", image_size=60)["part_t2i_r1"]
    assert means["runs"][1]["last"]["part_t2i_r1"] == pytest.approx(figure.value)
    assert any(not torch.equal(newest[name], older[name]) for name in newest)

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*/evaluation.json")}
    assert len(before) == 3, "two rates for seed 0, the better one for seed 1"
    flags += ["--rates", f"{weights['rates']:g}"]
    again = run_python("scripts/benchmark.py", *flags, "--threshold", "100")
    assert again.returncode == 0, again.stderr[-3000:]
    assert "training" not in again.stderr
    assert {path: path.stat().st_mtime_ns for path in before} == before
    for name in NAMES:
        assert f"{name}: no row, reached by 0 of 2 seeds" in again.stdout
    assert "not reached" in again.stdout

    other = run_python("scripts/benchmark.py", *flags, "--every", "48")
    assert other.returncode == 2
    assert "train.eval_every: 32 → 48" in other.stderr
