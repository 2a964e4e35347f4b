"""The Arrow index of one shard or table, a row for each usable sample."""

import hashlib
import json
import os
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from clips.common.errors import UserError
from clips.common.escape import clip
from clips.common.files import placing
from clips.common.paths import without_secrets
from clips.config import OTHERS, Fields
from clips.data.importing.tar import Place
from clips.data.sample import Texts, texts_in

BATCH = 1 << 14
"""Rows of a record batch of an index, so that row i is in batch i // BATCH."""
MOST_ROWS = 1000
"""Rows of one image whose captions are kept: reading one sample must not take seconds."""
EXAMPLES = 1000
"""Skipped rows that the manifest lists; further ones are counted."""
SCHEMA = pa.schema(
    [
        ("key", pa.binary()), ("offset", pa.int64()), ("size", pa.int64()), ("path", pa.binary()),
        ("web", pa.list_(pa.binary())), ("long", pa.list_(pa.binary())), ("hash", pa.uint64()), ("extra", pa.binary()),
    ]
)  # fmt: skip
"""Columns of an index: the sample's key, its image (offset and size in the shard or the `.images` file, or a path below
the part's root), captions, hash of the image's identity, and its other cells as JSON. Texts are UTF-8, in which lone
surrogates are allowed."""


def image_hash(identity: bytes) -> int:
    """Return the hash of an image's identity (its bytes, its path, or the value of `key`), below 2⁶⁴."""
    return int.from_bytes(hashlib.sha256(b"held out" + identity).digest()[:8], "little")


class IndexWriter:
    """Writes the index of one part, with the bytes of images that are in no file of their own."""

    def __init__(self, stem: Path, most: int | None, bar: tqdm) -> None:
        self.path, self.images = stem.with_suffix(".arrow"), stem.with_suffix(".images")
        self.rows = self.gathered = self.skipped_rows = 0
        self.skipped: Counter[str] = Counter()
        self.examples: list[tuple[str, str]] = []
        self.notes: list[str] = []
        self._most = most
        """Most bytes of images that are stored, or None."""
        self._bar = bar
        self._columns: list[list[Any]] = [[] for _ in SCHEMA]
        self._stored: dict[bytes, Place] = {}
        self._blob: BinaryIO | None = None

    def __enter__(self) -> None:
        self._part = self.path.with_suffix(".part")
        self._writer: pa.ipc.RecordBatchFileWriter | None = pa.ipc.new_file(str(self._part), SCHEMA)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if kind is None:
            self._close()
            os.replace(self._part, self.path)
        else:
            if self._writer is not None:
                self._writer.close()
            self._part.unlink(missing_ok=True)
        if self._blob is not None:
            self._blob.close()

    def store(self, image: bytes) -> Place:
        """Append an image to the `.images` file, once, and return its place there."""
        digest = hashlib.blake2b(image, digest_size=16).digest()
        if digest not in self._stored:
            if self._blob is None:
                self._blob = open(self.images, "wb")  # noqa: SIM115 - closed with the index
            offset = self._blob.tell()
            if self._most is not None and offset + len(image) > self._most:
                raise UserError(
                    f"its images need more than data.cache_gb = {self._most / 1e9:g} of the cache: raise it"
                )
            self._blob.write(image)
            self._stored[digest] = (offset, len(image))
        return self._stored[digest]

    def add(
        self, key: str, place: Place | str, web: list[str], long: list[str], hashed: int, extra: dict[str, Any]
    ) -> None:
        """Append a usable sample."""
        path, (offset, size) = (place, (None, None)) if isinstance(place, str) else (None, place)
        row = (
            key.encode("utf-8", "surrogatepass"), offset, size, None if path is None else os.fsencode(path),
            [text.encode("utf-8", "surrogatepass") for text in web],
            [text.encode("utf-8", "surrogatepass") for text in long],
            hashed, json.dumps(extra, default=_as_text).encode(),
        )  # fmt: skip
        for column, cell in zip(self._columns, row, strict=True):
            column.append(cell)
        self.rows += 1
        if len(self._columns[0]) == BATCH:
            self._flush()

    def skip(self, key: str, reason: str, count: int = 1) -> None:
        """Count a row that cannot be used."""
        self.skipped[reason.partition(":")[0]] += count
        self.skipped_rows += count
        if len(self.examples) < EXAMPLES:
            self.examples.append((key, clip(reason, 300)))

    def group(self) -> bool:
        """Make one row of the rows of each image, in order of first appearance; return False if no image has two."""
        self._close()
        images = np.frombuffer(self._identities(), "<u8") if self.rows else np.empty(0, "<u8")
        _, first, of_row = np.unique(images, return_index=True, return_inverse=True)
        if len(first) == len(images):
            return False
        by_first = np.argsort(np.argsort(first))  # number of each image in order of first appearance
        order = np.argsort(by_first[of_row], kind="stable")
        begins = np.flatnonzero(np.diff(by_first[of_row][order], prepend=-1))
        rank = np.arange(len(order)) - np.repeat(begins, np.diff(np.append(begins, len(order))))
        order = order[rank < MOST_ROWS]
        begins = np.flatnonzero(rank[rank < MOST_ROWS] == 0)
        with pa.memory_map(str(self._part)) as file:
            table = pa.ipc.open_file(file).read_all().take(pa.array(order)).combine_chunks()
            columns = {name: table[name].take(pa.array(begins)).combine_chunks() for name in SCHEMA.names}
            for name in ("web", "long"):
                lists = table[name].combine_chunks()
                offsets = np.append(np.asarray(lists.offsets)[begins], np.asarray(lists.offsets)[-1])
                columns[name] = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), lists.values)
            grouped = pa.table(columns, schema=SCHEMA)
        with pa.ipc.new_file(str(self._part), SCHEMA) as writer:
            for batch in grouped.to_batches(max_chunksize=BATCH):
                writer.write_batch(batch)
        self.gathered = self.rows - len(begins)
        self.rows = len(begins)
        return True

    def _identities(self) -> bytes:
        """Return a hash of each row's image, whatever `key` says: its place, or its path."""
        with pa.memory_map(str(self._part)) as file:
            table = pa.ipc.open_file(file).read_all().select(["offset", "path"]).to_pydict()
        pairs = zip(table["offset"], table["path"], strict=True)
        return b"".join(hashlib.blake2b(repr(pair).encode(), digest_size=8).digest() for pair in pairs)

    def finish(self, fields: Fields | None) -> dict[str, Any]:
        """Write the rows without a long caption, and return what the manifest says of this part."""
        short = array("q")
        others = fields is not None and fields.long == OTHERS
        for number, row in enumerate(read_rows(self.path)):
            if not row[4] or not texts_of(row[4], row[5], others).pair()[1]:
                short.append(number)
        if short:
            with placing(self.path.with_suffix(".short")) as file:
                short.tofile(file)
        return {
            "index": self.path.name, "images": self.images.name if self._stored else None, "samples": self.rows,
            "rows": self.rows + self.gathered + self.skipped_rows, "without_long": len(short),
            "skipped": dict(self.skipped), "examples": self.examples, "notes": list(map(without_secrets, self.notes)),
            **digests_of(row[4:7] for row in read_rows(self.path)),
        }  # fmt: skip

    def _flush(self) -> None:
        if self._columns[0] and self._writer is not None:
            arrays = [pa.array(column, field.type) for column, field in zip(self._columns, SCHEMA, strict=True)]
            self._writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=SCHEMA))
            self._bar.update(len(self._columns[0]))
            self._columns = [[] for _ in SCHEMA]

    def _close(self) -> None:
        if self._writer is not None:
            self._flush()
            self._writer.close()
            self._writer = None


