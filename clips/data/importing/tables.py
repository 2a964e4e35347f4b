"""Read tables row by row, once: CSV, TSV, JSON, Parquet, Karpathy's file, and a folder of images with texts.

Each class has the same public names: `name`, `root` (folder of its image paths), `columns`, `lists` (columns whose
cells are lists), `lists_images` (True if every image is known to exist), `unfit` (rows that do not fit the header,
known once all rows are read), and iteration over rows, each a dict of cells, or a ValueError in place of a bad row.
"""

import codecs
import csv
import io
import itertools
import json
import os
import posixpath
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import pyarrow as pa
from pyarrow import parquet

from clips.common.errors import UserError
from clips.common.files import MOST_JSON, from_json, read_bytes, read_regular
from clips.common.paths import without_secrets
from clips.data.importing.layouts import NAMES, Note, guess_delimiter, image_text_pairs, is_karpathy, usual
from clips.data.sample import flat

CSV = (".csv", ".tsv", "captions.txt")
"""Endings of files with cells of text. Of others than these and Parquet, each row is a JSON object."""
ROWS_PER_BATCH, PROBED_ROWS = 512, 100
"""Rows of Parquet that are read at once, and rows whose keys are the columns of JSON."""
LONGEST_ROW = 1 << 22
"""Maximum number of characters in a row of a CSV file."""
LONGEST_TEXT, PROBED_TEXTS = 1 << 18, 32
"""Bytes that are read of the text file of an image, and number of texts that decide if each line is a caption."""
UNPACKED, RATIO = 2**30, 100
"""Most bytes that a Parquet file may unpack to: UNPACKED, and RATIO times its size. A small one can hold terabytes."""
SCAN_BYTES = 1 << 22
csv.field_size_limit(LONGEST_ROW)
Row = dict[str, Any] | ValueError


def open_table(url: str, file: BinaryIO | None, note: Note) -> "Table | PairFolder | KarpathyFile":
    """Open the table at `url`, whose bytes are in `file` (None for a folder or a Karpathy split)."""
    if is_karpathy(url):
        return KarpathyFile(url)
    return PairFolder(url, note) if file is None else Table(url, file, note)


