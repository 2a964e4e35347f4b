"""docs/design.md lists the files of one optimizer step: here some steps run and are traced, once for each package."""

import re
import sys
from pathlib import Path
from types import FrameType

import pytest
import tiny_llava
from conftest import ROOT
from tiny_llava import INSTRUCT, START, process_kept, run

from clips.engine.loop import Trainer
from clips.training import cli
from clips.training.trainer import CLIPSTrainer
from mllm.training.trainer import LlavaTrainer

place = tiny_llava.place  # a fixture
SHARED = ("clips/common/", "clips/config.py")
"""Tools that run in every step and are no part of the walk."""


STEPS = 4
"""Enough for a batch with images and one of text alone."""


class Traced(Exception):
    """Ends a training after the steps that were traced."""


def traced(monkeypatch: pytest.MonkeyPatch, trainer: type[Trainer]) -> set[str]:
    """The files of the project whose functions run in the first STEPS of a training that is yet to begin."""
    files: set[str] = set()
    original = trainer.begin_step

    def profile(frame: FrameType, event: str, _: object) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(ROOT):
            files.add(str(path.relative_to(ROOT)))

    def begin_step(self: Trainer) -> tuple[int, dict[str, float]]:
        sys.setprofile(profile if self.state.step < STEPS else None)
        if self.state.step == STEPS:
            raise Traced
        return original(self)

    monkeypatch.setattr(trainer, "begin_step", begin_step)
    return files


def assert_listed(files: set[str], heading: str) -> None:
    """The list under `heading` of docs/design.md has each of the files, and no other."""
    page = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    section = page.partition(f"\n### {heading}\n")[2].partition("\n#")[0]
    named = re.findall(r"`((?:clips|mllm)/[\w/]+\.py)`", section)
    walked = {file for file in files if file.startswith(("clips/", "mllm/")) and not file.startswith(SHARED)}
    assert sorted(set(named)) == sorted(walked)
    assert f"{len(walked)} files" in section


def test_the_page_lists_the_files_of_a_step_of_pretraining(shards, tmp_path, monkeypatch):
    files = traced(monkeypatch, CLIPSTrainer)
    words = ["--debug", "--name", "r", "--output", str(tmp_path), *shards, "--samples", "64", "--set", "data.workers=0"]
    with process_kept(), pytest.raises(Traced):
        cli.pretrain_from_flags(cli.parser().parse_args(words))
    assert_listed(files, "Pretraining")


def test_the_page_lists_the_files_of_a_step_of_a_llava_stage(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = traced(monkeypatch, LlavaTrainer)
    with pytest.raises(Traced):
        run(place, monkeypatch, *INSTRUCT, *START, "--feature_cache", "False", "--output_dir", "runs/traced")
    assert_listed(files, "A LLaVA stage")
