"""Sources of (image, web caption, long caption): tar shards and tables, local or behind fsspec URLs.

`open_source` checks the fields once, before training. A source gives random access by sample index, can be pickled,
and opens its files lazily in each process.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import itertools
import json
import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from clips.common.errors import UserError, reason
from clips.common.escape import clip
from clips.common.files import read_regular
from clips.common.paths import can_encode, inside, is_remote, without_secrets
from clips.config import OTHERS, Fields
from clips.data.guess import ImageFolder, KarpathyFile, expand, guess_fields, guess_root, is_karpathy, warn_once
from clips.data.images import MAX_BYTES
from clips.data.members import Members, OpenShard
from clips.data.order import Order, SampleOrder
from clips.data.remote import check_state
from clips.data.sample import BrokenSample, RawSample, Texts, cell_of, flat, image_in
from clips.data.sidecar import SAMPLE_BYTES, made_for, open_binary
from clips.data.tar import INDEX, ShardIndex, ShardSummary, load_index, names_and_sizes, open_shards, shard_summary

log = logging.getLogger("clips.data")
OPEN_SHARDS = 64
"""Shards that a process keeps open, about as many as one group of the order touches."""
PROBED_SAMPLES = 32
"""Samples whose JSON is read to find its keys."""
WARNED = 10
"""Warnings printed one by one; further ones are counted."""
MOST_ROWS = 1000
"""Rows of one image that are read: reading one sample must not take seconds."""
MAX_CAPTION = 20_000
"""Characters of a field's captions that are kept, ten times the length of a long caption."""
LONGEST_PATH = 200
"""Characters of an image's path that a sample's name shows."""
PARTS = ("image", "web", "long")
CHOICES = (
    "\n  One caption is enough for CLIP: pretrain_clips.py --recipe small_clip, best with --init-from WEIGHTS"
    "\n  Long captions are written by python scripts/recaption.py --data DATA --captioner URL (docs/recaption.md)"
)
"""Printed if long captions are missing."""


def open_source(spec: str, fields: Fields, *, image_root: str | None = None, need_long: bool) -> Source:
    """Open image–caption data: tar shards or tables, local or behind fsspec URLs.

    Raises UserError if a file is missing, a field cannot be found, or shards and tables are mixed.

    Args:
        spec: a file, a folder, a glob, a brace pattern or a URL; several, joined by `;`, become one source.
        fields: where image and captions are found in a sample; parts left open are guessed.
        image_root: folder to which a table's image paths are relative (default: guessed).
        need_long: every sample needs a long caption; others are left out (shards) or count as broken (tables).
    """
    if need_long and fields.web == fields.long:
        raise UserError(f"data.fields: web and long are both {fields.web!r}, and must be different texts.{CHOICES}")
    files = expand(spec)
    tables = [file for file in files if not file.endswith(".tar")]
    if tables and len(tables) < len(files):
        raise UserError(f"{spec!r} mixes tables and tar shards; give one kind")
    if tables:
        return TableSource(files, fields, image_root, need_long)
    return TarSource(files, fields, need_long)


def place_of(starts: Sequence[int], index: int) -> tuple[int, int]:
    """Return (part, index in the part) of `index`; part i begins at `starts[i]`, and the last entry is the end.

    Raises IndexError for an index that is negative or beyond the end.
    """
    if not 0 <= index < starts[-1]:
        raise IndexError(index)
    part = bisect.bisect_right(starts, index) - 1
    return part, index - starts[part]


def _image_hash(identity: bytes) -> bytes:
    return hashlib.sha256(b"held out" + identity).digest()[:8]


BROKEN = np.frombuffer(_image_hash(b""), "<u8")
"""The one hash of `Source.image_hashes` that all broken samples have."""


