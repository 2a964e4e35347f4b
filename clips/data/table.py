"""Tables (CSV, TSV, JSON, Parquet) as rows with random access.

On first use a table is copied to a memory-mapped Arrow file, so any row costs microseconds, and workers share
the pages. Parquet and CSV have no cheap access to single rows. The copy also keeps which rows could not be read.
"""

import bisect
import codecs
import csv
import hashlib
import io
import itertools
import json
import logging
import posixpath
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from clips.common.errors import UserError
from clips.common.files import MOST_JSON, from_json, sha256
from clips.common.paths import is_remote, without_secrets
from clips.data.guess import NAMES, guess_delimiter, usual, warn_once
from clips.data.sample import cell_of, flat, image_in
from clips.data.sidecar import SCAN_BYTES, made_for, open_binary, sidecar

log = logging.getLogger("clips.data")
CSV = (".csv", ".tsv", "captions.txt")
"""Endings of files with cells of text. Of others than these and Parquet, each row is kept as a JSON object."""
ROWS_PER_BATCH = 512
LONGEST_ROW = 1 << 22
"""Maximum number of characters in a row of a CSV file."""
UNPACKED, RATIO = 2**30, 100
"""Most bytes of a table's copy: UNPACKED, and RATIO times the file. A small Parquet file can unpack to terabytes."""
csv.field_size_limit(LONGEST_ROW)


@dataclass
class LeftOut:
    """Rows of a CSV file that are skipped: they have another number of cells, or a quote that is never closed."""

    count: int = 0
    first: int = 0
    """The line on which the first of them begins; the header is line 1."""