class Table:
    """A table file. Raises UserError here or during iteration if it is not readable or has no usable row."""

    lists_images = False

    def __init__(self, url: str, file: BinaryIO, note: Note) -> None:
        self.name = without_secrets(url)
        self.root = posixpath.dirname(url) or "."
        self.unfit = self.first_unfit = 0
        self._file, self._note = file, note
        with _readable(self.name):
            if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                raise UserError(f"{self.name} is UTF-16: save it as UTF-8 (iconv -f UTF-16 -t UTF-8)")
            self._size = file.seek(0, io.SEEK_END)
            file.seek(0)
            if url.endswith(".parquet"):
                table = parquet.ParquetFile(file)
                kinds = dict(itertools.chain.from_iterable(map(_nested, table.schema_arrow)))
                columns, top = list(kinds), table.schema_arrow.names
                lists = {name for name, kind in kinds.items() if pa.types.is_list(kind) or pa.types.is_large_list(kind)}
                rows: Iterator[Row] = self._parquet(table)
            elif url.endswith(CSV):
                columns, rows = self._csv(file)
                top, lists = columns, set()
            else:
                rows = map(_parsed, _objects(file, url))
                probed = list(itertools.islice(rows, PROBED_ROWS))
                rows = itertools.chain(probed, rows)
                cells = dict(itertools.chain.from_iterable(flat(row) for row in probed if isinstance(row, dict)))
                columns = top = list(cells)
                lists = {
                    name for row in probed if isinstance(row, dict) for name, v in flat(row) if isinstance(v, list)
                }
            first = next(rows, None)
        twice = [column for column in set(top) if top.count(column) > 1]
        if twice:
            raise UserError(f"{self.name} has more than one column {twice[0]!r}: rename them")
        if first is None:
            count = f": {self.unfit:,} have another number of columns than the header" if self.unfit else ""
            raise UserError(f"{self.name} has no usable rows{count}. Check its separator and quotes")
        self._rows = itertools.chain([first], rows)
        self._numbered = _numbered(columns)
        for name, parts in self._numbered.items():
            note(f"{self.name}: {parts[0]!r} to {parts[-1]!r} are read as one list, {name!r}")
        self.columns: Sequence[str] = [*columns, *self._numbered]
        self.lists = {*lists, *self._numbered}

    def __iter__(self) -> Iterator[Row]:
        with _readable(self.name):
            for row in self._rows:
                if isinstance(row, dict):  # numbered columns make a list together
                    for name, parts in self._numbered.items():
                        row[name] = [row[column] for column in parts if column in row]
                yield row

    def _parquet(self, table: parquet.ParquetFile) -> Iterator[Row]:
        room = UNPACKED + RATIO * self._size
        for batch in table.iter_batches(batch_size=ROWS_PER_BATCH):
            room -= batch.nbytes
            if room < 0:
                raise UserError(f"{self.name} unpacks to over {RATIO} times its size: its rows repeat each other")
            try:
                yield from batch.to_pylist()
            except Exception:  # dates beyond Python's, time zones that nobody knows, …: only their cells are lost
                yield from (_cells(batch, number) for number in range(batch.num_rows))

    def _csv(self, file: BinaryIO) -> tuple[list[str], Iterator[Row]]:
        encoding = _encoding(file)
        if encoding == "cp1252":
            self._note(f"{self.name} is not UTF-8: it is read as cp1252 (Windows). If that is wrong, save it as UTF-8")
        # newline="": lines end with \n, \r\n or \r alone, and keep their ends inside of quoted cells.
        codec = "utf-8-sig" if encoding == "utf-8" else encoding
        lines = _Lines(io.TextIOWrapper(file, codec, errors="surrogateescape", newline=""), self.name)
        delimiter = guess_delimiter(lines.peek(), self.name, self._note)
        names = [name.strip() for name in next(self._fitting(lines, delimiter, None), [])]
        return names, (dict(zip(names, cells, strict=True)) for cells in self._fitting(lines, delimiter, len(names)))

    def _fitting(self, lines: "_Lines", delimiter: str, count: int | None) -> Iterator[list[str]]:
        """Yield the rows of `count` cells (None: any number), without empty lines; count the others as unfit.

        A quote that is never closed costs only the line that opens it: the lines after it are read as rows of their
        own.
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
            if is_open or (row and count not in (None, len(row))):
                self.unfit += 1
                self.first_unfit = self.first_unfit or number
                lines.put_back(following)
            elif row:
                yield row


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """Turn the errors of a bad file into a UserError with its name."""
    try:
        yield
    except (ValueError, pa.ArrowNotImplementedError, csv.Error) as error:
        raise UserError(f"{name} is not a readable table: {error}") from None


class PairFolder:
    """A folder, with subfolders, of images and texts of the same name (a.jpg, a.txt), as a table.

    The text is `txt`. If most of the first texts have several lines, without an empty one, then each line is a caption:
    `captions` are the lines, and `whole` is the text.
    """

    columns: Sequence[str] = ("image", "txt")
    lists: Sequence[str] = ()
    lists_images = True

    def __init__(self, folder: str, note: Note) -> None:
        self.name = self.root = folder
        self._names, without = image_text_pairs(folder)
        self.unfit = 0
        if without:
            note(f"{folder}: {len(without):,} images without a text are skipped, the first is {without[0]}")
        several = []
        for name in self._names[:PROBED_TEXTS]:
            with suppress(ValueError):  # counted when the row itself is read
                lines = self._text(name).strip().splitlines()
                several.append(len(lines) > 1 and all(map(str.strip, lines)))
        if 2 * sum(several) > len(several):
            self.columns, self.lists = ("image", "captions", "whole"), ("captions",)
            note(f"{folder}: each line of a text is a caption (guessed; --fields web=whole takes the text as one)")

    def __iter__(self) -> Iterator[Row]:
        for name in self._names:
            try:
                text = self._text(name)
            except ValueError as error:
                yield error
                continue
            yield {"image": name} | ({"captions": text.splitlines(), "whole": text} if self.lists else {"txt": text})

    def _text(self, name: str) -> str:
        path = os.path.join(self.root, os.path.splitext(name)[0] + ".txt")
        try:
            data = read_regular(path, LONGEST_TEXT)
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror}") from None
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError:
            return data.decode("cp1252")


class KarpathyFile:
    """COCO, Flickr8k or Flickr30K in A. Karpathy's JSON, as a table of images and lists of captions.

    The spec is `dataset_coco.json#train+restval`: the file and its splits. Splits that it lacks are skipped.
    """

    columns = ("image", "captions")
    lists = ("captions",)
    lists_images = False
    unfit = 0

    def __init__(self, spec: str) -> None:
        """Read the file. Raises UserError for another file, and if it has none of the splits."""
        path, _, splits = spec.partition("#")
        self.name = spec
        self.root = str(Path(path).parent)
        try:
            content = from_json(read_bytes(Path(path)))
            if isinstance(content, dict) and "annotations" in content:
                raise UserError(
                    f"{path} is COCO's own file of captions, not Karpathy's: give it as --data (train_llava.sh: "
                    "--data_path), with the folder of its images as --image-root (--image_folder)"
                )
            images = content["images"]
            self._rows = [
                {
                    "image": str(PurePosixPath(entry.get("filepath", "")) / entry["filename"]),
                    "captions": [sentence["raw"] for sentence in entry["sentences"]],
                }
                for entry in images
                if entry["split"] in splits.split("+")
            ]
            present = ", ".join(sorted({entry["split"] for entry in images}))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is not a Karpathy split file (images, split, sentences): {error!r}") from None
        if not self._rows:
            raise UserError(f"{path} has no images of the split {splits!r}; its splits are {present}")

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows)


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


def _cells(batch: pa.RecordBatch, number: int) -> dict[str, Any]:
    row = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        with suppress(Exception):  # without its cell the row is counted as broken, if it needs it
            row[name] = column[number].as_py()
    return row


def _parsed(line: bytes) -> Row:
    try:
        row = from_json(line)
    except (ValueError, RecursionError) as error:
        return ValueError(str(error))
    return row if isinstance(row, dict) else ValueError("the line is not a JSON object")


def _objects(file: BinaryIO, url: str) -> Iterator[bytes]:
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


def _encoding(file: BinaryIO) -> str:
    """Return utf-8, or cp1252 (Excel on Windows) if most characters of the file beyond ASCII are not UTF-8."""
    characters = wrong = 0
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    while data := file.read(SCAN_BYTES):
        text = decoder.decode(data)
        if not text.isascii():
            characters += len(text) - len(text.encode("ascii", "ignore"))
            wrong += text.count("\ufffd")
    file.seek(0)
    return "utf-8" if 2 * wrong <= characters else "cp1252"


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