def read_rows(path: Path) -> Iterator[tuple[Any, ...]]:
    """Yield the rows of an index as tuples in the order of SCHEMA."""
    with pa.memory_map(str(path)) as file:
        reader = pa.ipc.open_file(file)
        for number in range(reader.num_record_batches):
            yield from zip(*(column.to_pylist() for column in reader.get_batch(number).columns), strict=True)


def digests_of(rows: Iterable[tuple[list[bytes], list[bytes], int]]) -> dict[str, str]:
    """Return the SHA-256 of the captions of all rows, and that of their hashes."""
    captions, hashes = hashlib.sha256(), hashlib.sha256()
    for web, long, hashed in rows:
        captions.update(b"\1".join([b"\0".join(web), b"\0".join(long)]) + b"\2")
        hashes.update(hashed.to_bytes(8, "little"))
    return {"captions_sha256": captions.hexdigest(), "hashes_sha256": hashes.hexdigest()}


def texts_of(web: list[bytes], long: list[bytes], others: bool) -> Texts:
    """Return the captions of a row. Of several, the first that have at most MAX_CAPTION characters together."""
    first, second = (_bounded([text.decode("utf-8", "surrogatepass") for text in texts]) for texts in (web, long))
    return Texts(first, second, others)


def _bounded(texts: list[str]) -> tuple[str, ...]:
    return tuple(texts) if len(texts) < 2 else tuple(texts_in("", "", texts))


def _as_text(value: Any) -> str | None:
    if isinstance(value, bytes):
        return None if b"\0" in value[:64] else value.decode("utf-8", "replace")
    return str(value)
