"""What a LLaVA run tells people: its progress, its last words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_mllm import tiny_work
from transformers import TrainerControl, TrainerState, TrainingArguments

from clips.common import live
from mllm.training.arguments import parse_train_arguments
from mllm.training.log import MetricsLog


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
