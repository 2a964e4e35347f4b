"""What every script and settings file keeps to, and what the installer says on a machine that lacks something."""

from __future__ import annotations

import argparse
import ast
import json
import os
import pkgutil
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, script_parser

from clips.common.flags import Parser
from clips.data import guess
from clips.weights import export
from mllm.data import captions as llava_captions
from mllm.training.arguments import parser as llava_parser

PYTHON_SCRIPTS = sorted(set((ROOT / "scripts").glob("*.py")) - {ROOT / "scripts" / "__main__.py"})
SHELL_SCRIPTS = [*sorted((ROOT / "scripts").glob("*.sh")), ROOT / ".ci" / "run"]
DS_CONFIGS = sorted((ROOT / "ds_configs").glob("*.json"))
FLAGS = ROOT / "tests" / "data" / "flags.json"
HEAVY = {"torch", "transformers", "deepspeed", "open_clip", "numpy", "PIL", "gradio", "fastapi", "matplotlib"}


def named(paths: list[Path]) -> list:
    return [pytest.param(path, id=path.name) for path in paths]


# ---------------------------------------------------------------------------------------------------- Python scripts


HELP = """
import runpy, sys
for script in sys.argv[1:]:
    sys.argv = [script, "--help"]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as ended:
        assert not ended.code, (script, ended.code)
    print("HEAVY", script, *HEAVY & sys.modules.keys())
"""


def parsers_of(script: Path) -> dict[str, argparse.ArgumentParser]:
    """The parser of a script under "", and those of its subcommands under their names."""
    top = llava_parser() if script.stem == "train_llava" else script_parser(script.stem)
    below = [action.choices for action in top._actions if isinstance(action, argparse._SubParsersAction)]
    return {"": top} | (below[0] if below else {})


