"""scripts/compare_captions.py with real, tiny runs: the demo study, and the same sets again by their names."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
from lab_runs import run_main
from tiny_mllm import write_llava, write_run

from clips.common.rundir import UNSEEN
from clips.config import Fields, RunConfig
from clips.data.demo import ensure_demo
from clips.data.sources import open_source

pytestmark = pytest.mark.slow


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


def test_the_demo_study(
    tmp_path: Path, several_artists: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without flags but for the sizes, in a folder where something was trained: from the plan to the page."""
    monkeypatch.chdir(tmp_path)
    data = ensure_demo("data/demo", sizes={"train": 72, "val": 8, "test": 40, UNSEEN: 40})
    cut(data / "train" / "00000.tar", each=24)
    write_run(Path("runs/clips-demo"))
    write_llava(Path(), context=512)
    flags = ["--seeds", "2", "--samples", "64", "--set", "phases.*.batch_size=16", "data.workers=0"]
    output = tmp_path / "runs" / "compare_captions"

    assert run_main(monkeypatch, "compare_captions", "--shards", "1", *flags, "--dry-run") == 0
    planned = capsys.readouterr().err
    for said in ("96 samples", "24 captions", "3 of 3 to run", "8 of 8 to run", "64 samples", "min, by assumed"):
        assert said in planned
    assert not output.exists(), "a plan trains nothing"

    assert run_main(monkeypatch, "compare_captions", "--shards", "1", *flags) == 0
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
    page = (output / "captions.html").read_text()
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
    before = {path: path.stat().st_mtime_ns for path in output.glob("*/evaluation.json")}
    sets = ",".join(f"{name}={entry['data']}" for name, entry in result["sets"].items())
    capsys.readouterr()
    assert run_main(monkeypatch, "compare_captions", "--sets", sets, *flags) == 0
    assert "0 of 8 to run" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in before} == before
    again = json.loads((output / "captions.json").read_text())
    assert (again["variants"], again["questions"], again["seconds"]) == (
        result["variants"], result["questions"], result["seconds"]
    )  # fmt: skip
    assert run_main(monkeypatch, "compare_captions", "--shards", "1", *flags, "--dry-run") == 0
    assert "0 of 3 to run" in capsys.readouterr().err
