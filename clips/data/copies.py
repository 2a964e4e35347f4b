"""Whole copies of remote files, in a folder of limited size that all processes of a machine share.

A copy is renamed into place when it is whole. A lock lets one process fetch it while others wait or go on. The least
recently used copy is removed first. After a SIGKILL the next process removes what is left.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from pathlib import Path
from typing import BinaryIO, cast

from clips.common.errors import CommandError, UserError
from clips.common.files import lock
from clips.common.paths import cache_root
from clips.data.remote import read_range, remote_facts
from clips.data.sidecar import check_state

BLOCK = 1 << 24
"""Bytes of one request: what a broken connection loses."""
PART = ".part"
KEPT = 0.9
"""Share of the limit that a removal of copies leaves, so that not every new copy needs a removal."""
OF_DISK = 0.8
"""Largest share of the disk's room that copies may take."""


class Copies:
    """The copies in `folder`, together at most `limit` bytes, partly written copies included."""

    def __init__(self, limit: int, folder: Path | None = None) -> None:
        """Raises UserError if the folder cannot be made."""
        self.folder = folder or cache_root() / "remote"
        self._count = self.folder / "total"
        try:
            (self.folder / "locks").mkdir(parents=True, exist_ok=True)
            room = shutil.disk_usage(self.folder).free + sum(size for _, size, _ in self._present())
            self.limit = min(limit, int(OF_DISK * room))
            with lock(self.folder / "locks" / "total", wait=True):
                self._count.write_text(str(self._shrunk(self.limit)), encoding="utf-8")
        except OSError as error:
            raise self._unwritable(error) from None

    def open(self, url: str, state: str, *, wait: bool = True) -> BinaryIO | None:
        """The copy of `url` in `state` (its stamp), fetched if it is missing; None if there is no room for it.

        Raises BlockingIOError if another process fetches it and `wait` is off, UserError for a changed file and an
        unwritable folder, and CommandError and OSError as `read_range`.
        """
        path = self._path(url, state)
        if (copy := _opened(path)) is not None:
            return copy
        with lock(self._lock_of(path), wait=wait):
            return _opened(path) or self._fetched(url, state, path)

    def has(self, url: str, state: str) -> bool:
        """Whether there is a whole copy."""
        return self._path(url, state).is_file()

    def _path(self, url: str, state: str) -> Path:
        return self.folder / f"{hashlib.sha256(url.encode('utf-8', 'surrogateescape')).hexdigest()[:24]}-{state}"

    def _fetched(self, url: str, state: str, path: Path) -> BinaryIO | None:
        size, _ = remote_facts(url, fresh=True)
        part = path.with_name(path.name + PART)
        try:
            file = self._begun(part, size)
            if file is None:
                return None
            try:
                for start in range(0, size, BLOCK):
                    file.write(read_range(url, start, min(start + BLOCK, size)))
                file.flush()
                os.fsync(file.fileno())
                check_state(url, state)
                os.replace(part, path)
            except BaseException:
                file.close()
                part.unlink(missing_ok=True)
                raise
        except OSError as error:
            raise (self._unwritable(error) if error.errno is not None else error) from None
        file.seek(0)
        return file

    def _begun(self, part: Path, size: int) -> BinaryIO | None:
        """An empty file with `size` bytes reserved, after removing old copies; None if there is no room.

        A file holds the total of all copies. A kill may leave it wrong; the next removal counts all copies again.
        """
        with lock(self.folder / "locks" / "total", wait=True):
            text = self._count.read_text(encoding="utf-8")
            total = int(text) if text.isdigit() else self._shrunk(self.limit)  # empty after a kill
            if total + size > self.limit:
                total = self._shrunk(int(KEPT * self.limit) - size)
            file = None
            if total + size <= self.limit:
                file = cast(BinaryIO, open(part, "w+b"))  # noqa: SIM115 - closed by its reader
                file.truncate(size)
                total += size
            self._count.write_text(str(total), encoding="utf-8")
        return file

    def _shrunk(self, most: int) -> int:
        """Remove the least recently used copies until at most `most` bytes are left; returns the bytes left."""
        total, removable = 0, []
        for used, size, path in self._present():
            if path.name.endswith(PART):
                try:
                    lock(self._lock_of(path), wait=False).close()
                except BlockingIOError:
                    total += size  # being written
                    continue
                path.unlink(missing_ok=True)  # left by a process that was killed
            else:
                total += size
                removable.append((used, size, path))
        for _, size, path in sorted(removable):
            if total <= most:
                break
            path.unlink(missing_ok=True)
            total -= size
        return total

    def _present(self) -> list[tuple[float, int, Path]]:
        """(time of last use, bytes, path) of every copy, whole or in part."""
        found = []
        for entry in os.scandir(self.folder):
            with contextlib.suppress(FileNotFoundError):  # removed by another process in between
                if entry.is_file() and "-" in entry.name:
                    found.append((entry.stat().st_mtime, entry.stat().st_size, Path(entry.path)))
        return found

    def _lock_of(self, path: Path) -> Path:
        return self.folder / "locks" / path.name[:3]  # 4,096 at most; copies that share one wait for each other

    def _unwritable(self, error: OSError) -> CommandError:
        return UserError(
            f"copies of remote files cannot be written to {self.folder}: {error}; make room, set CLIPS_MLLM_CACHE to "
            "another folder, or data.cache_gb to less (0: none)"
        )


def _opened(path: Path) -> BinaryIO | None:
    try:
        file = open(path, "rb")  # noqa: SIM115 - closed by its reader
    except FileNotFoundError:
        return None
    os.utime(file.fileno())  # used now; by the open file, since its path may be gone already
    return file
