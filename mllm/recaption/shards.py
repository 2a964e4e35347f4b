"""The units of work: parts of the source go in, tar shards that pretraining reads by default come out.

A tar shard becomes one shard; a table becomes a shard for every ROWS rows. Pretraining's default `Fields()` name the
members: the picture under its extension, the web caption in the JSON member, the long caption as text. A source member
that has one of these names is kept as `source.…`.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import posixpath
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from clips import BrokenSample, Fields, Source, StoredSample
from clips.common.files import from_json, fsync

ROWS = 10_000
"""Rows of a table in one shard."""
PICTURE_THREADS = 16
"""Picture files of a table that are read at once."""
IMAGES = Fields().image.split(";")
WEB = Fields().web.removeprefix("json:")
LONG = Fields().long
KEPT = "source"


@dataclass(frozen=True)
class Shard:
    name: str
    """Unique; its file is NAME.tar."""
    url: str
    """The source file."""
    first: int
    stop: int
    """The samples [first, stop) of the source."""
    left_out: int
    """Samples of the file that lack a needed member."""

    def __len__(self) -> int:
        return self.stop - self.first


def shards_of(source: Source) -> list[Shard]:
    """The shards of a source, in its order; a file without samples makes none."""
    stems = [posixpath.splitext(posixpath.basename(url))[0] for url in source.files]
    times = Counter(stems)
    found, first = [], 0
    for stem, url, size, left_out in zip(stems, source.files, source.shard_sizes, source.left_out, strict=True):
        if times[stem] > 1:  # files of several folders have the same name
            folder = posixpath.dirname(url if "://" in url else os.path.abspath(url))
            stem = f"{stem}-{hashlib.sha256(folder.encode('utf-8', 'surrogateescape')).hexdigest()[:8]}"
        if url.endswith(".tar"):
            parts = [(stem, first, first + size)] if size else []
        else:
            begins = range(first, first + size, ROWS)
            parts = [(f"{stem}-{i:05d}", b, min(b + ROWS, first + size)) for i, b in enumerate(begins)]
        found += [Shard(name, url, begin, stop, left_out) for name, begin, stop in parts]
        first += size
    return found


def read_samples(source: Source, shard: Shard, indices: Sequence[int]) -> list[StoredSample | BrokenSample]:
    """The samples, or the reason why a sample cannot be read. Raises UserError and CommandError as the source does."""

    def read(index: int) -> StoredSample | BrokenSample:
        try:
            return source.stored(index)
        except BrokenSample as error:
            return error

    if shard.url.endswith(".tar"):  # a file has one position
        return [read(index) for index in indices]
    with ThreadPoolExecutor(PICTURE_THREADS) as pool:
        return list(pool.map(read, indices))


def with_caption(sample: StoredSample, long: str) -> Iterator[tuple[str, bytes]]:
    """(extension, content) of each member of the written sample, in order."""
    picture = sample.picture.lower() if sample.picture.lower() in IMAGES else IMAGES[0]
    others = dict(sample.others)
    moved = {}
    for name in (*IMAGES[: IMAGES.index(picture) + 1], LONG):  # pretraining would find these first
        if name in others:
            moved[name] = others.pop(name)
    yield picture, sample.image
    yield "json", _with_web(others.pop("json", b"{}"), sample.web)
    yield LONG, long.encode()
    for name, data in moved.items():
        yield _free(f"{KEPT}.{name}", others), data
    yield from sorted(others.items())


def _with_web(stored: bytes, web: str) -> bytes:
    """The JSON member with the web caption for pretraining; unchanged if the caption is there already."""
    content: dict[str, Any] = from_json(stored)
    if content.get(WEB) == web:
        return stored
    if WEB in content:
        content[_free(f"{KEPT}_{WEB}", content)] = content.pop(WEB)
    return json.dumps(content | {WEB: web}).encode()


def _free(name: str, taken: Any) -> str:
    """`name`, with a number if it is taken: the set may have been recaptioned before."""
    number = 1
    while (numbered := name if number == 1 else f"{name}{number}") in taken:
        number += 1
    return numbered


class ShardWriter:
    """A tar file that is equal, byte by byte, for equal samples. The end of the `with` flushes it to the disk."""

    def __init__(self, path: Path) -> None:
        self.path, self.samples = path, 0
        self._digest = hashlib.sha256()

    def __enter__(self) -> ShardWriter:
        self._file: BinaryIO = open(self.path, "wb")
        self._tar = tarfile.open(fileobj=_Hashing(self._file, self._digest), mode="w|", format=tarfile.PAX_FORMAT)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._file:
            if kind is None:
                self._tar.close()
        if kind is None:
            fsync(self.path)
        else:  # a part of a shard is of no use, and takes room on a full disk
            self.path.unlink(missing_ok=True)

    def add(self, name: str, members: Iterable[tuple[str, bytes]]) -> None:
        for extension, data in members:
            info = tarfile.TarInfo(f"{name}.{extension}")
            info.size = len(data)
            self._tar.addfile(info, io.BytesIO(data))
        self.samples += 1

    @property
    def sha256(self) -> str:
        """The hash of the closed file."""
        return self._digest.hexdigest()

    @property
    def size(self) -> int:
        """Bytes of the closed file."""
        return self.path.stat().st_size


class _Hashing(io.RawIOBase):
    """Writes to a file and to a digest."""

    def __init__(self, file: BinaryIO, digest: Any) -> None:
        self._file, self._digest = file, digest

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._digest.update(data)
        return self._file.write(data)


class ContentHash:
    """SHA-256 over names, images and other members of samples, each part after its length."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, sample: StoredSample | BrokenSample) -> None:
        if isinstance(sample, BrokenSample):
            parts = [b"broken"]
        else:
            parts = [sample.name.encode("utf-8", "surrogateescape"), sample.picture.encode(), sample.image]
            parts += [part for name, data in sorted(sample.others.items()) for part in (name.encode(), data)]
        for part in parts:
            self._digest.update(len(part).to_bytes(8, "big"))
            self._digest.update(part)

    def hexdigest(self) -> str:
        return self._digest.hexdigest()
