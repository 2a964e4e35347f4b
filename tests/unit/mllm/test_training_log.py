"""What a LLaVA run writes beside its weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mllm.training.log import write_curves


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
