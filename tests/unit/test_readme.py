"""What the README says can be typed: every command's flags exist, every path it names is there, every recipe too."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT

from clips.recipes import RECIPES

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [
    line.split("  #")[0].strip()
    for block in BLOCKS
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip() and not line.startswith("#")
]


def test_the_readme_has_commands() -> None:
    assert len(COMMANDS) > 10


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_is_accepted_by_its_script(command: str) -> None:
    words = shlex.split(command)
    script = next(i for i, word in enumerate(words) if word.startswith("scripts/"))
    path = ROOT / words[script]
    assert path.is_file(), f"{words[script]} is not in the repository"
    if path.suffix == ".py":
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if "--help" in words:
            assert module.parser().format_help()
            return
        flags = module.parser().parse_args(words[script + 1 :])  # SystemExit where a flag is unknown
        assert getattr(flags, "recipe", "demo") in RECIPES
        config = getattr(flags, "ds_config", None)
        assert config is None or (ROOT / config).is_file()


def test_the_tree_names_files_that_exist() -> None:
    (tree,) = re.findall(r"```\n(clips/ .*?)```", README, flags=re.DOTALL)
    named = re.findall(r"\b(\w+\.py)\b", tree)
    assert len(named) > 20
    missing = [name for name in named if not any(list(Path(ROOT, part).rglob(name)) for part in ("clips", "mllm"))]
    assert not missing


def test_every_module_is_in_the_tree() -> None:
    modules = {path.name for part in ("clips", "mllm") for path in (ROOT / part).glob("*.py")}
    modules -= {"__init__.py", "errors.py", "cli.py"}
    assert {name for name in modules if name not in README} == set()


def test_every_recipe_is_in_the_readme() -> None:
    assert {name for name in RECIPES if not re.search(rf"\b{name}\b", README)} == set()
