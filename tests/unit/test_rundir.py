"""What both packages take from a run directory: differences, the lock, lines cut short; paths and hashes."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from clips.common import files, rundir
from clips.common.errors import UserError
from clips.common.hub import model_digest
from clips.common.paths import inside, is_plain


def test_differences_are_told_by_path() -> None:
    there = {"a": 1, "b": {"c": [1, 2], "d": None}, "gone": True, "e": (1,), "f": [{"g": 1}, {"g": 2}]}
    here = {"a": 1, "b": {"c": [1, 2, 3]}, "e": [1], "f": [{"g": 1}, {"g": 3}], "new": "x"}
    assert rundir.changed(there, here) == [
        "b.c: [1, 2] → [1, 2, 3]",
        "f.1.g: 2 → 3",
        "gone: true → null",
        'new: null → "x"',
    ]
    rundir.refuse(rundir.changed(there, there), "it holds others", "mend it")
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


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "set"
    (root / "pics").mkdir(parents=True)
    (root / "pics" / "0.png").touch()
    (tmp_path / "set-2").mkdir()
    (root / "out.png").symlink_to(tmp_path / "secret.png")
    (root / "loop").symlink_to(root / "loop")
    (root / "up").symlink_to(tmp_path)
    (root / "in.png").symlink_to(root / "pics" / "0.png")
    return root


@pytest.mark.parametrize("name", ["/etc/passwd", "pics/../../secret.png", "../set-2/a.png", "a\0b", "x://a"])
def test_what_leads_out_is_refused(root: Path, name: str) -> None:
    with pytest.raises(ValueError, match="is outside"):
        inside(root, name)
    assert is_plain(name) == (name == "x://a"), "by the text alone"


def test_what_stays_below_is_its_path(root: Path) -> None:
    for name in ("pics/0.png", "./pics//0.png", "pics/../pics/0.png", str(root / "pics" / "0.png")):
        assert inside(root, name) == str(root / "pics" / "0.png")
    assert inside(root, "new/a..png") == str(root / "new" / "a..png"), "what is not there yet too"
    for link in ("in.png", "out.png", "up/secret.png"):
        assert inside(root, link) == str(root / link), "a link in the folder is inside, wherever it points"
    assert inside(root / "up" / "set", "pics/0.png") == str(root / "up" / "set" / "pics" / "0.png")
    assert inside("/", "etc/hosts") == "/etc/hosts"


def test_a_digest_is_of_the_names_and_contents_of_weights(tmp_path: Path) -> None:
    """Metrics and manifests of older runs hold such digests."""
    a = tmp_path / "a.safetensors"
    b = tmp_path / "b.safetensors"
    for path in (b, a):
        path.write_text(f"content of {path.name}")
    lines = "".join(f"{p.name} {hashlib.sha256(p.read_bytes()).hexdigest()}\n" for p in (a, b))
    digest = model_digest(tmp_path)
    assert digest == hashlib.sha256(lines.encode()).hexdigest()
    whole = model_digest(tmp_path, whole=True)
    (tmp_path / "config.json").write_text("{}")
    assert model_digest(tmp_path) == digest
    assert model_digest(tmp_path, whole=True) != whole
    b.rename(tmp_path / "c.safetensors")
    assert model_digest(tmp_path) != digest


def test_who_waits_for_a_lock_says_so_and_does_not_wait_for_ever(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(files, "REPORTED", 0.1)
    monkeypatch.setattr(files, "LONGEST_WAIT", 0.3)
    with files.lock(tmp_path / ".lock", wait=True), pytest.raises(TimeoutError, match="another process holds it"):
        files.lock(tmp_path / ".lock", wait=True)
    assert caplog.text.count("waiting for another process") == 1
    files.lock(tmp_path / ".lock", wait=True).close()
