"""Tables (CSV, TSV, JSON lines, Parquet) as rows with random access.

On first use a table is copied to an Arrow file, which is memory-mapped: any row costs microseconds, and workers share
the pages. Parquet and CSV have no cheap access to single rows.
"""

from __future__ import annotations

import bisect
import codecs
import itertools
import logging
import posixpath
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
from pyarrow import parquet

from clips.common.errors import UserError
from clips.common.files import from_json
from clips.data.guess import guess_delimiter, say_once
from clips.data.sidecar import SCAN_BYTES, open_binary, sidecar

log = logging.getLogger("clips.data")
ROWS_PER_BATCH = 512
LONGEST_ROW = 1 << 22
"""Bytes of a row of a CSV file."""


class Table:
    """One table file. `columns` are the names found."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.root = posixpath.dirname(url) or "."
        self.is_json = url.endswith(".jsonl")
        self._path = sidecar(url, ".idx.arrow", lambda target: _write_arrow(url, target))
        self._reader: pa.ipc.RecordBatchFileReader | None = None
        reader = self._open()
        starts = [0]
        for i in range(reader.num_record_batches):
            starts.append(starts[-1] + reader.get_batch(i).num_rows)
        self._starts, self.rows = starts[:-1], starts[-1]
        self.columns = self._json_columns() if self.is_json else reader.schema.names
        if (reader.schema.metadata or {}).get(b"encoding") == b"cp1252":
            say_once(f"{url} is not UTF-8: it is read as cp1252 (Windows). If it is another encoding, save it as UTF-8")

    def __len__(self) -> int:
        return self.rows

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_reader": None}

    def row(self, i: int, needed: Collection[str], without: Collection[str] = ()) -> dict[str, Any]:
        """Row `i`, without the columns `without` (JSON lines are read whole).

        An unreadable cell raises ValueError in a column that is `needed`, and is left out of any other column.
        """
        batch_index = bisect.bisect_right(self._starts, i) - 1
        batch, place = self._open().get_batch(batch_index), i - self._starts[batch_index]
        if self.is_json:
            row = from_json(batch.column(0)[place].as_py())
            if not isinstance(row, dict):
                raise ValueError("the line is not a JSON object")
            return row
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
        return row

    def _open(self) -> pa.ipc.RecordBatchFileReader:
        if self._reader is None:
            self._reader = pa.ipc.open_file(pa.memory_map(str(self._path)))
        return self._reader

    def _json_columns(self) -> list[str]:
        columns: dict[str, None] = {}
        for i in range(min(100, self.rows)):
            try:
                columns |= dict.fromkeys(self.row(i, ()))
            except (ValueError, RecursionError):
                continue  # reported when the row itself is read
        return list(columns)


def _write_arrow(url: str, target: Path) -> None:
    log.info("copying %s to an Arrow file for random access", url)
    try:
        with open_binary(url) as file:
            if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                raise UserError(f"{url} is UTF-16: save it as UTF-8 (iconv -f UTF-16 -t UTF-8)")
            file.seek(0)
            encoding = "utf-8" if url.endswith((".parquet", ".jsonl")) else _encoding(url)
            if url.endswith(".parquet"):
                batches = parquet.ParquetFile(file).iter_batches(batch_size=ROWS_PER_BATCH)
            else:
                batches = _json(file) if url.endswith(".jsonl") else _csv(file, url, encoding)
            head = next(batches)
            names = head.schema.names
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise UserError(
                    f"{url} has more than one column {', '.join(map(repr, twice))}: rename them in its header"
                )
            with pa.ipc.new_file(str(target), head.schema.with_metadata({"encoding": encoding})) as writer:
                writer.write_batch(head)
                for batch in batches:
                    writer.write_batch(batch)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, UnicodeDecodeError) as error:
        raise UserError(f"{url} is not a readable table: {error}") from None
    except StopIteration:
        raise UserError(f"{url} has no rows") from None


def _json(file: Any) -> Iterator[pa.RecordBatch]:
    """Lines stay bytes, so that a bad line breaks its own row only."""
    filled = filter(bytes.strip, file)
    while lines := list(itertools.islice(filled, ROWS_PER_BATCH)):
        yield pa.record_batch({"line": pa.array(lines, pa.binary())})


def _encoding(url: str) -> str:
    """utf-8; cp1252 for a file in which most characters beyond ASCII are no UTF-8, as Excel writes it on Windows."""
    characters = wrong = 0
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    with open_binary(url) as file:
        while data := file.read(SCAN_BYTES):
            text = decoder.decode(data)
            if not text.isascii():
                characters += len(text) - len(text.encode("ascii", "ignore"))
                wrong += text.count("\ufffd")
    return "utf-8" if 2 * wrong <= characters else "cp1252"


def _csv(file: Any, url: str, encoding: str) -> Iterator[pa.RecordBatch]:
    """Every column as bytes: types are not guessed, and a wrongly encoded cell breaks its own row only."""

    def skip(row: pa.csv.InvalidRow) -> str:
        log.warning("%s: row %s has %d columns instead of %d and is left out: %.80s", url, row.number or "?",
                    row.actual_columns, row.expected_columns, row.text)  # fmt: skip
        return "skip"

    delimiter = guess_delimiter(file.readline(LONGEST_ROW).decode(encoding, "replace"), url)
    file.seek(0)
    parse = pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True, invalid_row_handler=skip)
    read = pa.csv.ReadOptions(use_threads=False, block_size=LONGEST_ROW, encoding=encoding)
    with open_binary(url) as again:
        names = pa.csv.open_csv(again, read_options=read, parse_options=parse).schema.names
    convert = pa.csv.ConvertOptions(column_types={name: pa.binary() for name in names}, strings_can_be_null=False)
    rows = 0
    try:
        for block in pa.csv.open_csv(file, read_options=read, parse_options=parse, convert_options=convert):
            for start in range(0, block.num_rows, ROWS_PER_BATCH):
                yield block.slice(start, ROWS_PER_BATCH)
            rows += block.num_rows
    except pa.ArrowInvalid as error:
        if "straddling" not in str(error):
            raise
        raise UserError(f"{url}: a row behind row {rows:,} has more than {LONGEST_ROW:,} bytes: remove it") from None
