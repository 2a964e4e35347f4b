"""Odd files, targets and terminals end a command with one line: no traceback, no wait, no leftover."""

from __future__ import annotations

import errno
import fcntl
import io
import logging
import os
import runpy
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import psutil
import pytest
import torch
from conftest import ROOT

from clips.common import rundir, signals
from clips.common.errors import UserError, run_command
from clips.common.files import DEEPEST, check_target, from_json, read_json, read_json_records
from clips.common.tensors import write_weights
from clips.config import Fields
from clips.data.sources import expand, open_source
from clips.data.table import LONGEST_ROW, Table
from clips.data.tar import shard_summary
from mllm.data.questions import read_questions

FIELDS = Fields(image="png", web="web", long="txt")
RED = "\x1b[31m"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPS_MLLM_CACHE", str(tmp_path / "cache"))


def write_tar(path: Path, *names: str) -> Path:
    with tarfile.open(path, "w") as tar:
        for name in names or ("0.png", "0.web", "0.txt"):
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
    return path


# ------------------------------------------------------------------------------------------------- files that are read


def test_row_31_json_that_is_too_deep_or_no_object_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    assert from_json("[" * DEEPEST + "]" * DEEPEST)
    for text in ("[" * 100_000, "[" * 500 + "]" * 500, "{", "[]", "\xff"):
        path.write_bytes(text.encode("latin-1"))
        with pytest.raises(UserError, match=r"x\.json is damaged, it "):
            read_json(path)


@pytest.mark.parametrize("name", ["x.tar", "x.csv", "x.jsonl", "x.parquet"])
def test_row_31_a_pipe_is_refused_and_not_waited_for(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=r"not a regular file|no data at"):
        open_source(str(tmp_path / name), FIELDS, need_long=True)
    if name == "x.jsonl":
        for read in (read_json_records, read_questions):
            with pytest.raises(UserError, match="not a regular file"):
                read(tmp_path / name)


def test_a_file_that_is_no_llava_data_is_named_without_an_errno(tmp_path: Path) -> None:
    (tmp_path / "my.csv").write_text("image,caption\n")
    for path, said in (("align.json", "cannot be read: No such file or directory; give"), ("my.csv", "is not JSON")):
        with pytest.raises(UserError, match=said) as caught:
            read_json_records(tmp_path / path)
        assert "Errno" not in str(caught.value)


def test_row_31_names_with_separators_odd_bytes_and_great_length_are_names(tmp_path: Path) -> None:
    """`;` and `{…}` of a file that is there, a name that is no UTF-8, and the longest name."""
    names = ["a;b.tar", "{a,b}.tar", "\udcff.tar", "x" * 250 + ".tar"]
    for name in names:
        path = str(write_tar(tmp_path / name))
        assert expand(path) == [path]
        assert open_source(path, FIELDS, need_long=True).read(0).web == "abc"


def test_row_31_a_damaged_index_is_made_again(tmp_path: Path) -> None:
    url = str(write_tar(tmp_path / "0.tar"))
    index = shard_summary(url).index
    whole = index.read_bytes()
    for damaged in (b"", whole[:40], whole[:-5], b"\xff" * len(whole)):
        index.write_bytes(damaged)
        assert shard_summary(url).layouts == {("png", "txt", "web"): 1}
        assert index.read_bytes() == whole


def test_row_31_a_row_that_is_too_long_is_named_by_its_place(tmp_path: Path) -> None:
    rows = ["image,web", *["a.png,words"] * 3, "b.png," + "x" * (2 * LONGEST_ROW), "c.png,words"]
    (tmp_path / "t.csv").write_text("\n".join(rows), encoding="utf-8")
    with pytest.raises(UserError, match=r"t\.csv: a row behind row \d+ has more than 4,194,304 bytes"):
        Table(str(tmp_path / "t.csv"))


# ------------------------------------------------------------------------------------------------- targets, terminals


