"""Files behind fsspec URLs, read by ranges, with retries; their states, and full copies in a folder of limited size.

An HTTP server's answer is bounded by what was asked for, in bytes and in time, and is never unpacked. A final error of
the store (no such file, no permission) is an OSError at once. A passing error is retried, and is a CommandError that
names the URL after the last retry.
"""

import asyncio
import contextlib
import hashlib
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from random import SystemRandom
from typing import Any, BinaryIO, TypeVar, cast

import fsspec
from fsspec.spec import AbstractBufferedFile

from clips.common.errors import CommandError, UserError, first_line
from clips.common.files import lock, open_regular
from clips.common.paths import cache_root, is_remote, without_secrets

log = logging.getLogger("clips.data")
T = TypeVar("T")
LISTING_BYTES = 2**26
"""Longest answer to a request without a range: a folder's listing."""
PATIENCE, SLOWEST = 30, 50_000
"""An answer may take PATIENCE seconds, and one more for every SLOWEST bytes that were asked for."""
DELAYS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds before each retry, times 0.5 to 1.5 so that many ranks do not retry at once."""
PASSING = (408, 425, 429)
"""HTTP statuses below 500 that are retried: too slow, too early, too many."""
BLOCK = 1 << 24
"""Bytes of one request: what a broken connection loses."""
SCAN_BYTES = 1 << 22
"""Bytes of one request if the full file is read."""
PART = ".part"
OF_DISK = 0.8
"""Largest share of the disk's free space that copies may take."""
VERSION = 5
"""Part of every stamp: raise it when the written format of a derived file changes."""
TAGS = ("mtime", "LastModified", "last_modified", "Last-Modified", "created", "ETag", "blob_id")
"""Names that stores give the time or the tag of a file."""


def store_of(url: str) -> tuple[Any, str]:
    """Return fsspec's filesystem of `url`, and the path in it."""
    bounded = {"get_client": _bounded_client} if url.startswith(("http://", "https://")) else {}
    return fsspec.core.url_to_fs(url, **bounded)


async def _bounded_client(**options: Any) -> Any:
    """Return a session that never unpacks an answer, and whose answers are `_bounded_answer`s."""
    import aiohttp  # of the optional fsspec[http]

    headers = {"Accept-Encoding": "identity", **(options.pop("headers", None) or {})}
    options |= {"auto_decompress": False, "response_class": _bounded_answer()}
    return aiohttp.ClientSession(headers=headers, **options)


@lru_cache
def _bounded_answer() -> Any:
    import aiohttp

    class BoundedAnswer(aiohttp.ClientResponse):
        """An answer that ends one byte after what was asked for, because fsspec reads any answer to its end."""

        async def start(self, connection: Any) -> Any:
            return await asyncio.wait_for(super().start(connection), PATIENCE)

        async def read(self) -> bytes:
            bounds = re.fullmatch(r"bytes=(\d+)-(\d+)", self.request_info.headers.get("Range", ""))
            most = int(bounds[2]) - int(bounds[1]) + 1 if bounds else LISTING_BYTES
            packed = self.headers.get("Content-Encoding", "identity").lower()
            if packed not in ("identity", ""):
                self.close()
                raise UserError(f"{self.url}: its server packs answers ({packed}); use one that sends plain files")
            seconds = PATIENCE + most / SLOWEST
            data = bytearray()

            async def come() -> None:
                async for piece in self.content.iter_any():
                    data.extend(piece[: most + 1 - len(data)])
                    if len(data) > most:
                        self.close()
                        return

            try:
                await asyncio.wait_for(come(), seconds)
            except asyncio.TimeoutError:
                self.close()
                raise ConnectionError(f"only {len(data):,} bytes came in {seconds:.0f} s") from None
            self._body = bytes(data)
            return self._body

    return BoundedAnswer