class Table:
    """One table file. `columns` are the names found, `lists` those of columns whose cells hold lists."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.name = without_secrets(url)
        self.root = posixpath.dirname(url) or "."
        self.is_json = not url.endswith((*CSV, ".parquet"))
        self._path = sidecar(url, ".idx.arrow", lambda target: _write_arrow(url, target))
        self._reader: pa.ipc.RecordBatchFileReader | None = None
        reader = self._open()
        self._starts = [0]
        for i in range(reader.num_record_batches):
            self._starts.append(self._starts[-1] + reader.get_batch(i).num_rows)
        self._numbered: dict[str, list[str]] = {}
        schema = reader.schema
        kinds = dict(itertools.chain.from_iterable(map(_nested, schema)))
        lists = {name for name, kind in kinds.items() if pa.types.is_list(kind) or pa.types.is_large_list(kind)}
        columns, lists = self._json_columns() if self.is_json else (list(kinds), lists)
        self._numbered = _numbered(columns)
        for name, parts in self._numbered.items():
            warn_once(f"{self.name}: {parts[0]!r} to {parts[-1]!r} are read as one list, {name!r}")
        self.columns = [*columns, *self._numbered]
        self.lists = {*lists, *self._numbered}
        _, last = reader.get_batch_with_custom_metadata(reader.num_record_batches - 1)
        left_out = LeftOut(**json.loads(last[b"left_out"]))
        self.left_out = left_out.count
        self.problem = ""
        """The message about skipped rows."""
        if left_out.count:
            self.problem = (
                f"{self.name}: {left_out.count:,} of {left_out.count + len(self):,} rows skipped, the first is row "
                f"{left_out.first} (more or fewer cells than the header, or an open quote)"
            )
            warn_once(self.problem)
        if (schema.metadata or {}).get(b"encoding") == b"cp1252":
            warn_once(f"{self.name} is not UTF-8: it is read as cp1252 (Windows). If that is wrong, save it as UTF-8")

    def __len__(self) -> int:
        return self._starts[-1]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_reader": None}

    def row(self, i: int, needed: Collection[str], without: Collection[str] = ()) -> dict[str, Any]:
        """Return row `i` without the columns `without` (of JSON lines, all columns are read).

        An unreadable cell raises ValueError in a column that is `needed`, and is skipped in any other column.
        """
        batch_index = bisect.bisect_right(self._starts, i) - 1
        batch = self._open().get_batch(batch_index)
        return self._row(batch, i - self._starts[batch_index], needed, without)

    def _row(self, batch: Any, place: int, needed: Collection[str], without: Collection[str]) -> dict[str, Any]:
        if self.is_json:
            row = from_json(batch.column(0)[place].as_py())
            if not isinstance(row, dict):
                raise ValueError("the line is not a JSON object")
            return row | self._lists(row)

        is_text = not self.url.endswith(".parquet")
        row = {}
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            if name in without:
                continue
            try:
                value = column[place].as_py()
                row[name] = value.decode() if is_text else value
            except Exception as error:  # dates beyond Python's, time zones that nobody knows, another encoding, …
                if name in needed:
                    raise ValueError(f"column {name}: {error}") from None
        return row | self._lists(row)

    def contents(self) -> bytes:
        """Return the SHA-256 of a local file, which is kept beside it, or the state of a remote one (size, ETag)."""
        if is_remote(self.url):
            return made_for(self._path, ".idx.arrow").encode()
        return sidecar(self.url, ".idx.sha256", lambda target: _write_hash(self.url, target)).read_bytes()

    def by_image(self, columns: Sequence[str]) -> tuple[Any, Any]:
        """Return the rows sorted by image (the first of `columns` that exists), and the bounds of each image's rows."""
        column = next((name for name in columns if name in self.columns), "")
        suffix = f".idx.{hashlib.sha256(column.encode()).hexdigest()[:8]}"
        images = np.fromfile(sidecar(self.url, suffix, lambda target: self._number_images(column, target)), np.int32)
        if not len(images):
            return range(len(self)), range(len(self) + 1)
        order = np.argsort(images, kind="stable").astype(np.int32)
        ends = np.append(np.flatnonzero(np.diff(images[order], prepend=-1)), len(order))
        warn_once(f"{self.name}: {len(self):,} rows of {len(ends) - 1:,} images: the captions of each are gathered")
        return order, ends

    def _number_images(self, column: str, target: Path) -> None:
        """Write the number of each row's image (int32), in order of first appearance; nothing if no image has two."""
        log.info("looking for rows of one image in %s", self.name)
        reader = self._open()
        names = [self._image_names(reader.get_batch(i), column) for i in range(reader.num_record_batches)]
        encoded = pa.chunked_array(names).dictionary_encode().combine_chunks()
        numbers = encoded.indices.to_numpy()
        is_empty = numbers == encoded.dictionary.index(b"").as_py()
        numbers = np.where(is_empty, len(self) + np.arange(len(self)), numbers).astype(np.int32)
        (numbers if len(np.unique(numbers)) < len(self) else numbers[:0]).tofile(target)

    def _image_names(self, batch: pa.RecordBatch, column: str) -> pa.Array:
        """Return the path, or a hash of the bytes, of the image in each row; empty if it has none."""
        cells = batch[column] if column in batch.schema.names else pa.nulls(batch.num_rows)
        if not self.is_json and (pa.types.is_string(cells.type) or not self.url.endswith(".parquet")):
            return cells.cast(pa.large_binary()).fill_null(b"")
        others = set(batch.schema.names) - {column, column.partition(".")[0]}
        names = []
        for place in range(batch.num_rows):
            cell = None
            with suppress(ValueError, RecursionError):  # reported when the row itself is read
                cell = image_in(cell_of(self._row(batch, place, (), others), column))
            if isinstance(cell, bytes):
                cell = hashlib.blake2b(cell).hexdigest()
            names.append(cell.encode("utf-8", "surrogatepass") if isinstance(cell, str) else b"")
        return pa.array(names, pa.large_binary())

    def _lists(self, row: dict[str, Any]) -> dict[str, list[Any]]:
        """Return the lists that numbered columns make together."""
        return {name: [row[column] for column in parts if column in row] for name, parts in self._numbered.items()}

    def _open(self) -> pa.ipc.RecordBatchFileReader:
        if self._reader is None:
            self._reader = pa.ipc.open_file(pa.memory_map(str(self._path)))
        return self._reader

    def _json_columns(self) -> tuple[list[str], set[str]]:
        columns: dict[str, None] = {}
        lists: set[str] = set()
        for i in range(min(100, len(self))):
            with suppress(ValueError, RecursionError):  # reported when the row itself is read
                row = dict(flat(self.row(i, ())))
                columns |= dict.fromkeys(row)
                lists |= {name for name, value in row.items() if isinstance(value, list)}
        return list(columns), lists


