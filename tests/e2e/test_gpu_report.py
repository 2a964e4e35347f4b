"""The report for a GPU, its parts really run on a CPU with tiny models; and what it says of parts that go wrong."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from conftest import ROOT, run_python

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


def test_parts_that_go_wrong_are_named() -> None:
    def taken(code: str, limit: float = 60) -> dict:
        return report.take("a part", [sys.executable, "-c", code], limit)

    assert "code 3: a reason" in taken("print('a reason'); raise SystemExit(3)")["problem"]
    assert taken("import time; time.sleep(60)", 1.5)["problem"] == "stopped after 2 s"
    fine = taken("print('12 passed')")
    assert (fine["problem"], fine["lines"]) == ("", ["12 passed"])
    seconds = list(report.LIMITS.values())
    assert sum(seconds[:3]) < 600  # the most valuable figures
    assert sum(seconds) < 3600


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_is_refused() -> None:
    assert "torch sees no GPU" in run_python(ROOT / "tools" / "gpu_report.py").stderr
    done = run_python("-m", "pytest", "-q", ROOT / "tests" / "gpu")
    assert done.returncode == 5  # nothing collected, which is no success
    assert "files NOT RUN, torch sees no GPU here" in done.stdout