def remote_facts(url: str, *, fresh: bool = False) -> tuple[int, str]:
    """Return (size in bytes, text that changes with the file).

    `fresh` asks the store even if this process has a listing already. Raises like `patiently`, and OSError if the
    server gives no size.
    """

    def ask() -> dict:
        filesystem, path = store_of(url)
        if fresh:
            filesystem.invalidate_cache()
        return filesystem.info(path)

    info = patiently(url, ask)
    if info.get("size") is None:
        raise OSError("its server does not say how long it is; use one that sends Content-Length")
    return info["size"], f"{info['size']} {' '.join(str(info[name]) for name in TAGS if name in info)}"


def read_range(url: str, start: int, stop: int) -> bytes:
    """Return the bytes from `start` to before `stop`.

    Raises like `patiently`, and UserError if the server ignores ranges.
    """

    def ask() -> bytes:
        filesystem, path = store_of(url)
        data = filesystem.cat_file(path, start=start, end=stop)
        if len(data) < stop - start:
            raise ConnectionError(f"only {len(data)} of {stop - start} bytes came")
        return data

    data = patiently(url, ask)
    if len(data) > stop - start:
        raise UserError(f"{url}: its server answers with more than the range; use one that supports ranges")
    return data


def patiently(url: str, ask: Callable[[], T]) -> T:
    """Return the result of `ask`, retried after passing errors.

    Raises OSError for a final error, fsspec's ImportError and ValueError for an unknown protocol, and CommandError
    naming `url` after the last retry.
    """
    for delay in (*DELAYS, None):
        try:
            return ask()
        except (CommandError, ImportError, ValueError):
            raise
        except Exception as error:  # each store's library has its own errors
            causes = ", from ".join(f"{type(link).__name__}: {first_line(link)}" for link in _chain(error))
            if _is_final(error):
                raise OSError(causes) from error
            if delay is None:
                what = f"{url} cannot be read: {causes} ({len(DELAYS) + 1} attempts)"
                raise CommandError(f"{what}; the same command goes on once the network or the store does") from error
            log.warning("%s", without_secrets(f"{url}: {causes}; trying again"))
            time.sleep(delay * SystemRandom().uniform(0.5, 1.5))
    raise AssertionError("the last attempt returns or raises")