def _numbered(columns: Sequence[str]) -> dict[str, list[str]]:
    """Return for each caption's name the columns of that name and a number (caption_0 … caption_4, "Caption 1" …)."""
    parts: dict[str, list[str]] = {}
    for column in columns:
        name = re.sub(r"[\s_-]*\d+$", "", column)
        if name not in columns and usual(name) in NAMES["web"] + NAMES["long"]:
            parts.setdefault(name, []).append(column)
    return parts


def _nested(field: pa.Field, prefix: str = "") -> Iterator[tuple[str, pa.DataType]]:
    """Yield the name and type of a Parquet column, or those of its parts, as `flat` names the cells of a row."""
    kind, name = field.type, prefix + field.name
    if pa.types.is_struct(kind) and not {"bytes", "path"} & {part.name for part in kind}:
        for part in kind:
            yield from _nested(part, f"{name}.")
    else:
        yield name, kind


def _write_hash(url: str, target: Path) -> None:
    target.write_text(sha256(Path(url)), encoding="utf-8")


def _write_arrow(url: str, target: Path) -> None:
    name = without_secrets(url)
    log.info("copying %s to an Arrow file for random access", name)
    left_out = LeftOut()
    try:
        with open_binary(url) as file:
            if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                raise UserError(f"{name} is UTF-16: save it as UTF-8 (iconv -f UTF-16 -t UTF-8)")
            room = UNPACKED + RATIO * file.seek(0, io.SEEK_END)
            file.seek(0)
            encoding = "utf-8"
            if url.endswith(".parquet"):
                batches = parquet.ParquetFile(file).iter_batches(batch_size=ROWS_PER_BATCH)
            elif url.endswith(CSV):
                encoding = _encoding(url)
                batches = _csv(file, url, encoding, left_out)
            else:
                batches = _json(_objects(file, url))
            head = next(batches)
            names = head.schema.names
            twice = [column for column in set(names) if names.count(column) > 1]
            if twice:
                raise UserError(f"{name} has more than one column {twice[0]!r}: rename them")

            with pa.ipc.new_file(str(target), head.schema.with_metadata({"encoding": encoding})) as writer:
                writer.write_batch(head)
                for batch in batches:
                    room -= batch.nbytes
                    if room < 0:
                        raise UserError(f"{name} unpacks to over {RATIO} times its size: its rows repeat each other")
                    writer.write_batch(batch)
                # The skipped rows are known only at the end.
                writer.write_batch(head.slice(0, 0), {"left_out": json.dumps(asdict(left_out))})
    except (ValueError, pa.ArrowNotImplementedError, csv.Error) as error:
        raise UserError(f"{name} is not a readable table: {error}") from None
    except StopIteration:
        count = f": {left_out.count:,} have another number of columns than the header" if left_out.count else ""
        raise UserError(f"{name} has no usable rows{count}. Check its separator and quotes") from None


def _objects(file: Any, url: str) -> Iterator[bytes]:
    """Yield the rows of a file as JSON objects: lines, a list, COCO's captions, or Flickr8k's `a.jpg#0<TAB>text`."""
    if url.endswith(".jsonl"):
        yield from filter(bytes.strip, file)
    elif url.endswith(".json"):
        yield from (json.dumps(row).encode() for row in _json_rows(file.read(MOST_JSON + 1)))
    else:
        for line in filter(bytes.strip, file):
            image, _, caption = line.decode().strip().partition("\t")
            yield json.dumps({"image": image.rpartition("#")[0], "caption": caption}).encode()


def _json_rows(data: bytes) -> list[Any]:
    """Return the objects of a JSON list, or the captions of COCO's file, each with the entries of its image.

    An image without a caption is a row, too, so it is counted as broken. Raises ValueError for any other content.
    """
    if len(data) > MOST_JSON:
        raise ValueError(f"it has more than {MOST_JSON:,} bytes: write an object a line, as .jsonl")
    content = from_json(data)
    if isinstance(content, list):
        return content
    try:
        images = {image["id"]: image for image in content["images"]}
        rows = [images.get(caption["image_id"], {}) | caption for caption in content["annotations"]]
        captioned = {row["image_id"] for row in rows}
        return rows + [image for number, image in images.items() if number not in captioned]
    except (KeyError, TypeError):
        raise ValueError(
            "neither a list of objects nor COCO's images and annotations (Karpathy's file is given as --karpathy)"
        ) from None


