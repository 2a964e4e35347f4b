"""Files behind fsspec URLs, read by ranges, with retries.

An HTTP server's answer is bounded by what was asked for, in bytes and in time, and is never unpacked. A final error of
the store (no such file, no permission) is an OSError at once. A passing error is retried, and is a CommandError that
names the URL after the last retry.
"""

from __future__ import annotations

import asyncio
import io
import ipaddress
import logging
import re
import socket
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from random import SystemRandom
from typing import Any, TypeVar
from urllib.parse import urljoin, urlsplit

import fsspec

from clips.common.errors import CommandError, UserError, first_line
from clips.common.paths import without_secrets

log = logging.getLogger("clips.data")
T = TypeVar("T")
LISTING_BYTES = 2**26
"""Longest answer to a request without a range: a folder's listing."""
PATIENCE, SLOWEST = 30, 50_000
"""An answer may take so many seconds, and one more for each so many bytes that were asked for."""
DELAYS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds before each retry, times 0.5 to 1.5 so that many ranks do not retry at once."""
PASSING = (408, 425, 429)
"""HTTP statuses below 500 that are retried: too slow, too early, too many."""
TAGS = ("mtime", "LastModified", "last_modified", "Last-Modified", "created", "ETag")
"""Names that stores give the time or the tag of a file."""


def store_of(url: str) -> tuple[Any, str]:
    """fsspec's filesystem of `url`, and the path in it."""
    bounded = {"get_client": _bounded_client} if url.startswith(("http://", "https://")) else {}
    return fsspec.core.url_to_fs(url, **bounded)


async def _bounded_client(**options: Any) -> Any:
    """A session that never unpacks an answer, and whose answers are `_bounded_answer`s."""
    import aiohttp  # of the optional fsspec[http]

    async def follow(session: Any, context: Any, redirect: Any) -> None:
        asked = str(redirect.url)
        if _is_public(asked):
            check_public(urljoin(asked, redirect.response.headers.get("Location", "")))

    trace = aiohttp.TraceConfig()
    trace.on_request_redirect.append(follow)
    headers = {"Accept-Encoding": "identity", **(options.pop("headers", None) or {})}
    options |= {"auto_decompress": False, "response_class": _bounded_answer(), "trace_configs": [trace]}
    return aiohttp.ClientSession(headers=headers, **options)


@lru_cache
def _bounded_answer() -> Any:
    import aiohttp

    class BoundedAnswer(aiohttp.ClientResponse):
        """fsspec reads an answer whole, whatever was asked for; this answer ends one byte behind that."""

        async def start(self, connection: Any) -> Any:
            return await asyncio.wait_for(super().start(connection), PATIENCE)

        async def read(self) -> bytes:
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.request_info.headers.get("Range", ""))
            most = int(asked[2]) - int(asked[1]) + 1 if asked else LISTING_BYTES
            if (packed := self.headers.get("Content-Encoding", "identity").lower()) not in ("identity", ""):
                self.close()
                raise UserError(
                    f"{self.url}: its server packs the answer ({packed}); use one that sends files as they are"
                )
            seconds, data = PATIENCE + most / SLOWEST, bytearray()

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


def check_public(url: str, flag: str = "") -> None:
    """Raise UserError for an address of this machine or of its network, where data of strangers may not lead.

    What a user types is not checked; `flag` is the one with which he does.
    """
    if not _is_public(url):
        typed = f" (if it is yours, give it with {flag})" if flag else ""
        raise UserError(f"{without_secrets(url)} is a private address, and data may not lead there{typed}")


def _is_public(url: str) -> bool:
    """Whether no address of the host is private, loopback or link-local. A host that is not found is public."""
    try:
        found = socket.getaddrinfo(urlsplit(url).hostname or "-", None)
    except (OSError, ValueError):
        return True
    addresses = (ipaddress.ip_address(str(place[0]).partition("%")[0]) for *_, place in found)
    return all((getattr(address, "ipv4_mapped", None) or address).is_global for address in addresses)


def remote_facts(url: str, *, fresh: bool = False) -> tuple[int, str]:
    """(size in bytes, text that changes with the file). Raises as `patiently`, and OSError without a size.

    `fresh` asks the store even if this process has a listing already.
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
    """Bytes `start` … `stop - 1`. Raises as `patiently`, and UserError if the server ignores ranges."""

    def ask() -> bytes:
        filesystem, path = store_of(url)
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


def read_whole(url: str, most: int) -> bytes:
    """A file of at most `most` bytes, in one request. Raises as `patiently`, and OSError for a longer file."""

    def ask() -> bytes:
        filesystem, path = store_of(url)
        return filesystem.cat_file(path, start=0, end=most + 1)

    data = patiently(url, ask)
    if len(data) > most:
        raise OSError(f"it has more than {most:,} bytes")
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
            log.warning("%s", without_secrets(f"{url}: {said}; trying again"))
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
