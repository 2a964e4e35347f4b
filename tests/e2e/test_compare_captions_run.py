"""scripts/compare_captions.py with real, tiny runs: on sets that differ in their captions only, and the demo study."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
from conftest import ROOT, run_python
from tiny_mllm import write_llava, write_run

from clips.common.rundir import UNSEEN
from clips.config import Fields, RunConfig
from clips.data.demo import ensure_demo
from clips.data.sources import open_source

pytestmark = pytest.mark.slow
SCRIPT = ROOT / "scripts" / "compare_captions.py"


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


def cut(shard: Path, each: int) -> None:
    """The shard's samples as several shards of so many, in order."""
    with tarfile.open(shard) as source:
        members = [(member, source.extractfile(member).read()) for member in source]
    keys = list(dict.fromkeys(member.name.partition(".")[0] for member, _ in members))
    for start in range(0, len(keys), each):
        with tarfile.open(shard.with_name(f"part-{start:05d}.tar"), "w") as tar:
            for member, data in members:
                if member.name.partition(".")[0] in keys[start : start + each]:
                    tar.addfile(member, io.BytesIO(data))
    shard.unlink()


def test_the_demo_study(tmp_path: Path, several_artists: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without flags but for the sizes, in a folder where something was trained: from the plan to the page."""
    monkeypatch.chdir(tmp_path)
    data = ensure_demo("data/demo", sizes={"train": 72, "val": 8, "test": 40, UNSEEN: 40})
    cut(data / "train" / "00000.tar", each=24)
    write_run(Path("runs/clips-demo"))
    write_llava(Path(), context=512)
    flags = ["--shards", "1", "--seeds", "2", "--samples", "64", "--set", "phases.*.batch_size=16", "data.workers=0"]
    output = tmp_path / "runs" / "compare_captions"

    planned = run_python(SCRIPT, *flags, "--dry-run", cwd=tmp_path)
    assert planned.returncode == 0, planned.stderr[-3000:]
    for said in ("96 samples", "24 captions", "8 × 64 samples", "minutes on two idle cores"):
        assert said in planned.stderr
    assert not output.exists(), "a plan trains nothing"

    done = run_python(SCRIPT, *flags, cwd=tmp_path, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((output / "captions.json").read_text())
    assert list(result["sets"]) == ["mllm", "clips", "exact"]
    assert list(result["variants"]) == ["mllm", "clips", "exact", "web"]
    captioned = [Path(result["sets"][name]["data"]) for name in ("mllm", "clips")]
    kept = [len(open_source(f"{tmp_path / folder}", Fields(), need_long=True)) for folder in captioned]
    assert min(kept) >= result["pictures"] > 0

    # Both test sets, of which that by an artist never trained on decides.
    assert result["deciding_figure"] == "unseen/sentence_r1"
    for variant in result["variants"].values():
        for run in variant["runs"]:
            for name in ("sentence_r1", "zero_shot_top1", "linear_probe_top1"):
                assert {name, f"unseen/{name}"} <= run["figures"].keys()
            assert [part["name"] for part in run["config"]["data"]["further_tests"]] == [UNSEEN]
    page = (output / "captions.md").read_text()
    assert "(unseen artist)" in page
    assert "with seen artists" in page

    # The truth: the exact captions are right, a web caption names one thing and sometimes a wrong one.
    truth = result["truth"]
    assert truth["exact"]["things_right"] == truth["exact"]["things_found"] == 100
    assert truth["exact"]["counts_right"] == truth["exact"]["places_right"] == 100
    assert truth["web"]["things_found"] < 100
    assert set(truth) == {"mllm", "clips", "exact", "web"}
    assert "How often the captions are right" in page

    captioner = RunConfig.load(output / "captioner" / "config.json")
    assert captioner.samples == 96
    assert captioner.data.train == ";".join(f"data/demo/train/part-{start:05d}.tar" for start in (0, 24))
    planned = run_python(SCRIPT, *flags, "--dry-run", cwd=tmp_path)
    steps = [line.split()[1:-1] for line in planned.stderr.splitlines() if ".py" in line]
    left = {words[0]: words[-1] for words in steps}
    assert [left[name] for name in ("captioner", "set-mllm", "set-clips")] == ["0.0"] * 3, planned.stderr
