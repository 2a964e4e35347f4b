"""What both halves take from a run directory: differences, the lock, lines cut short, whether it is finished."""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from clips.common import rundir
from clips.common.errors import UserError
from clips.common.files import lock, read_json, seal, write_json


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


def test_a_run_directory_is_one_process_s(tmp_path: Path) -> None:
    with lock(tmp_path / ".lock", wait=False):
        with pytest.raises(BlockingIOError):
            lock(tmp_path / ".lock", wait=False)
        with pytest.raises(UserError, match="another process trains in"):
            rundir.hold(tmp_path)
    rundir.hold(tmp_path)
    rundir.hold(tmp_path)  # the same process may ask again
    code = f"from pathlib import Path; from clips.common.rundir import hold; hold(Path({str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert f"another process trains in {tmp_path}, process {os.getpid()} on host {platform.node()}" in done.stderr


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


def checkpoint(run_dir: Path, step: int, content: str) -> dict[str, object]:
    """As clips/weights/checkpoint.py leaves one, as far as it is looked at here."""
    directory = run_dir / "checkpoints" / f"step-{step:08d}"
    directory.mkdir(parents=True)
    (directory / "model.safetensors").write_text(content)
    (directory / "state.json").write_text(json.dumps({"samples": 8 * step}))
    seal(directory)
    (run_dir / "LATEST").write_text(f"{directory.name}\n")
    return rundir.weights_of(directory)


def test_what_was_made_of_older_weights_does_not_count(tmp_path: Path) -> None:
    assert not rundir.is_finished(tmp_path)
    of = checkpoint(tmp_path, 1, "old")
    for name in ("export", "report"):
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / rundir.MADE_OF, of)
    (tmp_path / rundir.REPORT).touch()
    for name in ("evaluation", "evaluation-other"):
        write_json(tmp_path / f"{name}.json", {"test_set": "t", "checkpoint": of})
    assert rundir.is_finished(tmp_path)
    assert rundir.has_report(tmp_path)
    assert rundir.check_current(tmp_path / "export") == tmp_path / "export"
    assert len(rundir.read_evaluations(tmp_path)) == 2

    newer = checkpoint(tmp_path, 2, "new")  # the run went on, and was killed before its end
    assert not rundir.is_finished(tmp_path)
    assert not rundir.has_report(tmp_path)
    assert rundir.read_evaluations(tmp_path) == {}
    with pytest.raises(UserError, match=r"export_clips\.py --model"):
        rundir.check_current(tmp_path / "export")

    write_json(tmp_path / "export" / rundir.MADE_OF, newer)  # exported by hand: measured it is not
    assert not rundir.is_finished(tmp_path)
    (tmp_path / "evaluation.json").unlink()
    assert rundir.is_finished(tmp_path), "a run without test data is never measured"
    write_json(tmp_path / "evaluation.json", {"test_set": "t", "checkpoint": newer})
    assert rundir.is_finished(tmp_path)
    assert not rundir.has_report(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")  # to make room: nothing newer is left
    assert rundir.is_finished(tmp_path)


def test_json_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "env.json"
    assert read_json(path) == {}
    write_json(path, {"a": "é"})
    with pytest.raises(TypeError):
        write_json(path, {"a": Path})
    assert read_json(path) == {"a": "é"}
    assert [found.name for found in tmp_path.iterdir()] == ["env.json"]