def _chain(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__


def _is_final(error: Exception) -> bool:
    """Return True if a retry is useless, by the HTTP status (aiohttp's `status`, botocore's `response`) if any.

    fsspec raises FileNotFoundError for many statuses, so the status decides first.
    """
    for link in _chain(error):
        response = getattr(link, "response", None)
        known = response.get("ResponseMetadata", {}) if isinstance(response, dict) else {}
        status = known.get("HTTPStatusCode", getattr(link, "status", None))
        if isinstance(status, int):
            return 400 <= status < 500 and status not in PASSING
    *_, last = _chain(error)
    return isinstance(last, (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError))


class RemoteFile(AbstractBufferedFile):
    """A file behind a URL that is read in requests of `block` bytes. Raises like `remote_facts`."""

    def __init__(self, url: str, block: int) -> None:
        self.url = url
        filesystem, path = store_of(url)
        super().__init__(filesystem, path, block_size=block, size=remote_facts(url)[0])

    def _fetch_range(self, start: int, end: int) -> bytes:
        return read_range(self.url, start, end)


def open_binary(url: str, buffer: int = SCAN_BYTES) -> BinaryIO:
    """Open a local path or an fsspec URL for reading. Raises UserError if that fails.

    A remote file is read in requests of `buffer` bytes.
    """
    try:
        return cast(BinaryIO, RemoteFile(url, buffer)) if is_remote(url) else open_regular(url)
    except (OSError, ImportError, ValueError) as error:
        raise UserError(f"{url} cannot be read: {error}") from None


# ----------------------------------------------------------------------------------------------------- states
def stamp(url: str, *, fresh: bool = False) -> str:
    """Return the stamp of a local or remote file: 12 hex digits that change when the file is changed.

    It depends on size and time or tag, not on the content. `fresh` is that of `remote_facts`. Raises UserError if the
    file cannot be read, and CommandError like `patiently`.
    """
    try:
        if is_remote(url):
            facts = remote_facts(url, fresh=fresh)[1]
        else:
            status = os.stat(url)
            facts = f"{status.st_size} {status.st_mtime_ns}"
    except (OSError, ImportError, ValueError) as error:
        raise UserError(f"{url} cannot be read: {error}") from None
    return hashlib.sha256(f"{VERSION}\n{facts}".encode()).hexdigest()[:12]


def check_state(url: str, state: str) -> None:
    """Raise UserError if the file at `url` has changed since its index was made, when its stamp was `state`."""
    if stamp(url, fresh=True) != state:
        raise UserError(f"{url} has changed since this run opened it: start the command again, and it is indexed anew")


# ----------------------------------------------------------------------------------------------------- copies
class Copies:
    """Full copies of remote files in `folder`, together at most `limit` bytes, shared by the processes of a machine.

    A copy is renamed into place when it is complete. A lock lets one process fetch it while others wait or continue.
    The least recently used copy is removed first. What a killed process leaves is removed by the next one.
    """

    def __init__(self, limit: int, folder: Path | None = None) -> None:
        """Make the folder. Raises UserError if that fails."""
        self.folder = folder or cache_root() / "remote"
        try:
            (self.folder / "locks").mkdir(parents=True, exist_ok=True)
            with lock(self.folder / "locks" / "total", wait=True):
                present = self._shrunk(limit)
                self.limit = min(limit, int(OF_DISK * (shutil.disk_usage(self.folder).free + present)))
        except OSError as error:
            raise self._unwritable(error) from None

    def open(self, url: str, state: str, *, wait: bool = True) -> BinaryIO | None:
        """Return the copy of `url` in `state` (its stamp), fetched if it is missing, or None if there is no room.

        Raises BlockingIOError if another process fetches it and `wait` is off, UserError for a changed file and an
        unwritable folder, and CommandError and OSError like `read_range`.
        """
        path = self.folder / f"{hashlib.sha256(url.encode('utf-8', 'surrogateescape')).hexdigest()[:24]}-{state}"
        if (copy := _opened(path)) is not None:
            return copy
        with lock(self._lock_of(path), wait=wait):
            return _opened(path) or self._fetched(url, state, path)

    def _fetched(self, url: str, state: str, path: Path) -> BinaryIO | None:
        size, _ = remote_facts(url, fresh=True)
        part = path.with_name(path.name + PART)
        try:
            with lock(self.folder / "locks" / "total", wait=True):
                if self._shrunk(self.limit - size) + size > self.limit:
                    return None
                file = cast(BinaryIO, open(part, "w+b"))  # noqa: SIM115 - closed by its reader
                file.truncate(size)  # so that others count it
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

    def _shrunk(self, most: int) -> int:
        """Remove the least recently used copies until at most `most` bytes are left. Return the bytes left."""
        total = 0
        copies = []
        for entry in os.scandir(self.folder):
            if not entry.is_file() or "-" not in entry.name:
                continue
            path = Path(entry.path)
            if entry.name.endswith(PART):
                try:
                    lock(self._lock_of(path), wait=False).close()
                    path.unlink()  # left by a process that was killed
                    continue
                except BlockingIOError:
                    pass  # being written
                except FileNotFoundError:
                    continue
            with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
                total += entry.stat().st_size
                if not entry.name.endswith(PART):
                    copies.append((entry.stat().st_mtime, entry.stat().st_size, path))

        for _, size, path in sorted(copies):
            if total <= most:
                break
            path.unlink(missing_ok=True)
            total -= size
        return total

    def _lock_of(self, path: Path) -> Path:
        return self.folder / "locks" / path.name[:3]  # at most 4,096 locks; copies that share one wait for each other

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
