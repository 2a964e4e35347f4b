"""What every script and settings file keeps to, and what the installer says on a machine that lacks something."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

PYTHON_SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))
SHELL_SCRIPTS = [*sorted((ROOT / "scripts").glob("*.sh")), ROOT / ".ci" / "run"]
DS_CONFIGS = sorted((ROOT / "ds_configs").glob("*.json"))
HEAVY = {"torch", "transformers", "deepspeed", "open_clip", "numpy", "PIL", "gradio", "fastapi", "matplotlib"}


def named(paths: list[Path]) -> list:
    return [pytest.param(path, id=path.name) for path in paths]


# ---------------------------------------------------------------------------------------------------- Python scripts


@pytest.mark.parametrize("script", named(PYTHON_SCRIPTS))
def test_a_script_is_thin(script: Path) -> None:
    """At most 40 lines, the list of flags not counted."""
    text = script.read_text()
    without_flags = re.sub(r"\ndef parser\(\).*?\n    return p\n", "\n", text, flags=re.DOTALL)
    assert len(without_flags.splitlines()) <= 40


@pytest.mark.parametrize("script", named(PYTHON_SCRIPTS))
def test_help_is_quick_and_imports_nothing_heavy(script: Path) -> None:
    """`--help`, and so a wrong flag, answers without importing what takes seconds."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", script, "--help"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "usage:" in done.stdout
    assert "default" in done.stdout
    imported = set(re.findall(r"^import time:.*\|\s+(\w+)$", done.stderr, flags=re.MULTILINE))
    assert "argparse" in imported
    assert not imported & HEAVY


@pytest.mark.parametrize("script", named([path for path in PYTHON_SCRIPTS if "def parser(" in path.read_text()]))
def test_help_shows_each_default(script: Path) -> None:
    """Of the scripts that list their flags themselves (train_llava.py takes them from a dataclass)."""
    spec = importlib.util.spec_from_file_location(f"script_{script.stem}", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    parser = module.parser()
    for action in parser._actions:
        if action.help == argparse.SUPPRESS or action.default in (None, False, [], argparse.SUPPRESS):
            continue
        entry = parser._get_formatter()
        entry.add_argument(action)
        default = " ".join(map(str, action.default)) if isinstance(action.default, tuple) else action.default
        assert f"default: {default}" in " ".join(entry.format_help().split()), action.option_strings


# ------------------------------------------------------------------------------------------------------ settings, text


@pytest.mark.parametrize("path", named(DS_CONFIGS))
def test_a_ds_config_holds_engine_settings_only(path: Path) -> None:
    """Batch, precision, optimizer and clipping come from the run; the Trainer's files leave them to it by "auto"."""
    config = json.loads(path.read_text())
    zero = config.pop("zero_optimization")
    assert f"zero{zero['stage']}" in path.stem
    assert ("offload_optimizer" in zero) == path.stem.endswith("offload")
    assert all(value in ("auto", {"enabled": "auto"}) for value in config.values())
    assert "optimizer" not in config
    assert "scheduler" not in config


def test_no_file_names_a_machine_or_a_registry() -> None:
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    machine = r"(?<![\w.}])/(?:home|Users)/\w+/|(?<![\w.}])/root/\.|(?<![\w.}])/work/|/opt/wheels"
    registry = r"pypi\.org|pythonhosted\.org|download\.pytorch\.org|--(?:extra-)?index-url|:\d+/simple\b"
    found = []
    for name in listing.splitlines():
        path = ROOT / name
        if path != Path(__file__) and path.is_file():
            text = path.read_text(errors="replace")
            found += [f"{name}: {match.group()}" for match in re.finditer(f"{machine}|{registry}", text)]
    assert not found


# ------------------------------------------------------------------------------------------------------ shell scripts


@pytest.mark.parametrize("script", named(SHELL_SCRIPTS))
def test_a_shell_script_parses_and_stops_at_errors(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    if script.name != "install.sh":  # sourced into the others
        assert "\nset -euo pipefail\n" in script.read_text()


def test_shellcheck_is_content() -> None:
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([shellcheck, "-x", *SHELL_SCRIPTS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def install(venv: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", f'set -euo pipefail; . "{ROOT}/scripts/install.sh"; install demo'],
        env={**os.environ, "VENV": str(venv), **env},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=120,
    )


def executable(path: Path, body: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)
    return path


def test_install_names_a_python_that_is_too_old(tmp_path: Path) -> None:
    old = executable(tmp_path / "bin" / "python3", 'if [ "$1" = --version ]; then echo Python 3.9.2; else exit 1; fi')
    done = install(tmp_path / "venv", PYTHON=str(old))
    assert done.returncode == 2
    assert "Python 3.10 or newer is needed" in done.stderr
    assert "Python 3.9.2" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_install_names_a_missing_venv_module(tmp_path: Path) -> None:
    bare = executable(tmp_path / "bin" / "python3", '[[ "$*" != *ensurepip* ]]')
    done = install(tmp_path / "venv", PYTHON=str(bare))
    assert done.returncode == 2
    assert "python3-venv" in done.stderr


def test_install_names_a_full_disk(tmp_path: Path) -> None:
    executable(tmp_path / "bin" / "df", "echo Filesystem; echo /dev/x 9000000 8000000 1000000 90% /")
    done = install(tmp_path / "venv", PATH=f"{tmp_path}/bin{os.pathsep}{os.environ['PATH']}", PYTHON=sys.executable)
    assert done.returncode == 2
    assert "1 GB free" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_install_leaves_a_folder_with_other_things_alone(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("mine")
    done = install(tmp_path, PYTHON=sys.executable)
    assert done.returncode == 2
    assert "VENV=DIR" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


@pytest.mark.slow
def test_install_says_when_pip_reaches_nothing(tmp_path: Path) -> None:
    done = install(tmp_path / "venv", PIP_NO_INDEX="1", PIP_FIND_LINKS=str(tmp_path), PYTHON=sys.executable)
    assert done.returncode == 2
    assert "pip cannot fetch packages" in done.stderr
    assert "PIP_INDEX_URL" in done.stderr


def test_physical_cores() -> None:
    done = subprocess.run(
        ["bash", "-c", f'. "{ROOT}/scripts/install.sh"; physical_cores'],
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert 1 <= int(done.stdout) <= os.cpu_count()
