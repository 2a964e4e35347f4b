"""The report for a GPU, its parts really run on a CPU with tiny models; and what it says of parts that go wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, load_script, run_python
from tiny_web import write_export, write_llava

from clips.common.errors import CommandError

CPU = torch.device("cpu")
SCRIPT = ROOT / "tools" / "gpu_report.py"
report = load_script("tools/gpu_report.py")


def figures(part: str, *flags: str | Path) -> Any:
    """What a part prints, from a process of its own: it joins a process group."""
    done = run_python(SCRIPT, "--part", part, "--device", "cpu", "--tiny", *flags)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_every_part_runs(tmp_path: Path) -> None:
    """All but the tests, of which a CPU has none."""
    rows = figures("S/16")
    assert [row["what"] for row in rows] == ["ours, towers", "open_clip, equal towers", "ours, with the captioner"]
    assert all(row["samples_per_s"] > 0 and row["mfu"] > 0 and row["peak_memory_gb"] > 0 for row in rows)
    assert all(row["predicted_gb"] > 0 for row in rows)
    assert ["from" in row for row in rows] == [False, True, False]
    assert "[expected: memory by the formula of our towers" in report.said(rows[1])
    rows = figures("LLaVA")
    assert [row["what"] for row in rows] == ["stage 2, LoRA", "stage 1", "stage 2, whole"]
    assert all(row["step_s"] > 0 and row["predicted_gb"] > 0 and row["mfu"] > 0 for row in rows)
    checked = {row["what"]: row["mend"] for row in figures("checks")}
    assert checked.keys() == report.CHECKS.keys()
    assert (checked["driver"], checked["DeepSpeed"]) == ("", "")
    write_export(tmp_path / "clips")
    write_llava(tmp_path, tmp_path / "clips", initializer_range=0.1)
    (row,) = figures("chat", "--model", tmp_path / "model")
    assert all(row[name] > 0 for pair in report.FIGURES.values() for name in pair[:2] if "step" not in pair[0])
    said = report.said(row)
    assert said.count("expected") == 4
    assert "tokens/s" in said


def test_parts_that_go_wrong_are_named() -> None:
    def taken(code: str, limit: float = 60) -> dict:
        return report.take("a part", [sys.executable, "-c", code], limit)

    failed = taken("print('a reason'); raise SystemExit(3)")
    assert (failed["problem"], failed["result"]) == ("failed with exit code 3: a reason", None)
    assert taken("import time; time.sleep(60)", 1.5)["problem"] == "stopped after 2 s"
    fine = taken("print('12 passed')")
    assert (fine["problem"], fine["result"]) == ("", "12 passed")
    seconds = list(report.LIMITS.values())
    assert sum(seconds[:4]) < 600  # the most valuable figures
    assert sum(seconds) < 3600


def test_the_parts_run_in_the_order_of_their_worth_and_a_cut_leaves_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each figure is printed beside the expected one."""
    first, row = (
        ["checks", "B/16", "LLaVA", "tests"],
        {"size": "b16", "what": "ours", "batch": 64, "peak_memory_gb": 9.9},
    )
    row |= {"predicted_gb": 9.0, "step_s": 0.3, "expected_s": 0.4, "from": "a guess"}

    def taken(name: str, command: list[str], limit: float) -> dict:
        if name not in first:
            raise KeyboardInterrupt  # the machine goes back after ten minutes
        return {"part": name, "seconds": limit, "problem": "", "result": json.dumps([row])}

    monkeypatch.setattr(report, "take", taken)
    monkeypatch.setattr(
        sys, "argv", ["gpu_report.py", "--device", "cpu", "--tiny", "--output", str(tmp_path / "r.json")]
    )
    with pytest.raises(KeyboardInterrupt):
        report.main()
    assert [part["part"] for part in json.loads((tmp_path / "r.json").read_text())["parts"]] == first
    said = "b16 ours: 64 samples; memory 9.9 GB expected 9 (+10%); step 0.3 s expected 0.4 (-25%) [expected: a guess]"
    assert said in capsys.readouterr().err


def test_what_a_machine_lacks_has_the_sentence_that_mends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(device: torch.device) -> None:
        raise OSError(f"no {device}\nlibrary")

    assert list(report.CHECKS) == ["driver", "bf16", "NCCL", "bitsandbytes", "DeepSpeed", "g++"]
    monkeypatch.setattr(report, "CHECKS", {"a": (raises, "install a"), "b": (bool, "-"), "c": (lambda _: 0, "get c")})
    assert [row["mend"] for row in report.checks(CPU)] == ["install a (OSError: no cpu)", "", "get c"]


def test_the_batch_grows_until_memory_is_full_and_shrinks_until_it_fits() -> None:
    """The memory here is one of 100 samples; only where it ends is not real."""
    asked = []

    def measured(samples: int) -> dict:
        asked.append(samples)
        if samples > 100:
            raise torch.OutOfMemoryError("full")
        return {"batch": samples, "samples_per_s": 1e6}

    assert report.largest(measured, 16, at_most=8192)["batch"] == 64
    assert report.largest(measured, 256, at_most=256)["batch"] == 64
    assert asked == [16, 32, 64, 128, 256, 128, 64]
    with pytest.raises(CommandError, match="not even one sample fits"):
        report.largest(lambda samples: measured(101), 128, at_most=8192)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_is_refused() -> None:
    assert "torch sees no GPU here" in run_python(SCRIPT).stderr
    assert "give --tiny too" in run_python(SCRIPT, "--device", "cpu").stderr
    done = run_python("-m", "pytest", "-q", ROOT / "tests" / "gpu")
    assert done.returncode == 5  # nothing collected, which is no success
    assert "files NOT RUN, torch sees no GPU here" in done.stdout
