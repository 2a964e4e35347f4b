"""What README and docs say can be typed and followed: commands parse, links lead on, pictures say how they are made."""

from __future__ import annotations

import argparse
import ast
import functools
import importlib
import re
import runpy
import shlex
from itertools import product
from pathlib import Path

import pytest
from conftest import ROOT, load_script

from clips.common.errors import UserError
from clips.data.demo import CONCEPTS
from clips.recipes import RECIPES
from clips.training.cli import config_from_flags
from mllm.encoders.registry import parse_vision_name
from mllm.training.arguments import parse_train_arguments

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHERS = {"source", "mkdir", "tar", "head", "sha256sum", "vllm", "llama-server"}
OTHERS |= {"ruff", "coverage", "pre-commit", "pip", "tensorboard"}
"""First words of commands that are not this project's."""
PARSERS = {"deepspeed": "deepspeed.launcher.runner", "torchrun": "torch.distributed.run"}
LAUNCHERS = {"python", "srun", "bash", "sbatch", *PARSERS}
COMMAND_SCRIPTS = runpy.run_path(str(ROOT / "scripts" / "__main__.py"))["COMMANDS"]
"""Command of `clips` → its script."""
MAX_IMAGE_BYTES = 200_000


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def prose(text: str) -> str:
    """`text` without its blocks of code."""
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[str]:
    lines = "\n".join(blocks(page.read_text(encoding="utf-8"), "bash")).replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


def inline_commands(page: Path) -> list[str]:
    """Whole commands in the text, as beside tables and under pictures; those with a … are no more than a hint."""
    found = re.findall(
        rf"`((?:{'|'.join(LAUNCHERS)}) [^`]*(?:scripts|tools)/[^`]+)`", prose(page.read_text(encoding="utf-8"))
    )
    return [command for command in found if "…" not in command]


