"""The end of the quickstart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import ROOT

from clips.common.errors import UserError
from clips.common.live import say_next
from mllm.evaluation.summary import NORMAL, print_summary


def answer(kind: str, prompt: str, text: str, expected: str) -> dict[str, object]:
    found = {"kind": kind, "prompt": prompt, "text": text, "expected": expected, "correct": text == expected}
    return found | {"image": f"unseen-{kind}.jpg"}


def test_three_pictures_and_each_figure_with_chance_and_normal_range(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, model = tmp_path / "demo", tmp_path / "llava"
    with pytest.raises(UserError, match="quickstart"):
        print_summary(run, model)
    (model / "evaluation").mkdir(parents=True)
    run.mkdir()
    figures = {
        "zero_shot_top1": {"value": 72.3, "chance": 1.6},
        "unseen/zero_shot_top1": {"value": 64.4, "chance": 1.6},
    }
    (run / "evaluation.json").write_text(json.dumps({"figures": figures}))
    records = [
        answer("identity", "What is at the top left?", "A rocket", "A balloon"),
        answer("where", "Where is the house?", "At the bottom", "At the bottom"),
        answer("yes_no", "Is there a panda?", "No", "No"),
        answer("yes_no", "Is there a [red] car?", "No", "No"),
        answer("yes_no", "Is there a key?", "No", "Yes"),
    ]
    (model / "evaluation/answers_unseen.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    print_summary(run, model)
    told = capsys.readouterr().out
    assert "images/unseen-identity.jpg\n    What is at the top left? – A rocket (wrong: A balloon)" in told
    assert "Is there a panda? – No (right)" in told
    assert "[red]" not in told, "one question of a kind"
    rows = {cells[0].strip(): [cell.strip() for cell in cells[1:4]] for line in told.splitlines()
            if len(cells := line.strip("│").split("│")) == 4}  # fmt: skip
    assert rows["zero-shot top 1"] == ["64.4", "1.6", "{} to {}".format(*NORMAL["zero_shot_top1"])], (
        "the unseen artist decides"
    )
    assert rows["answers: yes no"] == ["66.7", "66.7", "{} to {}".format(*NORMAL["yes_no"])], (
        "No is right twice of three"
    )
    assert rows["answers: overall"][:2] == ["60.0", "80.0"]
    assert "answers: count" not in rows


def test_a_script_that_goes_on_names_one_next_step(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The quickstart said Next six times."""
    say_next("alone")
    monkeypatch.setenv("CLIPS_MLLM_GOES_ON", "1")
    say_next("inside")
    assert capsys.readouterr().err == "Next: alone\n"
    quickstart = (ROOT / "scripts/quickstart.sh").read_text(encoding="utf-8")
    assert quickstart.index("export CLIPS_MLLM_GOES_ON=1") < quickstart.index("build_demo_data.py")
    assert quickstart.count("Next") == 1