class Source:
    """Base class of image–caption data: random access to samples by index; neighbours in a shard are cheap to read."""

    files: list[str]
    """Shards or tables, as many as `shard_sizes`."""
    shard_sizes: list[int]
    """Usable samples of each file; they sum to the length."""
    left_out: list[int]
    """For each file: samples of a shard that lack a needed member, rows of a table that do not fit its header."""
    unreadable: int = 0
    """Rows of all tables that do not fit their header. They count as broken samples."""
    rows: int = 0
    """Rows of all tables, including those that do not fit. A sample may have several."""
    problems: Sequence[str] = ()
    """Damage found when the set was opened, shard by shard."""
    names: Sequence[str] = ()
    """The names of all fields that were found."""
    _parts: Sequence[Any] = ()
    """The tables or sources that it is made of."""
    _facts: dict[str, Any] | None = None

    def __len__(self) -> int:
        return self._starts[-1]

    def _set_sizes(self, sizes: list[int]) -> None:
        self.shard_sizes = sizes
        self._starts = [0, *itertools.accumulate(sizes)]

    def _locate(self, index: int) -> tuple[int, int]:
        return place_of(self._starts, index)

    def _guess(
        self, where: str, fields: Fields, need_long: bool, names: Sequence[str], lists: Collection[str]
    ) -> Fields:
        """Return the fields as `guess_fields` and note which parts a sample needs."""
        fields = guess_fields(where, fields, names, lists)
        self.names = names
        self._need_long = need_long
        self._others = fields.long == OTHERS
        self._needed = PARTS if need_long and not self._others else PARTS[:2]
        return fields

    def _checked(self, key: str, web: list[Any], long: list[Any]) -> Texts:
        texts = Texts(_texts_in(key, "web", web), _texts_in(key, "long", long), self._others)
        if not texts.web:
            raise BrokenSample(key, "web caption is empty")
        if self._need_long and not texts.pair()[1]:
            only = ": the image has only one caption, and others were to be its long caption" if self._others else ""
            raise BrokenSample(key, f"long caption is empty{only}")
        return texts

    def order(self, seed: int) -> Order:
        """Return the order in which training sees the samples."""
        return SampleOrder(self.shard_sizes, seed)

    def read(self, index: int) -> RawSample:
        """Read a sample.

        Raises BrokenSample for a missing, empty or misencoded part, UserError for a path out of the image folder.
        """
        raise NotImplementedError

    def texts(self, index: int) -> Texts:
        """Return the captions without reading the image. Raises like `read`."""
        raise NotImplementedError

    def missing(self, index: int) -> str | None:
        """Return why the image of a sample is missing, or None; opens no image."""
        return None

    def image_id(self, index: int) -> bytes:
        """Return an identity of the sample's image: its path, or its bytes. Raises BrokenSample."""
        raise NotImplementedError

    def key_of(self, index: int, key: str) -> Any:
        """Return what the sample holds under `key`, or None if there is nothing.

        `key` is the name of a table's column, of a shard's member, or of a key in its JSON member. Raises BrokenSample
        if the sample cannot be read.
        """
        raise NotImplementedError

    def image_hashes(self, key: str | None = None) -> np.ndarray:
        """Return a hash of each sample's `image_id`, uint64 [samples], the same on every machine.

        All broken samples have the hash `BROKEN`. With `key`, the value of this field is hashed instead of the image,
        unless it is empty. Raises UserError if there is no such field.
        """
        if key and not {key, f"json:{key}"} & set(self.names):
            raise UserError(f"--key {key!r} is not among the fields found: {clip(', '.join(self.names))}")
        hashes = bytearray()
        for index in tqdm(range(len(self)), "telling images apart", unit="image", leave=False, disable=None):
            identity = b""
            with contextlib.suppress(BrokenSample):  # counted when training reads it
                cell = self.key_of(index, key) if key else None
                is_empty = cell is None or cell == ""
                identity = self.image_id(index) if is_empty else f" key {cell}".encode("utf-8", "surrogatepass")
            hashes += _image_hash(identity)
        return np.frombuffer(hashes, "<u8")

    def listing(self) -> str:
        """Return a SHA-256 (hex) of the names, sizes and sample counts of all files, independent of their folder.

        The size of a remote file counts as 0.
        """
        names = [os.path.basename(without_secrets(file)) for file in self.files]
        sizes = [os.path.getsize(file) if os.path.isfile(file) else 0 for file in self.files]
        text = json.dumps([names, sizes, list(map(int, self.shard_sizes))])
        return hashlib.sha256(text.encode()).hexdigest()

    def contents(self) -> bytes:
        """Return a SHA-256 that changes with the samples, as far as names, sizes and hashes of the files show it."""
        return hashlib.sha256(b"".join(part.contents() for part in self._parts)).digest()

    def facts(self) -> dict[str, Any]:
        """Return numbers of samples and files, and hashes of `listing` and `contents`, which are read once."""
        if self._facts is None:
            numbers = {"samples": len(self), "files": len(self.files)}
            self._facts = numbers | {"sha256": self.listing(), "contents": self.contents().hex()}
        return self._facts

    def captions(self, indices: Sequence[int] | None = None) -> Iterator[str]:
        """Yield the captions of the samples (default: all) in order, for training a tokenizer; skip broken samples."""
        for index in range(len(self)) if indices is None else indices:
            try:
                texts = self.texts(index)
            except BrokenSample:
                continue
            yield from texts.web + texts.long


