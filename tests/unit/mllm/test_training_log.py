"""What a LLaVA run writes beside its weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console
from tiny_mllm import tiny_work
from transformers import TrainerControl, TrainerState, TrainingArguments

from clips.common import live
from mllm.training.arguments import parse_train_arguments
from mllm.training.finish import print_next
from mllm.training.log import MetricsLog, write_curves


def test_curves_that_cannot_be_written_cost_nothing_and_can_be_made_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        {"stage": stage, "samples": 4 * i, "loss": 1.0, "mfu": 0.1} for stage in ("align", "instruct") for i in range(3)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "curves.png").mkdir()
    write_curves(tmp_path)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {tmp_path}/curves.png is not written; nothing else is missing. IsADirectoryError")
    (tmp_path / "curves.png").rmdir()
    write_curves(tmp_path)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().err == ""


def test_a_slow_step_shows_progress_and_the_last_step_is_always_logged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four steps of 128 samples printed nothing for eight minutes and left no metrics.jsonl and no curves."""
    monkeypatch.setenv(live.LINE_SECONDS, "0")
    log = MetricsLog(tmp_path, parse_train_arguments(["--stage", "2", "--batch_size", "8"]), tiny_work(), active=True)
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", gradient_accumulation_steps=4)
    control = TrainerControl()
    log.on_train_begin(args, TrainerState(max_steps=2), control)
    log.on_substep_end(args, TrainerState(max_steps=2), control)
    log.on_step_end(args, TrainerState(global_step=1, max_steps=2), control)
    assert not control.should_log
    log.on_step_end(args, TrainerState(global_step=2, max_steps=2), control)
    assert control.should_log
    log.on_log(args, TrainerState(global_step=2, max_steps=2), control, logs={"loss": 2.5})
    first, second, _, last = capsys.readouterr().err.splitlines()
    assert first.startswith("instruct: 2 of 16 samples (12 %), ")
    assert second.startswith("instruct: 8 of 16 samples (50 %), ")
    assert last.startswith("instruct: 16 of 16 samples (100 %), 0 s left, loss 2.5")
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["step"] == 2


def test_the_end_names_no_curves_that_are_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for there in (False, True):
        print_next(2, tmp_path, Console(stderr=True, width=200))
        assert (f"{tmp_path}/curves.png" in capsys.readouterr().err) is there
        (tmp_path / "curves.png").touch()