def at(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


COMMANDS = [
    pytest.param(command, id=f"{at(page)}: {command[:60]}")
    for page in PAGES
    for command in dict.fromkeys(commands(page) + inline_commands(page))
]


# ------------------------------------------------------------------------------------------------------ commands


script_module = functools.cache(load_script)
BOTH = ["--both_stages"]


def check_stages(words: list[str], *, own_stage: bool) -> None:
    """The flags of train_llava.sh, read for each stage that it would run."""
    stages = [words[words.index("--stage") + 1]] if "--stage" in words else ["1", "2"]
    for stage in stages:
        arguments = parse_train_arguments(words if own_stage else [*words, "--stage", stage, *BOTH[: len(stages) - 1]])
        parse_vision_name(arguments.vision_tower)
        assert arguments.deepspeed is None or (ROOT / arguments.deepspeed).is_file()


def check_python_script(path: Path, words: list[str]) -> None:
    parser: argparse.ArgumentParser = script_module(path).parser()
    if "--help" in words:
        assert parser.format_help()
        return
    flags = parser.parse_args(words)  # SystemExit where a flag is unknown
    if path.name == "pretrain_clips.py":
        # Recipe, fields and --set are what the run would read; the tower that a size is given for is not here.
        sized = flags.init_from is not None and any("image_size" in text for text in flags.set)
        tower = {"width": 768, "layers": 12, "heads": 12, "image_size": 224, "patch_size": 14}
        assert config_from_flags(flags, {"model.vision": tower} if sized else None).samples > 0
        assert flags.ds_config is None or (ROOT / flags.ds_config).is_file()
    if path.name == "compare_encoders.py":
        for name in flags.encoders or ():
            parse_vision_name(name)
        for stage, further in product(("1", "2"), [(), *dict(flags.variants).values()]):
            parse_train_arguments([*flags.train_flags, *further, "--stage", stage, *BOTH])


def check(command: str) -> None:
    """Raise unless `command` is one that its program accepts."""
    for part in re.split(r"\s+(?:&&|\|)\s+", command):
        words = shlex.split(part)
        if words[0] == "clips":
            script = COMMAND_SCRIPTS[words[1]]
            words = ["bash" if script.endswith(".sh") else "python", f"scripts/{script}", *words[2:]]
        while re.match(r"[A-Z_]+=", words[0]):  # NUM_GPUS=2 bash …
            words = words[1:]
        launcher = words[0]
        if launcher in OTHERS or words[:2] in (["python", "-c"], ["python", "-m"]):
            if words[:3] == ["python", "-m", "pytest"]:
                assert all((ROOT / word).exists() for word in words[3:] if word.startswith("tests/"))
            continue
        assert launcher in LAUNCHERS, f"{launcher} is no program that these pages use"
        script = next(i for i, word in enumerate(words) if word.startswith(("scripts/", "tools/")))
        path, rest = ROOT / words[script], words[script + 1 :]
        assert path.is_file(), f"{words[script]} is not in the repository"
        assert {"bash": ".sh", "sbatch": ".sbatch"}.get(launcher, ".py") == path.suffix
        if launcher == "sbatch":  # hands its words to torchrun
            check(shlex.join(["torchrun", *rest]))
            continue
        if launcher in PARSERS:
            importlib.import_module(PARSERS[launcher]).parse_args(words[1:])
        if path.stem == "search" and any("llava_demo" in word for word in rest):
            assert rest[0].rpartition(" ")[2] in CONCEPTS, f"the demo's pictures show no {rest[0]}"
        if path.stem == "train_llava":
            if "--help" not in rest:
                check_stages(rest, own_stage="--stage" in rest)
        elif path.suffix == ".py":
            check_python_script(path, rest)
        else:
            assert not rest or path.name == "test.sh", f"{path.name} takes no flags"


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_is_accepted(command: str) -> None:
    assert len(COMMANDS) > 60  # the pages are read
    check(command)


@pytest.mark.parametrize(
    "command",
    [
        "python scripts/pretrain_clips.py --set model.vision.no_such_field=1",
        "deepspeed --no_such_flag 2 scripts/pretrain_clips.py",
        "deepspeed scripts/pretrain_clips.py --ds-config ds_configs/zero9.json",
        "bash scripts/train_llava.sh --vision no-such-encoder",
        "python scripts/compare_encoders.py --train-flags '--no_such_flag 1'",
        "python scripts/no_such_script.py",
        "bash scripts/quickstart.sh --fast",
        "conda install clips",
        "python scripts/search.py 'two dogs' --pictures data/llava_demo/images",
    ],
)
def test_a_wrong_command_is_found(command: str) -> None:
    with pytest.raises((SystemExit, UserError, AssertionError)):
        check(command)


# ------------------------------------------------------------------------------------------------------ links, names


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page.read_text(encoding="utf-8")), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> list[str]:
    found = re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text(encoding="utf-8")))
    return [link for link in found if not re.match(r"https?://|mailto:", link)]


@pytest.mark.parametrize("page", [pytest.param(page, id=at(page)) for page in PAGES])
def test_links_paths_and_names_in_a_page_exist(page: Path) -> None:
    for link in links(page):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.is_relative_to(ROOT), link
        assert target.is_file(), f"{at(page)}: {link} is not there"
        assert not anchor or anchor in anchors(target), f"{at(page)}: {link}: no such heading in {at(target)}"
    if page.name == "CHANGELOG.md":  # it speaks of what has left
        return
    text = prose(page.read_text(encoding="utf-8"))
    named = re.findall(r"`((?:clips|mllm|scripts|tools|tests|ds_configs|docs)/[\w./-]*)`", text)
    assert [name for name in named if not (ROOT / name).exists()] == []
    used = [] if page.name == "CHANGELOG.md" else re.findall(r"`((?:clips|mllm)(?:\.\w+)+)", text)
    names = [tuple(name.rsplit(".", 1)) for name in used]
    for block in blocks(page.read_text(encoding="utf-8"), "python"):
        froms = [node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.ImportFrom)]
        names += [(node.module, alias.name) for node in froms for alias in node.names]
    for module, name in names:
        if module.split(".")[0] in ("clips", "mllm"):
            assert hasattr(importlib.import_module(module), name), f"{module}.{name}"


