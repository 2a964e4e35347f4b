"""How far a run is, from the records that it leaves as it goes: metrics.jsonl, or progress.json where there is none."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from clips.common.files import write_atomically
from clips.common.live import in_words
from clips.common.rundir import parse_line

TAIL = 1 << 16
"""Bytes of metrics.jsonl in which the newest record is looked for; a line has a few hundred."""


@dataclass(frozen=True)
class Progress:
    done: int
    planned: int
    """Both in the run's unit: samples or questions."""
    seconds_left: float | None
    """None until the speed is known."""
    time: float
    """Time of this state, in seconds since the epoch."""

    def __str__(self) -> str:
        left = "" if self.seconds_left is None else f", {in_words(self.seconds_left)} left"
        return f"{100 * self.done // max(1, self.planned)} %{left}"


def last_record(path: Path, **fields: Any) -> dict[str, Any] | None:
    """The newest record of a .jsonl file with these `fields`; None if there is none in the file's tail.

    Lines that are no record are skipped: a crash may have cut the last line, or it is half written.
    """
    if not path.is_file():
        return None
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL))
        lines = file.read().splitlines()
    for line in reversed(lines):
        record = parse_line(line)
        if record is not None and all(record.get(name) == value for name, value in fields.items()):
            return record
    return None


def training_progress(metrics: Path, planned: int, **fields: Any) -> Progress | None:
    """Progress of a training of `planned` samples; `fields` as in `last_record`. None before its first record."""
    record = last_record(metrics, kind="train", **fields)
    if record is None:
        return None
    done = min(record["samples"], planned)  # the last batch may reach beyond the planned samples
    left = (planned - done) / record["samples_per_s"] if record["samples_per_s"] > 0 else None
    return Progress(done, planned, left, record["time"])


def read_progress(path: Path) -> Progress | None:
    """The last state that `ProgressFile` wrote; None if nothing is in progress."""
    try:
        return Progress(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None


class ProgressFile:
    """Writes a loop's progress to `path` at most once a second; the end of the `with` block removes `path`."""

    def __init__(self, path: Path, planned: int) -> None:
        self.path, self.planned = path, planned

    def __enter__(self) -> ProgressFile:
        self.done, self.begin, self.written = 0, time.monotonic(), float("-inf")
        self.advance(0)
        return self

    def advance(self, count: int) -> None:
        """`count` more are done."""
        self.done += count
        now = time.monotonic()
        if now - self.written < 1:
            return
        self.written = now
        left = (now - self.begin) * (self.planned - self.done) / self.done if self.done else None
        record = Progress(self.done, self.planned, left, time.time())
        write_atomically(self.path, json.dumps(asdict(record)) + "\n")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.path.unlink(missing_ok=True)
