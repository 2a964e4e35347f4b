"""The report for a GPU, its parts really run on a CPU with tiny models; and what it says of parts that go wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_python

from clips.common.errors import CommandError
from tools import gpu_report as report


@pytest.mark.slow
def test_every_part_of_its_own_runs() -> None:
    def figures(part: str) -> list[dict]:
        """In a process of its own: it joins a process group."""
        done = run_python(ROOT / "tools" / "gpu_report.py", "--part", part, "--device", "cpu")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    for rows, count in ((figures("S/16"), 1), (figures("LLaVA"), 3)):
        assert len(rows) == count
        assert all(row["samples_per_s"] > 0 and row["tflops"] > 0 and row["rehearsed_gb"] > 0 for row in rows)
    checked = {row["what"]: row["mend"] for row in figures("checks")}
    assert checked.keys() == report.CHECKS.keys()
    assert (checked["driver"], checked["DeepSpeed"]) == ("", "")


def test_parts_that_go_wrong_are_named() -> None:
    def taken(code: str, limit: float = 60) -> dict:
        return report.take("a part", [sys.executable, "-c", code], limit)

    assert "code 3: a reason" in taken("print('a reason'); raise SystemExit(3)")["problem"]
    assert taken("import time; time.sleep(60)", 1.5)["problem"] == "stopped after 2 s"
    fine = taken("print('12 passed')")
    assert (fine["problem"], fine["lines"]) == ("", ["12 passed"])
    seconds = list(report.LIMITS.values())
    assert sum(seconds[:4]) < 600  # the most valuable figures
    assert sum(seconds) < 3600


def test_a_cut_leaves_the_first_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = list(report.LIMITS)[:4]

    def taken(name: str, command: list[str], limit: float) -> dict:
        if name not in first:
            raise KeyboardInterrupt  # the machine goes back after ten minutes
        return {"part": name, "seconds": limit, "problem": "", "lines": ["[]"]}

    monkeypatch.setattr(report, "take", taken)
    monkeypatch.setattr(sys, "argv", ["gpu_report.py", "--device", "cpu", "--output", str(tmp_path / "r.json")])
    with pytest.raises(KeyboardInterrupt):
        report.main()
    assert [part["part"] for part in json.loads((tmp_path / "r.json").read_text())["parts"]] == first


def test_a_failed_check_has_the_sentence_that_mends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(device: torch.device) -> None:
        raise OSError(f"no {device}\nlibrary")

    monkeypatch.setattr(report, "CHECKS", {"a": (raises, "install a"), "b": (bool, "-"), "c": (lambda _: 0, "get c")})
    assert [row["mend"] for row in report.checks(torch.device("cpu"))] == ["install a (OSError: no cpu)", "", "get c"]


def test_the_batch_shrinks_until_it_fits() -> None:
    def measured(samples: int) -> dict:
        if samples > 100:
            raise torch.OutOfMemoryError("full")
        return {"batch": samples}

    assert report.largest(measured, 8192) == {"batch": 64}
    with pytest.raises(CommandError, match="not even one sample"):
        report.largest(lambda samples: measured(101), 128)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_is_refused() -> None:
    assert "torch sees no GPU" in run_python(ROOT / "tools" / "gpu_report.py").stderr
    done = run_python("-m", "pytest", "-q", ROOT / "tests" / "gpu")
    assert done.returncode == 5  # nothing collected, which is no success
    assert "files NOT RUN, torch sees no GPU here" in done.stdout
