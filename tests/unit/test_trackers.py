"""What a training tells: the same loggers in both halves, the live line."""

import io
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_mllm import tiny_work
from transformers import TrainerControl, TrainerState, TrainingArguments

from clips.common import live
from clips.common.errors import UserError
from clips.common.live import LiveLine
from clips.common.trackers import loggers
from clips.recipes import recipe
from clips.training.cli import parser as pretraining
from clips.training.log import RunLog
from mllm.training.arguments import parse_train_arguments
from mllm.training.log import MetricsLog


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """What wandb and trackio are told; both have these three functions."""
    events: list[tuple[str, Any]] = []

    def fake(name: str) -> Any:
        return SimpleNamespace(
            __name__=name,
            __spec__=object(),
            init=lambda **words: events.append((f"{name} init", words)),
            log=lambda scalars, step: events.append((f"{name} log", (step, scalars))),
            finish=lambda: events.append((f"{name} finish", None)),
        )

    for name in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, fake(name))
    return events


def test_both_halves_tell_all_loggers_the_same(tmp_path: Path, calls: list[tuple[str, Any]]) -> None:
    words = ["--report_to", "wandb,tensorboard,trackio"]
    for run in ("demo", "llava"):
        (tmp_path / run).mkdir()
    names = loggers(pretraining().parse_args(words).report_to)
    log = RunLog(recipe("demo"), tmp_path / "demo", start_step=0, active=True, report_to=names)
    log.record("train", {"step": 3, "samples": 30, "loss": 1.5})
    log.close()

    flags = parse_train_arguments(["--stage", "1", *words, "--batch_size", "4"])
    half, control = MetricsLog(tmp_path / "llava", flags, tiny_work(), active=True), TrainerControl()
    args, state = TrainingArguments(str(tmp_path), report_to="none"), TrainerState(global_step=3, max_steps=8)
    half.on_train_begin(args, TrainerState(max_steps=8), control)
    half.on_log(args, state, control, logs={"loss": 1.5})
    half.on_train_end(args, state, control)

    for board in (tmp_path / "demo/tensorboard", tmp_path / "llava/align/tensorboard"):
        events = EventAccumulator(str(board)).Reload()
        assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(3, 1.5)]
    for name in ("wandb", "trackio"):
        own = [(what.split()[1], told) for what, told in calls if what.startswith(name)]
        assert [what for what, _ in own] == ["init", "log", "finish"] * 2
        assert [told["name"] for what, told in own if what == "init"] == ["demo", "llava/align"]
        assert [(told[0], told[1]["train/loss"]) for what, told in own if what == "log"] == [(3, 1.5)] * 2


def test_an_unknown_logger_and_a_missing_package_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert loggers("none") == []
    with pytest.raises(UserError, match="mlflow"):
        loggers("mlflow")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install trackio"):
        loggers("trackio")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def on(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch, columns: int = 200) -> io.StringIO:
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(live, "get_terminal_size", lambda: type("Size", (), {"columns": columns}))
    return stream


def test_a_terminal_has_one_line_that_is_rewritten(monkeypatch: pytest.MonkeyPatch) -> None:
    printed = on(Terminal(), monkeypatch, columns=20)
    line = LiveLine()
    line.show("a long first line that is cut")
    line.show("short")
    line.say("stays")
    line.show("again")
    line.close()
    assert "a long first line …" in printed.getvalue()
    assert [text.split("\r")[-1].strip() for text in printed.getvalue().split("\n")] == ["stays", "again", ""]
