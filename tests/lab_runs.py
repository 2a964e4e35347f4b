"""Finished pretraining runs without a training, as the studies of variants read them, and commands in this process."""

import json
import runpy
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from clips.lab.pretraining import PretrainingRun

STORED = ROOT / "tests" / "data" / "lab"


def stored(kind: str) -> dict[str, Any]:
    """A comparison that commit 9c3575c made (tests/data/lab/README.md)."""
    return json.loads((STORED / f"{kind}.json").read_text(encoding="utf-8"))


def write_runs(output: Path, runs: Iterable[PretrainingRun], made: Mapping[str, Any]) -> None:
    """Write `runs` into `output` as finished; `made`: name → `evaluation` and `metrics`, as stored."""
    for run in runs:
        write_run(output / run.name, run, made[run.name]["evaluation"], made[run.name]["metrics"])


def write_run(directory: Path, run: PretrainingRun, evaluation: Mapping[str, Any], metrics: Iterable[Any] = ()) -> None:
    (directory / "export").mkdir(parents=True, exist_ok=True)
    run.config().save(directory / "config.json")
    (directory / "evaluation.json").write_text(json.dumps(evaluation))
    (directory / "env.json").write_text(json.dumps({"python": "3.11.7", "device": "cpu × 1", "packages": {}}))
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))


def with_metrics(directory: Path, run: PretrainingRun, metrics: Mapping[str, float]) -> None:
    """The same with `metrics` in percent, after 48,000 samples at 400 samples a second."""
    line = {"kind": "train", "samples": 48_000, "samples_per_s": 400.0}
    write_run(directory, run, {"metrics": {name: {"value": value} for name, value in metrics.items()}}, [line])


def run_main(monkeypatch: pytest.MonkeyPatch, name: str, *words: str | Path) -> int:
    """The exit code of `python scripts/NAME.py WORDS…`, in this process; what it prints is pytest's to capture."""
    monkeypatch.setattr(sys, "argv", [f"scripts/{name}.py", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "scripts" / f"{name}.py"), run_name="__main__")
    return ended.value.code