def shown_of(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    """The help of one flag as it is printed, in one line."""
    entry = parser._get_formatter()
    entry.add_argument(action)
    return " ".join(entry.format_help().split())


def test_help_imports_nothing_heavy() -> None:
    """`--help`, and so a wrong flag, answers without importing what takes seconds."""
    done = subprocess.run(
        [sys.executable, "-c", HELP.replace("HEAVY &", f"{HEAVY} &"), *PYTHON_SCRIPTS],
        capture_output=True, text=True, timeout=120, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    heavy = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("HEAVY ")]
    assert heavy == [[str(script)] for script in PYTHON_SCRIPTS]
    assert done.stdout.count("usage:") == len(PYTHON_SCRIPTS)


@pytest.mark.parametrize("script", named(PYTHON_SCRIPTS))
def test_every_flag_has_one_spelling_and_prints_one_default(script: Path) -> None:
    for parser in parsers_of(script).values():
        assert isinstance(parser, Parser)
        assert not parser.allow_abbrev
        for action in parser._actions:
            names = [name for name in action.option_strings if name.startswith("--")]
            if action.help == argparse.SUPPRESS or names == ["--help"]:
                continue
            assert len(names) <= 1 or names == ["--vision_tower", "--vision"], names
            assert script.stem == "train_llava" or not any("_" in name for name in names), names
            if names and not action.required:
                assert shown_of(parser, action).count("(default: ") == 1, shown_of(parser, action)


def test_the_function_that_a_script_names_is_there() -> None:
    found = re.findall(r'start\(parser, "([\w.:]+)"\)', "".join(script.read_text() for script in PYTHON_SCRIPTS))
    assert len(found) >= 9
    assert all(callable(pkgutil.resolve_name(function)) for function in found)


def flags_of(script: Path) -> dict[str, object]:
    """Flag → its default, of a script and of its subcommands."""
    found = {}
    for name, parser in parsers_of(script).items():
        for action in parser._actions:
            if action.help != argparse.SUPPRESS and action.dest != "help":
                flag = action.option_strings[-1] if action.option_strings else action.dest.upper()
                of_machine = flag in ("--their-python", "--jobs") and action.default in (sys.executable, os.cpu_count())
                found[f"{name} {flag}".strip()] = "this machine's" if of_machine else action.default
    return json.loads(json.dumps(found, default=str))


@pytest.mark.parametrize("script", named(PYTHON_SCRIPTS))
def test_the_flags_and_their_defaults_are_frozen(script: Path) -> None:
    """A change here is a change of the commands that people use; `python tests/unit/test_scripts.py` writes it down."""
    frozen = json.loads(FLAGS.read_text())
    assert sorted(frozen) == [path.stem for path in PYTHON_SCRIPTS]
    assert flags_of(script) == frozen[script.stem]


@pytest.mark.parametrize(
    ("script", "flags"),
    [("pretrain_clips", guess.FLAGS), ("check_data", guess.FLAGS), ("recaption", guess.FLAGS),
     ("evaluate_clips", guess.FLAGS), ("export_clips", export.FLAGS), ("train_llava", llava_captions.FLAGS)],
)  # fmt: skip
def test_a_guess_names_the_flags_of_its_command(script: str, flags: guess.GuessFlags) -> None:
    """export_clips.py advised `--image-root`, which it does not have."""
    known = parsers_of(ROOT / "scripts" / f"{script}.py")[""]._option_string_actions.keys()
    assert {flags.image_root, flags.fields} - {""} == known & {"--image-root", "--image_folder", "--fields"}


OF_OTHERS = {
    *("--help", "--align", "--instruct", "--both_stages"),  # train_llava.py reads these itself
    *(
        "--max-restarts",
        "--hostfile",
        "--dereference",
        "--no-deps",
        "--tasks",
    ),  # torchrun, deepspeed, tar, pip, lmms-eval
    *("--model-path", "--model-base", "--image-file"),  # LLaVA
}
"""Flags in messages that are no script's own."""


def test_each_flag_that_a_message_names_is_there() -> None:
    known = {
        flag for script in PYTHON_SCRIPTS for p in parsers_of(script).values() for flag in p._option_string_actions
    }
    known |= {flag.replace("_", "-") for flag in known} | OF_OTHERS
    for path in [*(ROOT / "clips").rglob("*.py"), *(ROOT / "mllm").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
                named = set(re.findall(r"(?<![\w(-])--[a-z0-9][a-z0-9_-]*(?=[\s,.:;)`]|$)", node.value))
                assert named <= known, (path, node.lineno, named - known)


# ------------------------------------------------------------------------------------------------------ settings, text


@pytest.mark.parametrize("path", named(DS_CONFIGS))
def test_a_ds_config_holds_engine_settings_only(path: Path) -> None:
    """Batch, precision, optimizer and clipping come from the run; the Trainer's files leave them to it by "auto"."""
    config = json.loads(path.read_text(encoding="utf-8"))
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
        assert "\nset -euo pipefail\n" in script.read_text(encoding="utf-8")


LINTERS = {"shellcheck": ["-x", *SHELL_SCRIPTS], "hadolint": ["Dockerfile"]}
if (sys.platform, platform.machine()) != ("linux", "x86_64"):
    del LINTERS["hadolint"]  # its package is for these machines


@pytest.mark.parametrize(("linter", "words"), LINTERS.items())
def test_a_linter_is_content(linter: str, words: list[str]) -> None:
    program = shutil.which(linter, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if program is None:
        pytest.skip(f"{linter} is not installed")
    done = subprocess.run([program, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


MACHINES = {  # what a machine lacks → (a program of it, its body, what the message names)
    "Python": ("python3", "[ $1 = --version ] && echo Python 3.9.2", "Python 3.10 or newer is needed.*Python 3.9.2"),
    "venv": ("python3", '[[ "$*" != *ensurepip* ]]', "python3-venv"),
    "disk": ("df", "echo Filesystem; echo /dev/x 9000000 8000000 1000000 90% /", "1 GB free"),
    "an empty folder": ("letter.txt", "", "VENV=DIR"),
    "packages": ("none", "", "pip cannot fetch packages.*PIP_INDEX_URL"),
}


@pytest.mark.parametrize("lacks", [*list(MACHINES)[:-1], pytest.param("packages", marks=pytest.mark.slow)])
def test_install_names_what_a_machine_lacks(lacks: str, tmp_path: Path) -> None:
    program, body, named = MACHINES[lacks]
    made, venv = tmp_path / "bin" / program, tmp_path / "venv"
    made.parent.mkdir()
    made.write_text(f"#!/usr/bin/env bash\n{body}\n")
    made.chmod(0o755)
    env = os.environ | {"PYTHON": str(made) if program == "python3" else sys.executable, "PIP_NO_INDEX": "1"}
    env |= {"PATH": f"{made.parent}{os.pathsep}{os.environ['PATH']}", "PIP_FIND_LINKS": str(tmp_path)}
    env["VENV"] = str(made.parent if lacks == "an empty folder" else venv)
    done = subprocess.run(
        ["bash", "-c", f'set -euo pipefail; . "{ROOT}/scripts/install.sh"; install demo'],
        env=env, cwd="/", capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert re.search(named, done.stderr, re.DOTALL), done.stderr
    assert lacks == "packages" or not venv.exists()
    assert list(made.parent.iterdir()) == [made]


@pytest.mark.parametrize(
    ("printed", "code", "said"),
    [
        ("CUDA Version: 13.0", 0, "pip's own torch fits"),
        ("CUDA Version: 12.9", 0, "INDEX/cu128"),
        ("CUDA Version: 12.8", 0, "INDEX/cu128"),
        ("CUDA Version: 12.4", 0, "INDEX/cu126"),
        ("CUDA Version: 11.4", 2, "install driver 580 or newer"),
        ("an old driver says nothing of CUDA", 2, "too old"),
        ("has failed: version mismatch'; exit 9 #", 2, "version mismatch.*install NVIDIA's driver again"),
    ],
)
def test_torch_is_chosen_by_the_driver(tmp_path: Path, printed: str, code: int, said: str) -> None:
    fake = tmp_path / "nvidia-smi"
    fake.write_text(f"#!/bin/sh\necho '| NVIDIA-SMI 550.54  {printed}     |'\n")
    fake.chmod(0o755)
    command = f'set -euo pipefail; . "{ROOT}/scripts/install.sh"; choose_torch'
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TORCH_INDEX": "INDEX"}
    done = subprocess.run(["bash", "-c", command], env=env, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert re.search(said, done.stdout + done.stderr, re.DOTALL)
    if "INDEX/" in said:  # without an index the build is named
        done = subprocess.run(["bash", "-c", command], env=env | {"TORCH_INDEX": ""}, capture_output=True, text=True)
        assert (done.returncode, f"torch's build {said[6:]} fits" in done.stderr) == (2, True)


def test_the_dockerfile_is_one() -> None:
    """Each instruction is known, the image runs without root rights, and what it runs is there."""
    text = re.sub(r"(?m)^#.*\n", "", (ROOT / "Dockerfile").read_text()).replace("\\\n", " ")
    lines = [line.split(None, 1) for line in text.splitlines() if line.strip()]
    known = {"FROM", "SHELL", "RUN", "USER", "WORKDIR", "COPY", "ENV", "ENTRYPOINT", "CMD"}
    assert {name for name, _ in lines} <= known
    found = dict(lines)
    assert lines[0][0] == "FROM"
    assert ":" in found["FROM"], "a base without a version changes by itself"
    assert found["USER"] not in ("root", "0")
    assert (ROOT / json.loads(found["CMD"])[0]).is_file()
    build, run = re.findall(r"(?m)^#   (docker .*)$", (ROOT / "Dockerfile").read_text())
    image = build.split()[3]
    assert build == f"docker build -t {image} ."
    assert f'runs:{found["WORKDIR"]}/runs" {image} scripts/' in run
    assert (ROOT / run.split()[-1]).is_file()


if __name__ == "__main__":
    FLAGS.write_text(json.dumps({path.stem: flags_of(path) for path in PYTHON_SCRIPTS}, indent=1) + "\n")
