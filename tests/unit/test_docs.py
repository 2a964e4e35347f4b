"""What README and docs say can be typed and followed: commands parse, links lead on, walks name what is there."""

import functools
import importlib
import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT, load_script

from clips.training.cli import config_from_flags
from mllm.encoders.registry import parse_vision_name
from mllm.training.config import parse_stages

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHERS = {"source", "mkdir", "tar", "head", "sha256sum", "vllm", "ruff", "coverage", "pre-commit", "pip", "tensorboard"}
OTHERS |= {"hf", "img2dataset", "unzip", "wget"}
"""First words of commands that are not this project's."""
PARSERS = {"deepspeed": "deepspeed.launcher.runner", "torchrun": "torch.distributed.run"}
LAUNCHERS = {"python", "srun", "bash", "sbatch", *PARSERS}
CODE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
script_module = functools.cache(load_script)


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return CODE.sub("", page.read_text(encoding="utf-8"))


def commands() -> set[str]:
    """Every command of a block, and every whole command in the text; those with a … are no more than a hint."""
    lines = set()
    for page in PAGES:
        blocks = [body for language, body in CODE.findall(page.read_text(encoding="utf-8")) if language == "bash"]
        for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
            lines.add(line.partition("  #")[0].strip())
        inline = rf"`((?:{'|'.join(LAUNCHERS)}) [^`]*(?:scripts|tools)/[^`]+)`"
        lines |= {command for command in re.findall(inline, prose(page)) if "…" not in command}
    return {line for line in lines if line and not line.startswith("#")}


def check_stages(words: list[str]) -> None:
    """The flags of train_llava.sh, read for each stage that it would run."""
    for arguments in parse_stages(words):
        parse_vision_name(arguments.vision_tower)


def check_python_script(path: Path, words: list[str]) -> None:
    parser = script_module(path).parser()
    if "--help" in words:
        return
    flags = parser.parse_args(words)  # SystemExit where a flag is unknown
    if path.name == "pretrain_clips.py":
        # Recipe, fields and --set are what the run would read; the tower that a size is given for is not here.
        sized = flags.init_from is not None and any("image_size" in text for text in flags.set)
        tower = {"width": 768, "layers": 12, "heads": 12, "image_size": 224, "patch_size": 14}
        config_from_flags(flags, {"model.vision": tower} if sized else None)
        assert flags.ds_config is None or (ROOT / flags.ds_config).is_file()
    if path.name == "compare_encoders.py":
        for name in flags.encoders or ():
            parse_vision_name(name)
        for further in [(), *dict(flags.variants).values()]:
            parse_stages([*flags.train_flags, *further])


def check(command: str) -> None:
    """Raise unless `command` is one that its program accepts."""
    for part in re.split(r"\s+(?:&&|\|)\s+", command):
        words = shlex.split(part)
        while re.match(r"[A-Z_]+=", words[0]):  # NUM_GPUS=2 bash …
            words = words[1:]
        launcher = words[0]
        if launcher in OTHERS or words[:2] in (["python", "-c"], ["python", "-m"]):
            continue
        assert launcher in LAUNCHERS, f"{launcher} is no program that these pages use"
        script_at = next(i for i, word in enumerate(words) if word.startswith(("scripts/", "tools/")))
        path, rest = ROOT / words[script_at], words[script_at + 1 :]
        assert path.is_file(), f"{words[script_at]} is not in the repository"
        if launcher == "sbatch":  # hands its words to torchrun
            check(shlex.join(["torchrun", *rest]))
            continue
        if launcher in PARSERS:
            importlib.import_module(PARSERS[launcher]).parse_args(words[1:])
        if path.stem == "train_llava":
            if "--help" not in rest:
                check_stages(rest)
        elif path.suffix == ".py":
            check_python_script(path, rest)
        else:
            words = {"quickstart.sh": ["photos"], "test.sh": rest}.get(path.name, [])
            assert rest in ([], words), f"{path.name} takes no such flags"


@pytest.mark.parametrize("command", sorted(commands()))
def test_each_command_is_accepted(command: str) -> None:
    check(command)


@pytest.mark.parametrize("page", [pytest.param(page, id=page.name) for page in PAGES])
def test_links_and_paths_in_a_page_lead_on(page: Path) -> None:
    text = prose(page)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not re.match(r"https?://|mailto:", link):
            assert target.is_file(), f"{page.name}: {link} is not there"
            headings = re.findall(r"^#+ (.+)$", prose(target), flags=re.MULTILINE) if anchor else []
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert not anchor or anchor in anchors, f"{page.name}: {link}: no such heading"
    if page.name != "CHANGELOG.md":  # it speaks of what has left
        named = re.findall(r"`((?:clips|mllm|scripts|tools|tests|ds_configs|docs)/[\w./-]*)`", text)
        assert [name for name in named if not (ROOT / name).exists()] == []


def test_each_fault_of_the_page_has_tests() -> None:
    listed = re.findall(r"^\| (\d+) \|", (ROOT / "docs" / "faults.md").read_text(), flags=re.MULTILINE)
    tests: set[int] = set()
    for file in (ROOT / "tests" / "faults").glob("test_*.py"):
        tests |= {int(number) for number in re.findall(r"^def test_row_(\d+)_\w+\(", file.read_text(), re.MULTILINE)}
    assert [int(number) for number in listed] == sorted(tests)


def words(text: str) -> int:
    """How many words a reader sees: what has a letter or a digit."""
    return sum(any(map(str.isalnum, word)) for word in re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL).split())


def test_pages_are_short_and_their_paragraphs_too() -> None:
    assert words((ROOT / "README.md").read_text(encoding="utf-8")) <= 1_000
    assert sum(words(page.read_text(encoding="utf-8")) for page in (ROOT / "docs").glob("*.md")) <= 20_000
    for page in PAGES:
        for paragraph in re.split(r"\n\s*\n|\n(?= *(?:[-*|]|\d+\.) )", prose(page)):
            assert words(paragraph) <= 120, f"{page.name}: a paragraph is too long: {paragraph[:80]}"


def test_python_of_pages_has_no_errors_of_syntax() -> None:
    for page in PAGES:
        for language, body in CODE.findall(page.read_text(encoding="utf-8")):
            if language == "python":
                compile(body, str(page), "exec")


def test_each_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert [page.name for page in (ROOT / "docs").glob("*.md") if f"({page.name})" not in index] == ["index.md"]