class TarSource(Source):
    """Samples of tar shards. A sample that lacks a needed member is skipped, with a warning."""

    def __init__(self, shards: list[str], fields: Fields, need_long: bool) -> None:
        self.shards = self.files = shards
        summaries = open_shards(shards)
        self._indexes = [str(summary.index) for summary in summaries]
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        self._process = os.getpid()
        self._copies: Callable[[int], BinaryIO | None] | None = None

        names, lists = self._field_names(fields, summaries)
        fields = self._guess(_names(shards), fields, need_long, names, lists)
        self._fields = {part: _alternatives(getattr(fields, part)) for part in PARTS}
        for part in self._needed:
            if not any((e if key is None else f"{e}:{key}") in names for e, key in self._fields[part]):
                raise _missing_field(_names(shards), part, getattr(fields, part), names)

        lacking = {layout for summary in summaries for layout in summary.layouts if self._lacking(layout)}
        self.left_out = [sum(n for layout, n in summary.layouts.items() if layout in lacking) for summary in summaries]
        present = (sum(summary.layouts.values()) for summary in summaries)
        self._set_sizes([count - lost for count, lost in zip(present, self.left_out, strict=True)])
        if not len(self):
            raise UserError(f"no sample of {_names(shards)} has all of: {', '.join(self._needed)}; found: {names}")

        incomplete = [shard for shard, lost in enumerate(self.left_out) if lost]
        self.problems = [f"{shards[i]}: {line}" for i, summary in enumerate(summaries) for line in summary.problems]
        self.problems += [self._incomplete(shard) for shard in incomplete[:WARNED]]
        if len(incomplete) > 1:
            count = sum(self.left_out)
            total = count + len(self)
            self.problems.insert(0, f"{_names(shards)}: {count:,} of {total:,} samples are skipped, as follows")
        for line in self.problems[:WARNED]:
            log.warning("%s", line)
        if len(self.problems) > WARNED:
            log.warning("and %d more problems", len(self.problems) - WARNED)

    def _lacking(self, extensions: Iterable[str]) -> list[str]:
        """Return the needed parts that a sample with these extensions lacks."""
        present = set(extensions)
        return [name for name in self._needed if present.isdisjoint(e for e, _ in self._fields[name])]

    def _field_names(self, fields: Fields, summaries: Sequence[ShardSummary]) -> tuple[list[str], set[str]]:
        """Return everything that `Fields` could name: extensions, and `ext:key` for JSON keys of the first samples.

        The second result holds the names whose value is a list.
        """
        lists: set[str] = set()
        names = {extension for summary in summaries for layout in summary.layouts for extension in layout}
        shard = next((i for i, summary in enumerate(summaries) if summary.layouts), 0)
        index = self._index(shard)
        extensions = {e for part in PARTS for e, key in _alternatives(getattr(fields, part)) if key} | {"json"}
        with self._file(shard) as file:
            opened = OpenShard(self.shards[shard], index, file, range(min(PROBED_SAMPLES, len(index.keys))))
            for extension, row in itertools.product(extensions, opened.rows):
                with contextlib.suppress(BrokenSample):  # counted when training reads it
                    values = Members(opened, row).json(extension) or {}
                    names |= {f"{extension}:{key}" for key, _ in flat(values)}
                    lists |= {f"{extension}:{key}" for key, value in flat(values) if isinstance(value, list)}
        return sorted(names), lists

    def _incomplete(self, shard: int) -> str:
        """Say how many samples of a shard are skipped, and which is the first of them."""
        opened = self._shard(shard)
        row = min(set(range(len(opened.index.keys))) - set(opened.rows))
        extensions = itertools.compress(opened.index.extensions, opened.index.offsets[row] >= 0)
        first = f"{opened.index.keys[row]}, without {', '.join(self._lacking(extensions))}"
        count = self.left_out[shard]
        return f"{self.shards[shard]}: {count:,} samples are skipped because a member is missing, the first is {first}"

    def read(self, index: int) -> RawSample:
        """Read image, captions and JSON of a sample. Raises BrokenSample if the image is empty."""
        members = self._members(index)
        image = next(filter(None, (members.read(e) for e, _ in self._fields["image"])), None)
        if image is None:
            raise BrokenSample(members.key, "image: the file is empty")
        extra = members.json("json") or {}
        if (label := members.read("cls")) is not None:
            extra = {"cls": label.decode("utf-8", "replace").strip()} | extra
        return RawSample(members.key, image, self._captions(members), extra)

    def texts(self, index: int) -> Texts:
        """Return the captions, without reading the image member."""
        return self._captions(self._members(index))

    def image_id(self, index: int) -> bytes:
        """Return the bytes of the image, or shard and key if the shard is remote."""
        members = self._members(index)
        if is_remote(self.shards[self._locate(index)[0]]):  # a request for each image could take days
            return f"{os.path.basename(members.shard.label)}#{members.shard.index.keys[members.row]}".encode()
        return next(filter(None, (members.read(e) for e, _ in self._fields["image"])), b"")

    def key_of(self, index: int, key: str) -> Any:
        """Return the member `key`, or the value of the JSON key `key`, of a sample. Raises BrokenSample."""
        (name,) = _alternatives(key if key in self.names else f"json:{key}")
        return self._members(index).text(*name)

    def contents(self) -> bytes:
        """Return a hash of the names and sizes of all members, from the indexes: reading them would take too long."""
        digest = hashlib.sha256()
        for shard in range(len(self.shards)):
            digest.update(names_and_sizes(self._index_path(shard)))
        return digest.digest()

    def _captions(self, members: Members) -> Texts:
        web, long = (
            next(filter(None, (members.text(e, key) for e, key in self._fields[part])), None) for part in PARTS[1:]
        )
        return self._checked(members.key, [web], [long])

    def _members(self, index: int) -> Members:
        shard, place = self._locate(index)
        opened = self._shard(shard)
        return Members(opened, opened.rows[place])

    def _shard(self, shard: int) -> OpenShard:
        if self._process != os.getpid():  # a forked worker shares file positions with its parent: open anew
            self._open, self._process = OrderedDict(), os.getpid()
        if shard not in self._open:
            index = self._index(shard)
            layouts, layout_of = np.unique(index.offsets >= 0, axis=0, return_inverse=True)
            complete = [not self._lacking(itertools.compress(index.extensions, layout)) for layout in layouts]
            rows = np.flatnonzero(np.array(complete, dtype=bool)[layout_of.ravel()]).tolist()
            self._open[shard] = OpenShard(self.shards[shard], index, self._file(shard), rows)
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)[1].file.close()
        self._open.move_to_end(shard)
        return self._open[shard]

    def _index(self, shard: int) -> ShardIndex:
        return load_index(self._index_path(shard))

    def _index_path(self, shard: int) -> Path:
        path = Path(self._indexes[shard])
        # An index that was removed since the set was opened is made again.
        return path if path.is_file() else shard_summary(self.shards[shard]).index

    def _file(self, shard: int) -> BinaryIO:
        url = self.shards[shard]
        copy = self._copies(shard) if self._copies is not None else None
        if copy is not None:
            return copy
        if is_remote(url):
            check_state(url, self.state(shard))
        return open_binary(url, SAMPLE_BYTES)

    def state(self, shard: int) -> str:
        """Return the stamp (`clips.data.remote.stamp`) that the shard had when it was indexed."""
        return made_for(Path(self._indexes[shard]), INDEX)

    def read_copies(self, copies: Callable[[int], BinaryIO | None]) -> None:
        """Read shard i from the file `copies(i)` from now on, if there is one. Open shards are closed."""
        self._copies = copies
        for opened in self._open.values():
            opened.file.close()
        self._open.clear()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": OrderedDict(), "_copies": None}


