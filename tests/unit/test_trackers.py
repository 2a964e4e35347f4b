"""What a training tells: the same loggers in both packages, the live line."""

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from clips.common import live, plots
from clips.common.errors import UserError
from clips.common.live import LiveLine
from clips.engine.log import RunLog, loggers
from clips.training.cli import parser as pretraining
from mllm.training.config import parse_stage


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
    for stage, flags in (("", names), ("align", loggers(parse_stage(["--stage", "1", *words]).report_to))):
        run_dir = tmp_path / ("llava" if stage else "demo")
        log = RunLog(run_dir, 100, {}, start_step=0, active=True, report_to=flags, stage=stage)
        log.record("train", {"step": 3, "samples": 30, "loss": 1.5})
        log.close()

    for board in (tmp_path / "demo/tensorboard", tmp_path / "llava/align/tensorboard"):
        events = EventAccumulator(str(board)).Reload()
        assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(3, 1.5)]
    for name in ("wandb", "trackio"):
        own = [(what.split()[1], told) for what, told in calls if what.startswith(name)]
        assert [what for what, _ in own] == ["init", "log", "finish"] * 2
        assert [told["name"] for what, told in own if what == "init"] == ["demo", "llava/align"]
        assert [(told[0], told[1]["train/loss"]) for what, told in own if what == "log"] == [(3, 1.5)] * 2


def test_a_resumed_run_goes_on_in_the_same_run_of_every_logger(tmp_path: Path, calls: list[tuple[str, Any]]) -> None:
    """It was a second run of wandb and of trackio."""
    for step in (0, 3, 0):  # the last one begins anew
        RunLog(tmp_path, 9, {}, start_step=step, active=True, report_to=("wandb", "trackio")).close()
    wandb, trackio = ([words for what, words in calls if what == f"{name} init"] for name in ("wandb", "trackio"))
    assert wandb[0]["id"] == wandb[1]["id"] != wandb[2]["id"]
    assert [words["resume"] for words in wandb] == ["allow"] * 3
    assert [words.get("resume") for words in trackio] == [None, "allow", None]


def test_a_resumed_run_keeps_its_last_point_in_tensorboard_and_forgets_what_came_after_it(tmp_path: Path) -> None:
    for begin, steps in ((0, (3, 4)), (3, (5,))):
        log = RunLog(tmp_path, 9, {}, start_step=begin, active=True)
        for step in steps:
            log.record("train", {"step": step, "samples": step, "loss": 1.0})
        log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [3, 5]


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


def test_a_terminal_has_one_line_that_is_rewritten(monkeypatch: pytest.MonkeyPatch) -> None:
    printed = Terminal()
    monkeypatch.setattr(sys, "stderr", printed)
    monkeypatch.setattr(live, "get_terminal_size", lambda: SimpleNamespace(columns=20))
    line = LiveLine()
    line.show("a long first line that is cut")
    line.show("short")
    live.say("stays")
    line.show("again")
    line.close()
    assert "a long first line …" in printed.getvalue()
    assert [text.split("\r")[-1].strip() for text in printed.getvalue().split("\n")] == ["stays", "again", ""]


def test_a_slow_step_shows_progress(tmp_path, capsys, monkeypatch):
    """Four steps of 128 samples printed nothing for eight minutes."""
    monkeypatch.setenv(live.LINE_SECONDS, "0")
    log = RunLog(tmp_path, 16, {}, start_step=0, active=True, report_to=(), stage="instruct")
    log.progress(8)
    log.record("train", {"step": 2, "samples": 16, "loss": 2.5})
    log.progress(16)
    first, last = capsys.readouterr().err.splitlines()
    assert first == "instruct: 8 of 16 samples (50 %)"
    assert last.startswith("instruct: 16 of 16 samples (100 %), 0 s left, loss 2.5")
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["stage"] == "instruct"


@pytest.mark.parametrize("count", [1, plots.MAX_POINTS, 2 * plots.MAX_POINTS - 1])
def test_a_curve_has_its_last_point_and_no_more_than_the_maximum(count: int) -> None:
    """One of 2,999 values was drawn whole, and one of 3,001 lost its last value."""
    lines = [{"samples": i, "loss": float(i)} for i in range(count)]
    (axes,) = plots.curves_plot([plots.Panel("loss", lines, ["loss"])]).axes
    drawn = list(axes.lines[0].get_xdata())
    assert len(drawn) == min(count, plots.MAX_POINTS)
    assert (drawn[0], drawn[-1]) == (0, count - 1)
    assert drawn == sorted(set(drawn))
