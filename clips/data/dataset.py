"""A data set that has been imported: samples by index, from Arrow indexes that are memory-mapped.

One class serves shards, tables, folders and mixes, because the import (clips/data/importing) has turned all of them
into indexes with the same columns. A data set can be pickled and opens its files lazily in each process; a worker's
memory does not grow with the number of rows.
"""

from __future__ import annotations

import bisect
import copy
import hashlib
import itertools
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from clips.common.errors import UserError, reason
from clips.common.escape import clip
from clips.common.files import read_json, read_regular, sha256
from clips.common.paths import is_remote, without_secrets
from clips.config import OTHERS, Fields
from clips.data.images import MAX_BYTES
from clips.data.importing import CHOICES, ImportOptions, import_data, missing_field, state_of
from clips.data.importing.index import BATCH, digests_of, image_hash, texts_of
from clips.data.importing.layouts import MANIFEST, warn_once
from clips.data.order import MixedOrder, Order, SampleOrder
from clips.data.remote import RemoteFile, check_state, open_binary
from clips.data.sample import BrokenSample, RawSample, Texts

OPEN_PARTS = 64
"""Parts that a process keeps open, about as many as one group of the order touches."""
SAMPLE_BYTES = 1 << 18
"""Bytes of one request to a remote file if single samples are read; most are smaller."""
LONGEST_PATH = 200
"""Characters of an image's path that a sample's name shows."""
KEY, OFFSET, SIZE, PATH, WEB, LONG, HASH, EXTRA = range(8)
SAMPLE = (KEY, OFFSET, SIZE, PATH, WEB, LONG, EXTRA)


def open_data(
    spec: str, fields: Fields, *, image_root: str | None = None, need_long: bool, key: str | None = None,
    allow_outside: bool = False, cache_gb: float = 50,
) -> Dataset:  # fmt: skip
    """Open image–caption data by its files or its manifest; what is not imported yet is imported first.

    Raises UserError if a file is missing, a field cannot be found, or shards and tables are mixed.

    Args:
        spec: a file, a folder, a glob, a brace pattern, a URL (several are joined by `;`), or a manifest.json.
        fields: where image and captions are found in a sample; parts left open are guessed.
        image_root: folder to which a table's image paths are relative (default: guessed).
        need_long: leave out samples without a long caption. It is an error if there are none with one.
        key, allow_outside: see `ImportOptions`.
        cache_gb: most GB of this machine's disk for copies of remote data.
    """
    if os.path.basename(spec) == MANIFEST:
        dataset = Dataset.open(Path(spec))
    else:
        options = ImportOptions(
            fields=fields, image_root=image_root, key=key, allow_outside=allow_outside, cache_bytes=int(cache_gb * 1e9)
        )
        dataset = Dataset.open(*import_data(spec, options))
    for line in dataset.notes:
        warn_once(line)
    return dataset.with_long() if need_long else dataset


@dataclass
class Part:
    """One imported shard or table."""

    url: str
    folder: Path
    """Folder of its index."""
    facts: dict[str, Any]
    """Its entry in the manifest."""
    others: bool
    """True if the long caption is made of other web captions."""
    rows: np.ndarray | None = None
    """The rows that are left, or None for all of them."""

    def __len__(self) -> int:
        return self.facts["samples"] if self.rows is None else len(self.rows)

    def digests(self) -> dict[str, str]:
        """Return the hashes of captions and images of the rows that are left."""
        return digests_of(zip(*(self.column(number).to_pylist() for number in (WEB, LONG, HASH)), strict=True))

    def column(self, number: int) -> Any:
        """Return a column of all rows that are left, as a pyarrow array."""
        column = open_index(self).read_all().column(number)
        return column if self.rows is None else column.take(pa.array(self.rows))


def open_index(part: Part) -> pa.ipc.RecordBatchFileReader:
    """Map the index of a part. Raises UserError if it is damaged or gone."""
    path = part.folder / part.facts["index"]
    try:
        return pa.ipc.open_file(pa.memory_map(str(path)))
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(f"{path} is damaged ({error}): remove its folder, and it is imported anew") from None


