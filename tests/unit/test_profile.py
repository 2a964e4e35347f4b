"""A profile of real training steps: the trace names the forward and backward operators, outside nothing is recorded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import random_model, tiny_batch, tiny_run

from clips.common.profile import profiled
from clips.training.task import Task

CPU = torch.device("cpu")


def train(directory: Path, steps: int, recorded: int) -> None:
    run = tiny_run()
    task = Task(random_model(run), run)
    with profiled(directory, recorded, CPU) as profiler:
        for step in range(steps):
            loss, _ = task(tiny_batch(step))
            loss.backward()
            if profiler is not None:
                profiler.step()


def test_the_trace_holds_the_steps_that_were_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path / "profile", steps=5, recorded=2)
    assert sorted(path.name for path in (tmp_path / "profile").iterdir()) == ["operators-rank0.txt", "trace-rank0.json"]
    events = json.loads((tmp_path / "profile" / "trace-rank0.json").read_text())["traceEvents"]
    names = {event["name"] for event in events}
    assert {"aten::mm", "aten::layer_norm", "aten::embedding", "MmBackward0"} <= names
    assert len([name for name in names if name.startswith("ProfilerStep#")]) == 2
    table = (tmp_path / "profile" / "operators-rank0.txt").read_text()
    assert "aten::mm" in table
    shown = capsys.readouterr().err
    assert table.strip() in shown
    assert f"profile of 2 steps: {tmp_path}/profile" in shown


def test_without_steps_nothing_is_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path / "profile", steps=3, recorded=0)
    assert not (tmp_path / "profile").exists()
    assert capsys.readouterr().err == ""
