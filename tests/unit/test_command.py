"""Commands: what they print can be pasted and piped; a wrong flag names the nearest."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run_group

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
