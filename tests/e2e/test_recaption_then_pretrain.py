"""A user's own pairs without long captions, to a pretraining, by the words of docs/recaption.md."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT
from launched import SCRIPT, python, run
from pairs import write_pairs
from tiny_mllm import write_idefics, write_llava, write_run

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kind", ["llava", "hf"])
def test_pairs_are_refused_recaptioned_and_trained_on(kind: str, tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "pairs", 1, 40)
    training = (SCRIPT, "--debug", "--samples", "16", "--set", "data.workers=0", "--output-dir", tmp_path / "runs")
    refused = run(python(*training, "--data", data, "--fields", "web=txt"))
    assert refused.code == 2
    assert "python scripts/recaption.py writes them (docs/recaption.md)" in refused.text
    page = (ROOT / "docs" / "recaption.md").read_text()
    told, *_ = re.findall(r"^python scripts/recaption\.py --data 'my_pairs.*$", page, flags=re.MULTILINE)

    model = tmp_path / "runs/llava/model"
    if kind == "llava":
        write_run(tmp_path / "runs/clips-demo")
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path)
            write_llava(tmp_path, context=512)
    else:
        write_idefics(model)
    (tmp_path / "prompt.txt").write_text("Say it: {web}")
    words = shlex.split(told.partition("#")[0])[1:]
    words[words.index("--data") + 1] = data
    words[words.index("--captioner") + 1] = f"{kind}:{model}"
    words[words.index("--output") + 1] = str(tmp_path / "recap")
    # What a tiny random model writes is no caption.
    anything = ("--words", "0", "999", "--script", "any", "--on-bad", "keep")
    done = run(python(*words, "--prompt", tmp_path / "prompt.txt", "--max-new-tokens", "16", *anything))
    assert done.code == 0, done.text
    (command,) = re.findall(r"^\s*python (scripts/pretrain_clips\.py .*)$", done.text, flags=re.MULTILINE)
    trained = run(
        python(
            *shlex.split(command), *training[1:], "--val-data", tmp_path / "recap", "--test-data", tmp_path / "recap"
        )
    )
    assert trained.code == 0, trained.text