class TableSource(Source):
    """Samples of tables; the image column holds paths below `image_root`, or the images themselves."""

    def __init__(self, files: list[str], fields: Fields, image_root: str | None, need_long: bool) -> None:
        from clips.data.table import Table  # it imports pyarrow, which tar shards do not need

        self.tables: list[Table | ImageFolder | KarpathyFile] = []
        for file in files:
            if os.path.isdir(file):
                self.tables.append(ImageFolder(file))
            elif is_karpathy(file):
                self.tables.append(KarpathyFile(file))
            else:
                self.tables.append(Table(file))
        self._parts = self.tables
        columns, lists = self.tables[0].columns, self.tables[0].lists
        images = guess_fields("", fields, columns).image.split(";")
        self._by_image = [
            table.by_image(images) if isinstance(table, Table) else (range(len(table)), range(len(table) + 1))
            for table in self.tables
        ]
        """For each table: its rows sorted by image, and where those of each image begin and end."""
        sizes = [len(ends) - 1 for _, ends in self._by_image]
        if 3 * sizes[0] < 2 * len(self.tables[0]):  # a few repeated images make no lists
            lists = set(columns)
        fields = self._guess(_names(files), fields, need_long, columns, lists)
        self._fields = {name: [part for part in getattr(fields, name).split(";") if part] for name in PARTS}
        if self._others:
            self._fields["long"] = []
        self._used = {column for columns in self._fields.values() for column in columns}
        for table in self.tables:
            for name in self._needed:
                if not set(self._fields[name]) & set(table.columns):
                    raise _missing_field(table.name, name, getattr(fields, name), table.columns)
        self.files = files
        self._set_sizes(sizes)
        self.left_out = [table.left_out for table in self.tables]
        self.unreadable = sum(table.left_out for table in self.tables if isinstance(table, Table))
        self.rows = sum(map(len, self.tables)) + self.unreadable
        self.problems = [table.problem for table in self.tables if isinstance(table, Table) and table.problem]
        self.roots = [image_root or table.root for table in self.tables]
        self._named: list[bool] = []
        """For each table: True if it names images that may be missing."""
        for number, table in enumerate(self.tables):
            paths = self._first_paths(number)
            if paths is not None:
                self.roots[number] = guess_root(table.name, self.roots[number], paths, is_given=image_root is not None)
            # A folder lists only images that exist.
            self._named.append(paths is not None and not isinstance(table, ImageFolder))
        self.base = os.path.realpath(self.roots[0])
        """The folder relative to which a path identifies an image, because two tables may name one from two folders."""

    def _first_paths(self, file: int) -> list[str] | None:
        """Return the paths of a table's first images, or None if it holds the images themselves."""
        paths = []
        for index in range(self._starts[file], min(self._starts[file] + PROBED_SAMPLES, self._starts[file + 1])):
            with contextlib.suppress(BrokenSample):  # counted when training reads it
                value = self._value(self._rows(index, most=1)[2][0], "image")
                if isinstance(value, (bytes, dict)):
                    return None
                if isinstance(value, str) and value:
                    paths.append(self._with_slashes(file, value))
                    if paths[-1] != value:
                        warn_once(f"{self.tables[file].name}: Windows' backslashes in image paths are read as slashes")
        return paths

    def read(self, index: int) -> RawSample:
        """Read the image and all captions of its rows. Raises BrokenSample if the image cannot be read."""
        file, key, rows = self._rows(index)
        texts = self._captions(key, rows)
        value = self._value(rows[0], "image")
        place = self._place(file, key, value)
        try:
            image = place if isinstance(place, bytes) else read_regular(place, MAX_BYTES + 1)
        except OSError as error:
            raise BrokenSample(key, f"image: {reason(error)}: {place!s}") from None
        if isinstance(value, str):
            key += f" ({clip(value, LONGEST_PATH)})"
        return RawSample(key, image, texts, {name: cell for name, cell in rows[0].items() if name not in self._used})

    def texts(self, index: int) -> Texts:
        """Return the captions of all rows of the image, without reading the image column."""
        _, key, rows = self._rows(index, without=self._fields["image"])
        return self._captions(key, rows)

    def missing(self, index: int) -> str | None:
        """Return why the file of the image is missing, or None; images inside the table are not checked."""
        if not self._named[self._locate(index)[0]]:
            return None  # a row that holds its image is long
        try:
            file, key, rows = self._rows(index, most=1)
            value = self._value(rows[0], "image")
            place = self._place(file, key, value)
        except BrokenSample as broken:
            return broken.reason
        if isinstance(place, bytes) or os.path.isfile(place):
            return None
        return f"image {clip(value, LONGEST_PATH)!r} is not in {self.roots[file]}"

    def image_id(self, index: int) -> bytes:
        """Return the image's path below the first table's folder, or its bytes if it is in a cell."""
        file, key, rows = self._rows(index, self._fields["web"] + self._fields["long"], most=1)
        place = self._place(file, key, self._value(rows[0], "image"))
        if isinstance(place, bytes):
            return place
        return os.fsencode(os.path.relpath(place, self.base))

    def key_of(self, index: int, key: str) -> Any:
        """Return the cell in column `key` of the first row of the image. Raises BrokenSample."""
        return cell_of(self._rows(index, self._fields["image"], most=1)[2][0], key)

    def _rows(
        self, index: int, without: Sequence[str] = (), most: int = MOST_ROWS
    ) -> tuple[int, str, list[dict[str, Any]]]:
        """Return the number of the table, the sample's name, and at most `most` of its rows."""
        file, i = self._locate(index)
        table = self.tables[file]
        order, starts = self._by_image[file]
        rows = []
        for number in order[starts[i] : starts[i + 1]][:most]:
            try:
                rows.append(table.row(int(number), self._used, without))
            except (ValueError, RecursionError) as error:  # bad JSON, wrong encoding
                raise BrokenSample(f"{table.name}#{number}", str(error)) from None
            without = self._fields["image"]  # the first row has it
        return file, f"{table.name}#{order[starts[i]]}", rows

    def _value(self, row: dict[str, Any], name: str) -> Any:
        return next((cell for c in self._fields[name] if (cell := cell_of(row, c)) is not None), None)

    def _captions(self, key: str, rows: list[dict[str, Any]]) -> Texts:
        web, long = ([self._value(row, part) for row in rows] for part in PARTS[1:])
        return self._checked(key, web, long)

    def _with_slashes(self, file: int, path: str) -> str:
        """Return `path` with slashes for the backslashes of Windows, unless a file has that very name."""
        is_of_windows = "\\" in path and not os.path.exists(os.path.join(self.roots[file], path))
        return path.replace("\\", "/") if is_of_windows else path

    def _place(self, file: int, key: str, value: Any) -> str | bytes:
        """Return the image in the cell, or its path."""
        value = image_in(value)
        if isinstance(value, bytes):
            return value
        if not isinstance(value, str) or not value:
            raise BrokenSample(key, f"image: {type(value).__name__} is neither a path nor bytes")
        if "\0" in value or not can_encode(value):
            raise BrokenSample(key, f"image: {value!r:.200} is no path")
        try:
            return inside(self.roots[file], self._with_slashes(file, value))
        except ValueError as error:  # no broken sample: the whole table belongs to another folder
            raise UserError(f"{key}: image path {error}. Name the folder above it with --image-root") from None


