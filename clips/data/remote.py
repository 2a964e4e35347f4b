"""Files behind fsspec URLs, read by ranges, with retries.

A final error of the store (no such file, no permission) is an OSError at once. A passing error is retried, and is a
CommandError that names the URL after the last retry.
"""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Callable, Iterator
from random import SystemRandom
from typing import TypeVar

import fsspec

from clips.common.errors import CommandError, UserError, first_line

log = logging.getLogger("clips.data")
T = TypeVar("T")
DELAYS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds before each retry, times 0.5 to 1.5 so that many ranks do not retry at once."""
PASSING = (408, 425, 429)
"""HTTP statuses below 500 that are retried: too slow, too early, too many."""
TAGS = ("mtime", "LastModified", "last_modified", "Last-Modified", "created", "ETag")
"""Names that stores give the time or the tag of a file."""


def remote_facts(url: str, *, fresh: bool = False) -> tuple[int, str]:
    """(size in bytes, text that changes with the file). Raises as `patiently`, and OSError without a size.

    `fresh` asks the store even if this process has a listing already.
    """

    def ask() -> dict:
        filesystem, path = fsspec.core.url_to_fs(url)
        if fresh:
            filesystem.invalidate_cache()
        return filesystem.info(path)

    info = patiently(url, ask)
    if info.get("size") is None:
        raise OSError("its server does not say how long it is; use one that sends Content-Length")
    return info["size"], f"{info['size']} {' '.join(str(info[name]) for name in TAGS if name in info)}"


def read_range(url: str, start: int, stop: int) -> bytes:
    """Bytes `start` … `stop - 1`. Raises as `patiently`, and UserError if the server ignores ranges."""

    def ask() -> bytes:
        filesystem, path = fsspec.core.url_to_fs(url)
        data = filesystem.cat_file(path, start=start, end=stop)
        if len(data) < stop - start:
            raise ConnectionError(f"only {len(data)} of {stop - start} bytes came")
        return data

    data = patiently(url, ask)
    if len(data) > stop - start:
        raise UserError(
            f"{url}: its server answers a request for a range with more than that; "
            "use one that knows ranges (nginx, Apache, any object store)"
        )
    return data


def patiently(url: str, ask: Callable[[], T]) -> T:
    """The result of `ask`, retried after passing errors.

    Raises OSError for a final error, fsspec's ImportError and ValueError for an unknown protocol, and CommandError
    naming `url` after the last retry.
    """
    for delay in (*DELAYS, None):
        try:
            return ask()
        except (CommandError, ImportError, ValueError):
            raise
        except Exception as error:  # each store's library has its own errors
            said = ", from ".join(f"{type(link).__name__}: {first_line(link)}" for link in _chain(error))
            if _is_final(error):
                raise OSError(said) from error
            if delay is None:
                raise CommandError(
                    f"{url} cannot be read: {said} ({len(DELAYS) + 1} attempts in about {sum(DELAYS):.0f} s); "
                    "the same command goes on once the network or the store does"
                ) from error
            log.warning("%s: %s; trying again", url, said)
            time.sleep(delay * SystemRandom().uniform(0.5, 1.5))
    raise AssertionError("the last attempt returns or raises")


def _chain(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__


def _is_final(error: Exception) -> bool:
    """Whether a retry is useless, by the HTTP status (aiohttp's `status`, botocore's `response`) if there is one.

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


class RemoteFile(io.RawIOBase):
    """A file behind a URL; every read is one request. Raises as `remote_facts`."""

    def __init__(self, url: str) -> None:
        self.url, self._position = url, 0
        self._size = remote_facts(url)[0]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        return self._position

    def readinto(self, buffer) -> int:  # any writable buffer
        length = max(0, min(len(buffer), self._size - self._position))
        if length:
            buffer[:length] = read_range(self.url, self._position, self._position + length)
        self._position += length
        return length