def test_row_32_a_target_is_asked_for_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    for target in (tmp_path / "file" / "out", Path("/proc/out"), tmp_path / ("x" * 300)):
        with pytest.raises(UserError, match="nothing can be written to"):
            check_target(target)
    check_target(tmp_path / "not" / "there")
    assert not (tmp_path / "not").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["scripts/convert.py", "no-model", "TARGET", "--to", "native"],
        ["scripts/export_clips.py", "--model", "no-model", "--output", "TARGET"],
        ["scripts/recaption.py", "--data", "no-data", "--captioner", "hf:no-model", "--output", "TARGET"],
        ["tools/make_pictures.py", "answers", "--model", "no-model", "--output", "TARGET/x.png"],
    ],
)
def test_a_command_asks_for_its_target_before_its_model(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [word.replace("TARGET", "file/out") for word in words])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(ROOT / words[0]), run_name="__main__")
    assert "nothing can be written to file/out" in capsys.readouterr().err


def test_row_32_what_the_system_refuses_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise OSError(errno.EMFILE, "Too many open files", "/a/file")

    assert run_command(main) == 1
    error = capsys.readouterr().err
    assert "error: OSError: [Errno 24] Too many open files: '/a/file', at" in error
    assert "Traceback" not in error


def test_row_32_warnings_reach_a_terminal_without_escape_sequences(capfd: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        record = logging.LogRecord("clips.data", logging.WARNING, "", 0, "member %s", (RED,), None)
        logging.lastResort.handle(record)

    assert run_command(main) == 0
    assert capfd.readouterr().err == "member \ufffd[31m\n"


def test_row_32_a_terminal_that_knows_ascii_alone_gets_the_text(tmp_path: Path) -> None:
    code = "from clips.common.errors import run_command; run_command(lambda: print('1 ± 2'))"
    env = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1 \\xb1 2\n", "")


def test_weights_have_the_mode_of_other_files(tmp_path: Path) -> None:
    write_weights({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    (tmp_path / "b").write_text("", encoding="utf-8")
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "b").stat().st_mode


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"pid": 1, "host": 2, "launchers": 3}', "[" * 100_000])
def test_row_33_an_odd_lock_is_a_lock(tmp_path: Path, text: str) -> None:
    """Whatever it holds; a folder of its name is said."""
    with (tmp_path / ".lock").open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process trains in"):
            rundir.hold(tmp_path)
    (tmp_path / ".lock").unlink()
    (tmp_path / ".lock").mkdir()
    with pytest.raises(UserError, match=r"\.lock cannot be locked: Is a directory"):
        rundir.hold(tmp_path)


# ------------------------------------------------------------------------------------------------- launchers


def test_row_34_a_rank_ends_if_its_launcher_is_gone_before_the_training(tmp_path: Path) -> None:
    """At once, not after the timeout of the first collective."""
    rank = (
        "import time; from clips.common.signals import end_with_launcher; end_with_launcher(); "
        "print('up', flush=True); time.sleep(60)"
    )
    launcher = (
        f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', {rank!r}]).pid, flush=True); input()"
    )
    env = os.environ | {"TORCHELASTIC_RUN_ID": "x", "PYTHONPATH": str(ROOT)}
    started = subprocess.Popen(
        [sys.executable, "-c", launcher], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    process_id = int(started.stdout.readline())
    assert started.stdout.readline() == "up\n"
    started.send_signal(signal.SIGKILL)
    started.wait()
    end = time.monotonic() + 10
    while psutil.pid_exists(process_id) and psutil.Process(process_id).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end
        time.sleep(0.05)


def test_row_34_a_launcher_that_was_gone_before_this_rank_looked_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """init adopts the rank; a launcher that is itself the first process of a container is none that is gone."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setattr(os, "getppid", lambda: 1)
    for line, lost in (["/sbin/init"], True), (["/usr/bin/python", "/usr/bin/torchrun", "x.py"], False):
        monkeypatch.setattr(psutil.Process, "cmdline", lambda _, line=line: line)
        assert signals.has_lost(signals.launchers()) == lost
