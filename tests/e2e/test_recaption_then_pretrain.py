"""A user's own pairs without long captions, to a pretraining, by the words of docs/recaption.md."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT
from launched import python, run
from pairs import write_pairs
from tiny_mllm import write_idefics

pytestmark = pytest.mark.slow


def test_pairs_are_recaptioned_and_trained_on(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "recaption.md").read_text()
    told, *_ = re.findall(r"^python scripts/recaption\.py --data 'my_pairs.*$", page, flags=re.MULTILINE)
    (tmp_path / "prompt.txt").write_text("Say it: {web}")
    words = shlex.split(told.partition("#")[0])[1:]
    words[words.index("--data") + 1] = write_pairs(tmp_path / "pairs", 1, 40)
    words[words.index("--captioner") + 1] = f"hf:{write_idefics(tmp_path / 'model')}"
    words[words.index("--output") + 1] = str(tmp_path / "recap")
    # The captions of a tiny random model are bad.
    anything = ("--words", "0", "999", "--script", "any", "--on-bad", "keep")
    done = run(python(*words, "--prompt", tmp_path / "prompt.txt", "--max-new-tokens", "16", *anything))
    assert done.code == 0, done.text
    (command,) = re.findall(r"^\s*python (scripts/pretrain_clips\.py .*)$", done.text, flags=re.MULTILINE)
    sets = ("--val-data", tmp_path / "recap", "--test-data", tmp_path / "recap", "--output", tmp_path / "runs")
    small = ("--debug", "--samples", "16", "--set", "data.workers=0")
    trained = run(python(*shlex.split(command), *small, *sets))
    assert trained.code == 0, trained.text