def _alternatives(spec: str) -> list[tuple[str, str | None]]:
    """Parse `ext;ext:key` into [(ext, None), (ext, key)]."""
    parts = [part.partition(":") for part in spec.split(";") if part]
    return [(extension.lower().removeprefix("."), key or None) for extension, _, key in parts]


def _texts_in(key: str, name: str, cells: list[Any]) -> tuple[str, ...]:
    """Return the captions in cells, texts or lists of texts; skip empty ones and what exceeds MAX_CAPTION."""
    captions = []
    room = MAX_CAPTION
    for text in itertools.chain.from_iterable(cell if isinstance(cell, list) else [cell] for cell in cells):
        if text is not None and not isinstance(text, str):
            raise BrokenSample(key, f"{name} caption is {type(text).__name__}, not text")
        if text and text.strip() and room > 0:
            captions.append(text[:room].strip())
            room -= len(text)
    return tuple(captions)


def _missing_field(where: str, name: str, spec: str, names: Sequence[str]) -> UserError:
    what = {"image": "images", "web": "web captions", "long": "long captions, which this training needs"}[name]
    reason = f"data.fields.{name} = {spec!r} is not" if spec else "no usual name is"
    return UserError(
        f"{where} has no {what}: {reason} among the fields found: "
        f"{clip(', '.join(names)) or 'none'}. Name the right one with --fields {name}=FIELD"
        + (f".{CHOICES}" if name == "long" else "")
    )


def _names(files: list[str]) -> str:
    return files[0] if len(files) == 1 else f"{files[0]} … {files[-1]} ({len(files)} files)"
