"""The report for a GPU, its parts really run on a CPU with tiny models; and what it says of parts that go wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_python
from tiny_mllm import pictures, write_llm, write_run

from clips.common.errors import CommandError, UserError
from clips.studies.gpu_report import LIMIT, Part, gpu_report, grow, parts, shrink, take, write

CPU = torch.device("cpu")


@pytest.mark.slow
def test_every_part_runs(tmp_path: Path) -> None:
    """All but the tests, of which a CPU has none, and pretraining, of which a tiny run stands here."""
    out = tmp_path / "report"
    write_run(out / "runs" / "encoder")
    llm = write_llm(tmp_path / "llm", hidden_size=64, intermediate_size=128)
    names = pictures(tmp_path / "images", 8)
    said = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A red cat"}]
    (tmp_path / "data.json").write_text(json.dumps([{"image": name, "conversations": said} for name in names]))
    llava = ["--model_name_or_path", str(llm), "--data_path", str(tmp_path / "data.json"), "--batch_size", "4"]
    llava += ["--image_folder", str(tmp_path / "images"), "--cache_dir", str(tmp_path / "cache")]
    planned = parts(out, "cpu", tiny=True, llava=llava)
    assert [part.name for part in planned] == [
        "S/16", "B/16", "L/14", "pretraining", "align", "LoRA", "LoRA on 4 bits", "chat",
    ]  # fmt: skip
    chosen = [part for part in planned if part.name not in ("B/16", "L/14", "pretraining")]
    outcomes = [take(part, out, 300) for part in chosen]
    assert not [(outcome.name, outcome.problem) for outcome in outcomes if outcome.problem]
    towers = outcomes[0].result
    assert [row["what"] for row in towers] == ["ours, towers", "open_clip, equal towers", "ours, with the captioner"]
    assert all(row["samples_per_s"] > 0 and row["mfu"] > 0 for row in towers)
    assert outcomes[1].result["samples_per_s_per_gpu"] > 0
    write(out, CPU, outcomes, tiny=True)
    report = json.loads((out / "report.json").read_text())
    assert report["tiny"]
    assert [part["name"] for part in report["parts"]] == [part.name for part in chosen]
    page = (out / "index.html").read_text()
    for shown in ("Training steps", "LLaVA stages", "LoRA on 4 bits", "open_clip, equal towers", "TINY MODELS"):
        assert shown in page


def test_parts_that_go_wrong_are_named_and_cost_no_other(tmp_path: Path) -> None:
    def python(code: str) -> tuple[str, ...]:
        return (sys.executable, "-c", code)

    failed = take(Part("a/b", python("print('a <reason>'); raise SystemExit(3)"), 60), tmp_path, 60)
    assert failed.problem == "failed with exit code 3: a <reason>"
    hanging = take(Part("c", python("import time; time.sleep(60)"), 60), tmp_path, 1.5)
    assert hanging.problem == "stopped after 2 s"
    late = take(Part("d", python(""), 60), tmp_path, 0.0)
    assert late.problem == "not run: no time was left"
    fine = take(Part("e", python("print('12 passed')"), 60), tmp_path, 60)
    assert (fine.problem, fine.result) == ("", "12 passed")
    write(tmp_path, CPU, [failed, hanging, late, fine], tiny=False)
    page = (tmp_path / "index.html").read_text()
    assert "a &lt;reason&gt;" in page
    assert "12 passed" in page


def test_all_parts_together_take_less_than_ten_minutes(tmp_path: Path) -> None:
    found = parts(tmp_path, "cuda", tiny=False, llava=())
    assert found[0].name == "tests"
    assert sum(part.limit for part in found) <= LIMIT + 20 < 620
    assert LIMIT < 600


def test_the_batch_grows_until_memory_is_full_and_shrinks_until_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory here is one of 100 samples; only where it ends is not real."""
    asked = []

    def measured(run: object, kind: str, device: torch.device, samples: int) -> dict:
        asked.append(samples)
        if samples > 100:
            raise torch.OutOfMemoryError("full")
        return {"samples_per_s": 1e6}

    monkeypatch.setattr("clips.studies.gpu_report.measured", measured)
    assert grow(None, "ours", CPU, 16, 8192)[0] == 64
    assert shrink(None, "theirs", CPU, 256)[0] == 64
    assert asked == [16, 32, 64, 128, 256, 128, 64]
    with pytest.raises(CommandError, match="not even 128 samples fit"):
        grow(None, "ours", CPU, 128, 8192)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="torch sees no GPU here"):
        gpu_report(tmp_path, "auto", tiny=False)
    with pytest.raises(UserError, match="give --tiny too"):
        gpu_report(tmp_path, "cpu", tiny=False)
    done = run_python("-m", "pytest", "-q", ROOT / "tests" / "gpu")
    assert done.returncode == 5  # nothing collected, which is no success
    assert "files NOT RUN, torch sees no GPU here" in done.stdout
