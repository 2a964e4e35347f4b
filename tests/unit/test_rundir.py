"""What both halves take from a run directory: differences, the lock, lines cut short, whether it is finished."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from clips.common import rundir
from clips.common.errors import UserError


def test_differences_are_told_by_path() -> None:
    there = {"a": 1, "b": {"c": [1, 2], "d": None}, "gone": True, "e": (1,), "f": [{"g": 1}, {"g": 2}]}
    here = {"a": 1, "b": {"c": [1, 2, 3]}, "e": [1], "f": [{"g": 1}, {"g": 3}], "new": "x"}
    assert rundir.difference(there, here) == [
        "b.c: [1, 2] → [1, 2, 3]",
        "f.1.g: 2 → 3",
        "gone: true → null",
        'new: null → "x"',
    ]
    rundir.refuse(rundir.difference(there, there), "it holds others", "mend it")
    with pytest.raises(UserError, match="y: 1 → 2"):
        rundir.refuse(["x: 1 → 2", "y: 1 → 2"], "it holds others", "mend it")


def test_lines_that_are_cut_or_no_objects_are_passed_over_and_go(tmp_path: Path) -> None:
    lines = [{"kind": "train", "step": 1}, {"kind": "eval", "step": 1}, {"kind": "train", "step": 2}]
    text = "\n".join(map(json.dumps, lines)).encode()
    path = tmp_path / "metrics.jsonl"
    rundir.keep_lines(path, 1)
    assert not path.exists()
    path.write_bytes(text + b'\n12\n\nnull\n\xff\xfe{"step": 2}\n{"step": "4"}\n{}\n{"kind": "train", "st')
    assert rundir.read_metrics(tmp_path) == [*lines, {"step": "4"}]
    assert rundir.read_metrics(tmp_path, "train") == [lines[0], lines[2]]
    rundir.keep_lines(path, 1)
    assert path.read_bytes() == b"".join(line + b"\n" for line in text.splitlines()[:2]), "a line keeps its bytes"
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        rundir.read_metrics(tmp_path / "other")


def test_the_lock_ends_with_its_process_though_a_forked_worker_lives_on(tmp_path: Path) -> None:
    """As a rank that is killed leaves its data workers for some seconds, and torchrun starts it anew at once."""
    code = (
        "import os, time; from pathlib import Path; from clips.common.rundir import hold\n"
        f"hold(Path({str(tmp_path)!r}))\n"
        "if not os.fork(): print(os.getpid(), flush=True)\n"
        "time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as holder:
        worker = int(holder.stdout.readline())
        try:
            with pytest.raises(UserError, match=f"process {holder.pid} "):
                rundir.hold(tmp_path)
            holder.kill()
            holder.wait()
            rundir.hold(tmp_path)
        finally:
            os.kill(worker, signal.SIGKILL)
