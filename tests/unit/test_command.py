"""Commands: what they print can be pasted and piped; a wrong flag names the nearest."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_group, run_python
from lab_runs import run_main

from clips.common import rundir
from clips.common.files import write_json
from clips.recipes import debug_twin, recipe
from clips.weights.load import _newest_run, newest_export


@pytest.mark.slow
def test_the_package_brings_its_templates(tmp_path: Path) -> None:
    """As `pip install .` puts it somewhere without the repository."""
    source, target = tmp_path / "source", tmp_path / "target"
    for name in ("clips", "mllm"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", target]
    installed = run_group([*map(str, pip), str(source)], timeout=300)
    assert installed.returncode == 0, installed.stderr
    templates = [path.relative_to(ROOT) for part in ("clips", "mllm") for path in (ROOT / part).rglob("templates/*")]
    assert templates
    assert [path for path in templates if not (target / path).is_file()] == []


PRINTS = """
import sys
from clips.common.errors import run_command
def main():
    for _ in range(100_000):
        print("a line of a table")
sys.exit(run_command(main))
"""


def test_a_reader_that_ends_early_is_no_traceback() -> None:
    """As in `| head -c 1`."""
    command = subprocess.Popen(
        [sys.executable, "-c", PRINTS], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    with command:
        command.stdout.read(1)
        command.stdout.close()
        assert command.stderr.read() == b""
        assert command.wait(60) in (0, 128 + signal.SIGPIPE)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_its_tests_are_named_and_no_success() -> None:
    done = run_python("-m", "pytest", "-q", ROOT / "tests" / "gpu")
    assert done.returncode == 5  # nothing collected
    assert "files NOT RUN, torch sees no GPU here" in done.stdout


def test_a_debug_run_is_never_the_newest_encoder(tmp_path: Path) -> None:
    """Its configuration says so; the name says nothing."""
    for name, run, time in (("my-debug", recipe("demo"), 1), ("twin", debug_twin(recipe("demo")), 2)):
        (tmp_path / name / "export" / "hf_vit").mkdir(parents=True)
        run.save(tmp_path / name / "config.json")
        for file in ("LATEST", "export/hf_vit/config.json"):
            write_json(tmp_path / name / file, {})
            os.utime(tmp_path / name / file, (time, time))
    assert _newest_run(tmp_path) == tmp_path / "my-debug"
    assert newest_export(tmp_path, "clips") == tmp_path / "my-debug" / "export"


ENCODER, MODEL = "the newest encoder: runs/mine", "the newest model: runs/chat/model"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("search cat", ENCODER),
        (
            "train_llava --stage 1 --vision clips --data_path x.json --dry_run",
            "the newest clips encoder: runs/mine/export",
        ),
        ("evaluate_llava --questions x.jsonl", MODEL),
    ],
)
def test_what_is_taken_as_the_newest_is_named_before_any_work(
    command: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each then ends at what is missing in its model: nothing else was asked for before."""
    monkeypatch.chdir(tmp_path)
    for path, content in (
        ("mine/config.json", {"task": {"objective": "clips"}, "model": {"captioner": {"inputs": "tokens"}}}),
        ("mine/export/native/config.json", {}),
        ("mine/export/hf_vit/config.json", {}),
        ("chat/model/config.json", {}),
    ):
        (tmp_path / "runs" / path).parent.mkdir(parents=True)
        write_json(tmp_path / "runs" / path, content)
    rundir._say_taken.cache_clear()
    name, *words = command.split()
    assert run_main(monkeypatch, name, *words) == 2
    told, _, error = capfd.readouterr().err.partition("\nerror: ")
    assert told == f"{said}\n"
    assert error
