"""What a person reads while a training runs."""

import io
import json
import sys
from typing import Any

import pytest

from clips.common import live
from clips.common.live import LiveLine
from clips.recipes import recipe
from clips.training.log import RunLog


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


def test_a_file_has_a_line_every_half_minute_and_nothing_redrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    told, now = on(io.StringIO(), monkeypatch), [0.0]
    monkeypatch.setattr(live, "monotonic", lambda: now[0])
    line = LiveLine()
    for now[0] in range(100):
        line.show(f"at {now[0]} s")
    line.show("done", final=True)
    line.close()
    assert told.getvalue() == "at 0 s\nat 30 s\nat 60 s\nat 90 s\ndone\n"


@pytest.mark.parametrize(("jumps", "told"), [(False, False), (True, True)])
def test_a_gradient_that_the_loss_does_not_feel_is_recorded_in_silence(tmp_path, capsys, jumps, told):
    """Every healthy run of the demo warned of a spike: loss 6.504 (usually 6.389), gradient norm 8.362 (3.199)."""
    figures: dict[str, Any] = {"loss": 6.504, "usual_loss": 6.389, "loss_jumps": jumps}
    figures |= {"step": 214, "grad_norm": 8.362, "usual_grad_norm": 3.199, "action": "continue"}
    log = RunLog(recipe("demo"), tmp_path, start_step=0, active=True, report_to=())
    log.spike(figures, [["a"]])
    log.close()
    assert json.loads((tmp_path / "spikes.jsonl").read_text())["step"] == 214
    assert ("warning: spike at step 214" in capsys.readouterr().err) == told