class Dataset:
    """Random access to imported samples; neighbours in a part are cheap to read."""

    def __init__(self, parts: Sequence[Part], manifest: dict[str, Any] | None = None, path: Path | None = None) -> None:
        self.parts, self.path, self._manifest = list(parts), path, manifest or {}
        self.notes: list[str] = self._manifest.get("notes", [])
        """What was guessed, damaged and skipped, as lines of text."""
        self.shares: list[float] = []
        self._bounds = [0, len(self.parts)]
        """In a mix: the first part of each set, and the number of parts."""
        self._set_sizes()
        self._metadata: dict[str, Any] | None = None
        self._open: OrderedDict[int, tuple[Any, BinaryIO | None]] = OrderedDict()
        self._process = os.getpid()
        self._copies: Callable[[int], BinaryIO | None] | None = None

    @classmethod
    def open(cls, manifest: Path, urls: Sequence[str] | None = None) -> Dataset:
        """Open an import. `urls` replace those of the manifest, which holds no credentials.

        Raises UserError if the manifest cannot be read, or if a file has changed since the import.
        """
        content = read_json(manifest)
        if "parts" not in content:
            raise UserError(f"{manifest} is no manifest of an import: give the data, or run scripts/check_data.py DATA")
        others = content["fields"]["long"] == OTHERS
        entries = content["parts"]
        parts = [
            Part(url or entry["url"], manifest.parent, entry, others)
            for url, entry in itertools.zip_longest(urls or [], entries)
        ]
        for part in parts if urls is None else ():
            if state_of(part.url) != part.facts["state"]:
                raise UserError(
                    f"{part.url} has changed since it was imported: python scripts/check_data.py {content['spec']}"
                )
        return cls(parts, content, manifest)

    @staticmethod
    def mix(sets: Sequence[Dataset], shares: Sequence[float]) -> Dataset:
        """Join data sets; training sees each as often as its share says. Raises ValueError for a share near 0."""
        dataset = Dataset([part for one in sets for part in one.parts])
        dataset.notes = [line for one in sets for line in one.notes]
        dataset.shares = list(shares)
        dataset._bounds = [0, *itertools.accumulate(len(one.parts) for one in sets)]
        dataset.order(0)
        return dataset

    def __len__(self) -> int:
        return self._starts[-1]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": OrderedDict(), "_copies": None}

    def _set_sizes(self) -> None:
        self.part_sizes = [len(part) for part in self.parts]
        self._starts = [0, *itertools.accumulate(self.part_sizes)]

    # ---------------------------------------------------------------------------------------------------- selections
    def where(self, keep: Callable[[Part], np.ndarray]) -> Dataset:
        """Return the data set of the samples for which `keep(part)`, bool [samples of the part], is True."""
        selected = copy.copy(self)
        selected.parts = [copy.copy(part) for part in self.parts]
        for part in selected.parts:
            rows = np.arange(part.facts["samples"]) if part.rows is None else part.rows
            part.rows = rows[keep(part)]
        selected._open, selected._metadata = OrderedDict(), None
        selected._set_sizes()
        return selected

    def without(self, names: Sequence[str]) -> Dataset:
        """Return the samples except those of `names`, as `metadata` lists rows that could not be used."""
        left_out = set(names)

        def keep(part: Part) -> np.ndarray:
            keys = part.column(KEY).to_pylist()
            return np.array([self._name(part, key) not in left_out for key in keys], bool)

        return self.where(keep)

    def with_long(self) -> Dataset:
        """Return the samples that have a long caption. Raises UserError if there are none."""
        fields = Fields(**self._manifest["fields"])
        if fields.web == fields.long:
            raise UserError(f"data.fields: web and long are both {fields.web!r}, and must be different texts.{CHOICES}")
        if all(part.facts["without_long"] == part.facts["samples"] for part in self.parts):
            raise missing_field(self.name, "long", fields.long, self._manifest["names"])
        if not any(part.facts["without_long"] for part in self.parts):
            return self

        def has_long(part: Part) -> np.ndarray:
            mask = np.ones(part.facts["samples"], bool)
            if part.facts["without_long"]:
                mask[np.fromfile(part.folder / Path(part.facts["index"]).with_suffix(".short"), np.int64)] = False
            return mask if part.rows is None else mask[part.rows]

        kept = self.where(has_long)
        lost = len(self) - len(kept)
        kept.notes = [*self.notes, f"{self.name}: {lost:,} of {len(self):,} samples are skipped without a long caption"]
        warn_once(kept.notes[-1])
        return kept

    def hashes(self, base: str | None = None) -> np.ndarray:
        """Return a hash of each sample's image, uint64 [samples], the same on every machine.

        `base`: folder relative to which a path identifies an image (default: that of the import).
        """
        if base is None or all(part.facts["identity"] != "path" for part in self.parts):
            columns = [part.column(HASH).to_numpy() for part in self.parts]
            return np.concatenate(columns) if columns else np.empty(0, np.uint64)
        paths = ((part, path) for part in self.parts for path in part.column(PATH).to_pylist())
        folders = (
            os.path.relpath(os.path.join(os.path.abspath(part.facts["root"]), os.fsdecode(p)), base)
            for part, p in paths
        )
        return np.array([image_hash(os.fsencode(path)) for path in folders], np.uint64)

    # ------------------------------------------------------------------------------------------------------- metadata
    @property
    def name(self) -> str:
        """Its files in messages."""
        urls = [without_secrets(part.url) for part in self.parts]
        return urls[0] if len(urls) == 1 else f"{urls[0]} … {urls[-1]} ({len(urls)} files)"

    @property
    def files(self) -> list[str]:
        """The URLs of its parts."""
        return [part.url for part in self.parts]

    @property
    def base(self) -> str:
        """Folder of the image paths of the first table."""
        return os.path.abspath(self.parts[0].facts["root"] or ".")

    @property
    def skipped(self) -> tuple[int, int]:
        """Rows that cannot be used, and all rows; samples of shards that lack a member are not among them."""
        skipped = [sum(part.facts["skipped"].values()) for part in self.parts]
        incomplete = [sum(part.facts["skipped"].get(name, 0) for name in INCOMPLETE) for part in self.parts]
        return sum(skipped) - sum(incomplete), sum(part.facts["rows"] for part in self.parts) - sum(incomplete)

    def metadata(self) -> dict[str, Any]:
        """Return the numbers of samples and files, hashes of captions and of images, and the manifest's path.

        They are computed once: a selection has to read its captions for that.
        """
        if self._metadata is None:
            parts = [part.digests() if part.rows is not None else part.facts for part in self.parts]
            self._metadata = {"samples": len(self), "files": len(self.parts)}
            for name in ("captions_sha256", "hashes_sha256"):
                self._metadata[name] = hashlib.sha256("".join(facts[name] for facts in parts).encode()).hexdigest()
            self._metadata["manifest"] = str(self.path) if self.path else None
            unusable = [self._name(part, key.encode()) for part in self.parts for key, _ in part.facts["examples"]]
            self._metadata["unusable"] = unusable
        return self._metadata

    def listing(self) -> str:
        """Return the SHA-256 that data.json of earlier versions has of names, sizes and sample counts of all files."""
        names = [os.path.basename(without_secrets(part.url)) for part in self.parts]
        text = json.dumps([names, [part.facts["size"] for part in self.parts], self.part_sizes])
        return hashlib.sha256(text.encode()).hexdigest()

    def verify(self) -> None:
        """Compare the SHA-256 of every local file with the manifest's. Raises UserError for one that differs."""
        for part in self.parts:
            if part.facts["sha256"] and sha256(Path(part.url)) != part.facts["sha256"]:
                raise UserError(f"{part.url} has other bytes than when it was imported: import it anew")

    def order(self, seed: int) -> Order:
        """Return the order in which training sees the samples."""
        orders = [SampleOrder(self.part_sizes[a:b], seed) for a, b in itertools.pairwise(self._bounds)]
        return MixedOrder(orders, self.shares, seed) if self.shares else orders[0]

    def sets(self) -> list[range]:
        """Return the numbers of the parts of each set of a mix, or of the one set."""
        return [range(a, b) for a, b in itertools.pairwise(self._bounds)]

    # -------------------------------------------------------------------------------------------------------- samples
    def read(self, index: int) -> RawSample:
        """Read a sample. Raises BrokenSample if its image cannot be read, IndexError beyond the end."""
        number, row = self._locate(index)
        part, cells = self.parts[number], self._cells(number, row, SAMPLE)
        name = self._name(part, cells[KEY])
        if cells[PATH] is None:
            image = self._bytes(number, name, cells[OFFSET], cells[SIZE])
        else:
            path = os.fsdecode(cells[PATH])
            name += f" ({clip(path, LONGEST_PATH)})"
            try:
                image = read_regular(os.path.join(part.facts["root"], path), MAX_BYTES + 1)
            except OSError as error:
                raise BrokenSample(name, f"image: {reason(error)}: {os.path.join(part.facts['root'], path)}") from None
        return RawSample(name, image, texts_of(cells[WEB], cells[LONG], part.others), json.loads(cells[-1]))

    def captions(self, index: int) -> Texts:
        """Return the captions of a sample without reading its image."""
        number, row = self._locate(index)
        web, long = self._cells(number, row, (WEB, LONG))
        return texts_of(web, long, self.parts[number].others)

    def image_path(self, index: int) -> str | None:
        """Return the path of a sample's image below the root of its part, or None if it is in a shard or a table."""
        number, row = self._locate(index)
        (path,) = self._cells(number, row, (PATH,))
        return None if path is None else os.fsdecode(path)

    def extra(self, index: int) -> dict[str, Any]:
        """Return the cells of a sample that are neither image nor caption."""
        number, row = self._locate(index)
        return dict(json.loads(self._cells(number, row, (EXTRA,))[0]))

    def all_captions(self, indices: Iterable[int] | None = None) -> Iterator[str]:
        """Yield the captions of the samples (default: all) in order, for training a tokenizer."""
        for index in range(len(self)) if indices is None else indices:
            texts = self.captions(index)
            yield from texts.web + texts.long

    def missing(self, index: int) -> str | None:
        """Return why the file of the image is missing now, or None; images inside shards are not checked."""
        number, row = self._locate(index)
        (path,) = self._cells(number, row, (PATH,))
        root = self.parts[number].facts["root"]
        if path is None or os.path.isfile(os.path.join(root, os.fsdecode(path))):
            return None
        return f"image {clip(os.fsdecode(path), LONGEST_PATH)!r} is not in {root}"

    def _locate(self, index: int) -> tuple[int, int]:
        """Return the number of the part and the row in its index. Raises IndexError."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect.bisect_right(self._starts, index) - 1
        row = index - self._starts[number]
        rows = self.parts[number].rows
        return number, row if rows is None else int(rows[row])

    def _name(self, part: Part, key: bytes) -> str:
        return f"{without_secrets(part.url)}#{key.decode('utf-8', 'surrogatepass')}"

    def _cells(self, number: int, row: int, columns: Iterable[int]) -> list[Any]:
        batch, row = self._opened(number)[0][row // BATCH], row % BATCH
        return [batch.column(column)[row].as_py() for column in columns]

    def _bytes(self, number: int, name: str, offset: int, size: int) -> bytes:
        batches, file = self._opened(number)
        if file is None:
            file = self._image_file(number)
            self._open[number] = batches, file
        try:
            if isinstance(file, RemoteFile):
                file.seek(offset)
                data = file.read(size)
            else:
                data = os.pread(file.fileno(), size, offset)  # it moves no file position, which forks share
        except OSError as error:
            raise BrokenSample(name, f"image: {error}") from None
        if len(data) != size:
            raise BrokenSample(name, f"image: cut off, {len(data)} of {size} bytes are there")
        return data

    def _opened(self, number: int) -> tuple[Any, BinaryIO | None]:
        """Return the record batches of a part's index, and the file of its images if that is open."""
        if self._process != os.getpid():  # a forked worker opens its own files
            self._open, self._process = OrderedDict(), os.getpid()
        if number not in self._open:
            index = open_index(self.parts[number])
            self._open[number] = [index.get_batch(i) for i in range(index.num_record_batches)], None
            if len(self._open) > OPEN_PARTS and (file := self._open.popitem(last=False)[1][1]) is not None:
                file.close()
        self._open.move_to_end(number)
        return self._open[number]

    def _image_file(self, number: int) -> BinaryIO:
        part = self.parts[number]
        if part.facts["images"] is not None:
            return open(part.folder / part.facts["images"], "rb")
        copied = self._copies(number) if self._copies is not None else None
        if copied is not None:
            return copied
        if is_remote(part.url):
            check_state(part.url, part.facts["state"])
        return open_binary(part.url, SAMPLE_BYTES)

    def read_copies(self, copies: Callable[[int], BinaryIO | None]) -> None:
        """Read part i from the file `copies(i)` from now on, if there is one."""
        self._copies = copies

    def close(self) -> None:
        """Close the open parts; they are opened again when they are read."""
        for _, file in self._open.values():
            if file is not None:
                file.close()
        self._open.clear()


INCOMPLETE = ("no image", "no web caption")
"""Reasons why a shard's sample is skipped that do not count as broken: a member is missing on purpose or by design."""
