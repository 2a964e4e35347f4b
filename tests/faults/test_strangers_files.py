"""Rows 29 to 31: wrong model directories, odd files and targets, a launcher that is gone."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from conftest import ROOT
from lab_runs import run_main
from serve_process import write_models

from clips.common import rundir, signals
from clips.common.errors import UserError, run_command
from clips.common.files import check_target, read_json, read_json_records
from clips.common.paths import cache_root
from clips.common.tensors import write_weights
from clips.config import Fields
from clips.data.dataset import open_data
from clips.data.importing.layouts import expand
from clips.data.tokenizer import build_tokenizer
from clips.weights.export import export_all
from clips.weights.load import load_model
from mllm.chat.model import ChatModel
from mllm.encoders.load import load_vision

MOST_MB = 400
"""Memory that all wrong configurations of one directory may take."""
BROKEN = ("[" * 100_000, "[]", "null", "{", "{}")
LOADERS: dict[str, tuple[str, str, Callable[[Path], object]]] = {
    "native": ("export/native", "config.json", load_model),
    "open_clip": ("export/open_clip", "open_clip_config.json", load_model),
    "hf": ("export/hf_vit", "config.json", lambda place: load_vision(f"hf:{place}")),
    "llava": ("runs/llava/model", "config.json", lambda place: ChatModel.load(str(place), device="cpu")),
}
"""Loader → a good directory, its configuration, how it is opened."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    write_models(root, context=256)
    loaded = load_model(root / "runs/clips-demo")
    size = loaded.model.visual.image_size
    export_all(loaded.model, loaded.run, loaded.tokenizer, root / "export", torch.randn(2, 3, size, size), ["a", "b"])
    return root


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def enlarged(config: Any, pattern: str) -> Any:
    """The configuration with a million in place of every whole number whose name matches."""
    if isinstance(config, dict):
        fits = {name for name, value in config.items() if isinstance(value, int) and re.fullmatch(pattern, name)}
        return {name: 10**6 if name in fits else enlarged(value, pattern) for name, value in config.items()}
    return config


@pytest.mark.parametrize("loader", LOADERS)
def test_row_29_layers_and_sizes_are_bounded_before_memory_is_taken(loader: str, place: Path, tmp_path: Path) -> None:
    source, name, load = LOADERS[loader]
    path = shutil.copytree(place / source, tmp_path / "model") / name
    config, before = json.loads(path.read_text()), peak_mb()
    for pattern in ("layers|num_hidden_layers", "width|hidden_size", "vocab_size|image_size"):
        text = json.dumps(enlarged(config, pattern))
        assert "1000000" in text
        path.write_text(text)
        with pytest.raises(UserError):
            load(path.parent)
    for text in BROKEN:
        path.write_text(text)
        with pytest.raises(UserError):
            load(path.parent)
    assert peak_mb() - before < MOST_MB


def test_row_30_json_that_is_too_deep_or_no_object_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for text in ("[" * 100_000, "{", "[]", "\xff"):
        path.write_bytes(text.encode("latin-1"))
        with pytest.raises(UserError, match=r"x\.json is damaged"):
            read_json(path)


@pytest.mark.parametrize("name", ["x.tar", "x.csv", "x.jsonl"])
def test_row_30_a_pipe_is_refused_and_not_waited_for(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=r"not a regular file|no data at"):
        open_data(str(tmp_path / name), Fields(image="png", web="web", long="txt"), need_long=True)
    with pytest.raises(UserError, match="not a regular file"):
        read_json_records(tmp_path / name)


def test_row_30_odd_names_are_names(tmp_path: Path) -> None:
    for name in ("a;b.tar", "{a,b}.tar", "\udcff.tar", "x" * 250 + ".tar"):
        (tmp_path / name).write_bytes(b"")
        assert expand(str(tmp_path / name)) == [str(tmp_path / name)]


def test_row_30_a_target_is_asked_for_before_any_work(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("", encoding="utf-8")
    for target in (tmp_path / "file" / "out", Path("/proc/out"), tmp_path / ("x" * 300)):
        with pytest.raises(UserError, match="nothing can be written to"):
            check_target(target)
    check_target(tmp_path / "not" / "there")
    assert not (tmp_path / "not").exists()
    assert run_main(monkeypatch, "export_clips", "--model", "no-model", "--output", tmp_path / "file" / "out") == 2
    assert "nothing can be written" in capsys.readouterr().err


def test_row_30_weights_and_a_tokenizer_that_cannot_be_written_are_one_line(tmp_path: Path) -> None:
    """The libraries that write them have errors of their own."""
    with pytest.raises(OSError, match=r"x\.safetensors"):
        write_weights({"a": torch.ones(1)}, tmp_path / "no" / "x.safetensors")
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(OSError, match=r"tokenizer\.json"):
        build_tokenizer("wordpiece", ["a cat"], vocab_size=64).save(tmp_path)


def test_row_30_a_terminal_that_knows_ascii_alone_gets_the_text() -> None:
    code = "from clips.common.errors import run_command; run_command(lambda: print('1 ± 2'))"
    env = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1 \\xb1 2\n", "")


def test_row_30_a_cache_that_cannot_be_made_names_its_variable(tmp_path, monkeypatch, capsys):
    """As with a HOME that nobody may write."""
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.delenv("CLIPS_MLLM_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert run_command(lambda: (cache_root() / "search").mkdir(parents=True)) == 1
    assert "CLIPS_MLLM_CACHE" in capsys.readouterr().err


def test_row_30_an_odd_lock_is_a_lock(tmp_path: Path) -> None:
    (tmp_path / ".lock").mkdir()
    with pytest.raises(UserError, match=r"\.lock cannot be locked"):
        rundir.hold(tmp_path)


def test_row_31_a_rank_ends_if_its_launcher_is_gone_before_the_training() -> None:
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


def test_row_31_a_launcher_that_was_gone_before_this_rank_looked_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """init adopts the rank; a launcher that is itself the first process of a container is none that is gone."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setattr(os, "getppid", lambda: 1)
    for line, lost in (["/sbin/init"], True), (["/usr/bin/python", "/usr/bin/torchrun", "x.py"], False):
        monkeypatch.setattr(psutil.Process, "cmdline", lambda _, line=line: line)
        assert signals.has_lost(signals.launchers()) == lost