def _json(rows: Iterator[bytes]) -> Iterator[pa.RecordBatch]:
    """Yield rows as bytes, so that a bad line breaks only its own row."""
    while lines := list(itertools.islice(rows, ROWS_PER_BATCH)):
        yield pa.record_batch({"line": pa.array(lines, pa.binary())})


def _encoding(url: str) -> str:
    """Return utf-8, or cp1252 (Excel on Windows) if most characters of the file beyond ASCII are not UTF-8."""
    characters = wrong = 0
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    with open_binary(url) as file:
        while data := file.read(SCAN_BYTES):
            text = decoder.decode(data)
            if not text.isascii():
                characters += len(text) - len(text.encode("ascii", "ignore"))
                wrong += text.count("\ufffd")
    return "utf-8" if 2 * wrong <= characters else "cp1252"


def _csv(file: Any, url: str, encoding: str, left_out: LeftOut) -> Iterator[pa.RecordBatch]:
    """Yield every cell as bytes: types are not guessed, and a wrongly encoded cell breaks only its own row."""
    codec = "utf-8-sig" if encoding == "utf-8" else encoding
    # newline="": lines end with \n, \r\n or \r alone, and keep their ends inside of quoted cells.
    text = io.TextIOWrapper(file, codec, errors="surrogateescape", newline="")
    lines = _Lines(text, without_secrets(url))
    delimiter = guess_delimiter(lines.peek(), lines.name)
    names = [name.strip() for name in next(_rows(lines, delimiter, None, left_out), [])]
    rows = _rows(lines, delimiter, len(names), left_out)
    while batch := list(itertools.islice(rows, ROWS_PER_BATCH)):
        columns = [[cell.encode("utf-8", "surrogateescape") for cell in column] for column in zip(*batch, strict=True)]
        yield pa.RecordBatch.from_arrays([pa.array(column, pa.binary()) for column in columns], names)


class _Lines:
    """The lines of a text, of bounded length; a line may be put back."""

    def __init__(self, text: io.TextIOWrapper, name: str) -> None:
        self.text, self.name = text, name
        self.number = 0
        """Number of the line that `next` returned last."""
        self._back: list[str] = []

    def next(self) -> str:
        """Return the next line with its end, or "" after the last one. Raises UserError for one beyond LONGEST_ROW."""
        line = self._back.pop() if self._back else self.text.readline(LONGEST_ROW + 1)
        if len(line) > LONGEST_ROW:
            raise UserError(f"{self.name}: the row after row {self.number:,} is longer than {LONGEST_ROW:,} bytes")
        self.number += bool(line)
        return line

    def put_back(self, lines: list[str]) -> None:
        self._back += reversed(lines)
        self.number -= len(lines)

    def of_row(self, line: str, following: list[str]) -> Iterator[str]:
        """Yield `line` and the next ones, at most LONGEST_ROW characters more, and append those to `following`."""
        length = 0
        while line and length <= LONGEST_ROW:
            yield line
            line = self.next()
            length += len(line)
            following += [line] if line else []

    def peek(self) -> str:
        line = self.next()
        self.put_back([line] if line else [])
        return line


def _rows(lines: _Lines, delimiter: str, cells: int | None, left_out: LeftOut) -> Iterator[list[str]]:
    """Yield the rows of `cells` cells (None: any number), without empty lines; count the others in `left_out`.

    A quote that is never closed costs only the line that opens it: the lines after it are read as rows of their own.
    """
    while line := lines.next():
        number = lines.number
        following: list[str] = []
        is_open = False
        try:
            row = next(csv.reader(lines.of_row(line, following), delimiter=delimiter, strict=True))
        except csv.Error:  # a quote inside a cell, which is taken as it is, or one that is not closed
            row, *second = csv.reader([line.rstrip("\r\n") + "\n", "x"], delimiter=delimiter)
            is_open = not second
        if is_open or (row and cells not in (None, len(row))):
            left_out.count += 1
            left_out.first = left_out.first or number
            lines.put_back(following)
        elif row:
            yield row
