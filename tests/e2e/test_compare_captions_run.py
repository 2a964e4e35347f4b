"""scripts/compare_captions.py with real, tiny runs on sets that differ in their captions only."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
from conftest import run_python

from clips.data.demo import ensure_demo

pytestmark = pytest.mark.slow
SCRIPT = "scripts/compare_captions.py"


def with_other_captions(shard: Path, target: Path) -> None:
    """The same samples, the long captions of each said of the one before."""
    target.parent.mkdir()
    with tarfile.open(shard) as source:
        members = [(member.name, source.extractfile(member).read()) for member in source]
    texts = [data for name, data in members if name.endswith(".txt")]
    turned = iter([texts[-1], *texts[:-1]])
    with tarfile.open(target, "w") as tar:
        for name, data in members:
            data = next(turned) if name.endswith(".txt") else data
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_two_sets(tmp_path: Path) -> None:
    output = tmp_path / "sets"
    data = ensure_demo(tmp_path / "data", sizes={"train": 200, "val": 40, "test": 80})
    with_other_captions(data / "train" / "00000.tar", tmp_path / "wrong" / "00000.tar")
    flags = ["--sets", f"exact={data / 'train'},wrong={tmp_path / 'wrong'}", "--test-data", data / "test"]
    flags += ["--seeds", "2", "--samples", "64", "--output", output]
    flags += ["--set", "phases.*.batch_size=16", "data.workers=0"]
    done = run_python(SCRIPT, *flags, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((output / "captions.json").read_text())
    assert result["pictures"] == 200
    assert result["truth"]["exact"]["places_right"] == result["truth"]["exact"]["things_right"] == 100
    assert result["truth"]["wrong"]["things_right"] < 30
    assert {(c["a"], c["b"]) for c in result["contrasts"]} == {("exact", "wrong"), ("exact", "web"), ("wrong", "web")}
    for name in ("exact", "wrong", "web"):
        for run in result["variants"][name]["runs"]:
            assert 0 <= run["figures"]["sentence_r1"] <= 100
            assert 0 <= run["figures"]["linear_probe_top1"] <= 100
    assert {"captions.html", "captions.md", "captions.png"} <= {path.name for path in output.iterdir()}
    before = {path: path.stat().st_mtime_ns for path in output.glob("*/evaluation.json")}

    again = run_python(SCRIPT, *flags)
    assert again.returncode == 0
    assert "training" not in again.stderr
    assert {path: path.stat().st_mtime_ns for path in output.glob("*/evaluation.json")} == before
    assert json.loads((output / "captions.json").read_text())["seconds"] == result["seconds"]
