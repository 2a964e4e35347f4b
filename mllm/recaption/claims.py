"""Who works on which shard, among processes of any number of machines that see one folder.

A claim is a file that its owner made and touches. Whoever finds one that nobody has touched for `patience` seconds, or
whose process is known to be gone, takes it over. Ages are told by the file system's clock alone, for machines' clocks
differ. Nothing else is asked of the file system than that creating a file exclusively and renaming one are atomic.

A claim saves work and no more: two that work on one shard by mischance write the same, each under a name of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import threading
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from clips.common.files import read_regular
from clips.common.machine import this_machine

SUFFIX = ".claim"
BEATS = 6
"""Touches in the time after which a claim is lost."""
MAX_RECORD = 1 << 16


class Claims:
    """The claims of one process below `folder`, kept alive by a thread until the end of the `with`."""

    def __init__(self, folder: Path, patience: float) -> None:
        """`patience`: seconds without a sign of life after which a claim is nobody's."""
        self.folder, self.patience = folder, patience
        self.owner = f"{platform.node() or 'host'}-{os.getpid()}-{uuid.uuid4().hex[:12]}".replace("/", "_")
        self._mine: set[str] = set()
        self._ended = threading.Event()
        self._record = json.dumps({"owner": self.owner, **_this_process()})

    def __enter__(self) -> Claims:
        self.folder.mkdir(parents=True, exist_ok=True)
        threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        for name in list(self._mine):
            self.release(name)

    def take(self, name: str) -> bool:
        """Whether `name` is this process's from now on: it was free, or its owner is gone."""
        self.folder.mkdir(parents=True, exist_ok=True)  # one that finds all done clears it away
        path = self._path(name)
        if self._made(path):
            self._mine.add(name)
            return True
        before = _read(path)
        if not self._is_lost(path, before):
            return False
        # Renamed, a claim is one process's to look at. It may be a new one: another was quicker, and its is given back.
        grave = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
        try:
            os.rename(path, grave)
        except FileNotFoundError:
            return False
        if _read(grave).get("owner") != before.get("owner"):
            with contextlib.suppress(OSError):  # there is a third one by now; the owner finds out in `holds`
                os.link(grave, path)
            grave.unlink(missing_ok=True)
            return False
        grave.unlink(missing_ok=True)
        if not self._made(path):
            return False
        self._mine.add(name)
        return True

    def is_free(self, name: str) -> bool:
        """Whether nobody says that it is his."""
        return not self._path(name).exists()

    def holds(self, name: str) -> bool:
        """Whether it is still this process's: one that was stopped for longer than `patience` may have lost it."""
        return _read(self._path(name)).get("owner") == self.owner

    def release(self, name: str) -> None:
        self._mine.discard(name)
        if self.holds(name):
            self._path(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}{SUFFIX}"

    def _made(self, path: Path) -> bool:
        try:
            with open(path, "x") as file:
                file.write(self._record)
        except FileExistsError:
            return False
        return True

    def _is_lost(self, path: Path, record: dict[str, Any]) -> bool:
        if _is_dead(record):
            return True
        try:
            touched = path.stat().st_mtime
        except FileNotFoundError:  # let go of in this moment: it is taken at the next look
            return False
        return self._now() - touched > self.patience

    def _now(self) -> float:
        """The file system's time."""
        clock = self.folder / f"{self.owner}.clock"
        clock.touch()
        now = clock.stat().st_mtime
        clock.unlink(missing_ok=True)
        return now

    def _beat(self) -> None:
        while not self._ended.wait(self.patience / BEATS):
            for name in list(self._mine):
                with contextlib.suppress(OSError):  # the next beat may come through
                    if self.holds(name):
                        os.utime(self._path(name))


def _read(path: Path) -> dict[str, Any]:
    """Empty where it is gone, or not yet written."""
    try:
        record = json.loads(read_regular(path, MAX_RECORD))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _this_process() -> dict[str, Any]:
    """What tells a process of this machine from all others; without `machine` where that cannot be told."""
    if (machine := this_machine()) is None:
        return {}
    return {"machine": machine, "process": os.getpid(), "began": psutil.Process().create_time()}


def _is_dead(record: dict[str, Any]) -> bool:
    """Whether this machine knows that the claim's process has ended."""
    if not record.get("machine") or record["machine"] != this_machine():
        return False
    try:
        process = psutil.Process(record["process"])
        return process.create_time() != record["began"] or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:
        return False