def test_every_page_and_every_recipe_is_listed() -> None:
    listed = {"index.md", *links(ROOT / "docs" / "index.md")}
    pages = {page.name for page in (ROOT / "docs").glob("*.md")}
    assert pages <= listed
    text = (ROOT / "docs" / "training.md").read_text()
    assert [name for name in RECIPES if f"`{name}`" not in text] == []


# ------------------------------------------------------------------------------------------------------ the README


def test_the_first_screen_shows_the_command_and_a_picture_and_code_lines_fit() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 130
    code = "".join(re.findall(r"^```\w*\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE))
    assert [line for line in code.splitlines() if len(line) > 95] == []
    first = text[: text.index("\n## ")]
    assert first.index("bash scripts/quickstart.sh") < first.index("![")


def test_the_tree_names_the_rooms() -> None:
    (tree,) = re.findall(r"^```\n(clips/ .*?)^```", (ROOT / "README.md").read_text(), flags=re.DOTALL | re.MULTILINE)
    for line in tree.splitlines():
        top, *rooms = re.findall(r"(?<!\S)(\w+)/(?=[\s,;:]|$)", line)
        assert (ROOT / top).is_dir()
        assert all((ROOT / top / room).is_dir() for room in rooms)
        if top in ("clips", "mllm"):  # a room that the tree leaves out
            assert {path.parent.name for path in (ROOT / top).glob("*/__init__.py")} == set(rooms)


# ------------------------------------------------------------------------------------------------------ pictures


def images(page: Path) -> list[tuple[Path, str]]:
    """(file, the text beneath it) of every picture of a page."""
    found = re.findall(r"^!\[[^\]]+\]\(([^)]+)\)\n\n(.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(found) == len(re.findall(r"!\[", page.read_text(encoding="utf-8"))), (
        f"{at(page)}: a picture without a text beneath"
    )
    return [((page.parent / name).resolve(), text) for name, text in found]


def test_each_picture_is_small_and_says_how_it_is_made() -> None:
    shown = {file for page in PAGES for file, _ in images(page)}
    assert set((ROOT / "docs" / "images").iterdir()) == shown  # none that no page shows, none that is not there
    for file in shown:
        assert file.suffix in (".png", ".svg")
        assert file.stat().st_size < MAX_IMAGE_BYTES
    for page in PAGES:
        for file, text in images(page):
            assert re.search(r"`[^`]*\w+\.py", text), file


# ------------------------------------------------------------------------------------------------------ faults


def test_all_rows_of_the_faults_are_tests_and_listed() -> None:
    rows = re.findall(r"^\| (\d+) \|.*\|(.*)\|$", (ROOT / "docs" / "faults.md").read_text(), flags=re.MULTILINE)
    listed = {int(number): set(re.findall(r"`(test_row_\w+)`", tests)) for number, tests in rows}
    found: dict[int, set[str]] = {}
    for file in (ROOT / "tests" / "faults").glob("test_*.py"):
        for name, number in re.findall(r"^def (test_row_(\d+)_\w+)\(", file.read_text(), re.MULTILINE):
            found.setdefault(int(number), set()).add(name)
    assert sorted(listed) == list(range(1, 35))
    assert listed == found


def test_each_walk_of_the_design_leads_through_at_most_eight_files_that_hold_its_names() -> None:
    page = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    walks = re.findall(r"^## (?:How|What) .*?(?=^## )", page, flags=re.DOTALL | re.MULTILINE)
    assert len(walks) == 3
    for walk in walks:
        files = set(re.findall(r"`([\w/]+\.py)`", walk))
        assert 5 <= len(files) <= 8
        code = "\n".join((ROOT / file).read_text(encoding="utf-8") for file in files)
        names = {part for name in re.findall(r"`([A-Za-z_][\w.]*)`", walk) for part in name.split(".")}
        assert {name for name in names if not re.search(rf"\b{name}\b", code)} == set()
