"""The finished calls of a shard that is under way, so that a kill costs only the calls that had not ended.

Each owner of the shard appends to its own file and reads the files of all owners before it. A line that a kill or a
full disk cut off does not count; its call is made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clips import BrokenSample
from clips.common.files import fsync
from clips.common.rundir import parse_line
from mllm.recaption.captioner import Written

Outcome = Written | Exception
"""The result for one pair."""
SUFFIX = ".calls.jsonl"


class NotCaptioned(Exception):
    """A captioner's error for one pair, read from a journal."""


class Journal:
    """The calls made for one shard. `close` leaves the file for the next owner."""

    def __init__(self, folder: Path, owner: str, made_of: str) -> None:
        """`folder`: the shard's own. `made_of`: the state of its data; calls made of another state do not count."""
        state = hashlib.sha256(made_of.encode("utf-8", "surrogateescape")).hexdigest()[:16]
        self.path = folder / f"{owner}.{state}{SUFFIX}"
        self._calls: dict[tuple[int, int], list[Outcome]] = {}
        for path in sorted(folder.glob(f"*.{state}{SUFFIX}")):
            for line in path.read_bytes().splitlines():
                with contextlib.suppress(KeyError, TypeError):  # a line that no journal wrote does not count either
                    record = parse_line(line) or {}
                    outcomes = [_from_json(outcome) for outcome in record["outcomes"]]
                    self._calls.setdefault((record["attempt"], record["call"]), outcomes)
        self._file = open(self.path, "ab")  # noqa: SIM115 - `close` closes it
        fsync(self.path.parent)

    def close(self) -> None:
        self._file.close()

    def found(self, attempt: int, call: int, pairs: int) -> list[Outcome] | None:
        """The results of a call of so many pairs; None if the call was not made."""
        outcomes = self._calls.get((attempt, call))
        return outcomes if outcomes is not None and len(outcomes) == pairs else None

    def add(self, attempt: int, call: int, outcomes: Sequence[Outcome]) -> list[Outcome]:
        """Store the results of a call. Returns them as `found` returns them after a restart."""
        stored = [_as_json(outcome) for outcome in outcomes]
        record = {"attempt": attempt, "call": call, "outcomes": stored}
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        return [_from_json(outcome) for outcome in stored]


def _as_json(outcome: Outcome) -> Any:
    if isinstance(outcome, Written):
        return [outcome.text, outcome.finished, outcome.tokens]
    if isinstance(outcome, BrokenSample):
        return {"key": outcome.key, "broken": outcome.reason}
    return {"error": f"{type(outcome).__name__}: {outcome}"}


def _from_json(stored: Any) -> Outcome:
    if isinstance(stored, list):
        text, finished, tokens = stored if len(stored) == 3 else (None, None, None)
        if not (isinstance(text, str) and isinstance(finished, bool) and isinstance(tokens, int)):
            raise TypeError("no caption")
        return Written(text, finished, tokens)
    return BrokenSample(stored["key"], stored["broken"]) if "broken" in stored else NotCaptioned(stored["error"])
