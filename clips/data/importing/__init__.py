"""Import a data set once: find its files, guess its fields, check every row, and write a manifest with Arrow indexes.

    .clips/NAME/manifest.json    next to the data, or in the user's cache if that folder is read-only or remote
    .clips/NAME/00000-….arrow    index of one shard or table, a row for each usable sample (`SCHEMA`)
    .clips/NAME/00000-….images   images that were inside a Parquet file, from which no single row can be read

Rows that cannot be used are counted in the manifest with examples and are in no index, so training never meets them.
Images are not copied, except those inside Parquet. `clips.data.dataset.Dataset` opens a manifest.
"""

import hashlib
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from clips.common.errors import BrokenDataError, UserError
from clips.common.escape import clip
from clips.common.files import from_json, lock, read_json, sha256, write_json
from clips.common.live import say
from clips.common.paths import cache_root, can_encode, inside, is_remote, without_secrets
from clips.config import OTHERS, Fields
from clips.data.images import MAX_BYTES
from clips.data.importing.index import IndexWriter, image_hash
from clips.data.importing.layouts import (
    MANIFEST,
    describe_fields,
    expand,
    guess_fields,
    guess_root,
    image_text_pairs,
    is_karpathy,
)  # fmt: skip
from clips.data.importing.tables import KarpathyFile, PairFolder, Table, open_table
from clips.data.importing.tar import Place, read_samples
from clips.data.remote import Copies, open_binary, stamp
from clips.data.sample import BrokenSample, cell_of, flat, image_in, mend_broken, texts_in

VERSION = 1
"""Raise it when the written format changes: older imports are then made anew."""
THREADS = 8
LARGE = 10**8
"""Bytes of files whose import is announced before it begins."""
NO_UTF8 = re.compile("[\udc80-\udcff]")
"""Characters that stand for bytes of a CSV file that are not UTF-8."""
PROBED_SAMPLES = 32
"""Samples whose JSON is read to find its keys, and rows whose images tell which folder their paths are relative to."""
CHOICES = (
    "\n  One caption is enough for CLIP: pretrain_clips.py --recipe small_clip, best with --init-from WEIGHTS"
    "\n  Long captions are written by python scripts/recaption.py --data DATA --captioner URL (docs/recaption.md)"
)
"""Printed if long captions are missing."""


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """What the user says about a data set; open fields are guessed."""

    fields: Fields = field(default_factory=Fields)
    image_root: str | None = None
    key: str | None = None
    """Field whose value is hashed instead of the image, unless it is empty."""
    allow_outside: bool = False
    """Take images whose path leads out of the image folder."""
    cache_bytes: int = 50 * 10**9
    """Most bytes of remote data that are copied to this machine."""


def import_data(spec: str, options: ImportOptions) -> tuple[Path, list[str]]:
    """Import what `spec` names, unless an import of the same files and options exists.

    Return the manifest and the URL of each part. Raises UserError if a file is missing, a field cannot be found, or
    shards and tables are mixed, and BrokenDataError if no row can be used.

    Args:
        spec: a file, a folder, a glob, a brace pattern or a URL; several, joined by `;`, become one set.
    """
    files = expand(spec)
    tables = [file for file in files if not file.endswith(".tar")]
    if tables and len(tables) < len(files):
        raise UserError(f"{spec!r} mixes tables and tar shards; give one kind")
    with ThreadPoolExecutor(THREADS) as pool:
        states = list(pool.map(state_of, files))
    wanted = json.loads(json.dumps(asdict(options)))
    del wanted["cache_bytes"]
    folder = _folder(spec, files[0], wanted)
    path = folder / MANIFEST
    with _alone(folder):
        old = read_json(path) if path.is_file() else {}
        if old.get("version") != VERSION:
            old = {}
        files_of_old = [(part["url"], part["state"]) for part in old.get("parts", [])]
        if files_of_old != list(zip(map(without_secrets, files), states, strict=True)):
            done = {(part["url"], part["state"]): part for part in old.get("parts", [])}
            manifest = _Import(folder, files, states, options, old, done).run(bool(tables))
            write_json(path, {"version": VERSION, "spec": without_secrets(spec), "options": wanted} | manifest)
            used = {part["index"] for part in (*manifest["parts"], *old.get("parts", []))}
            for stale in folder.glob("*.arrow"):
                if stale.name not in used:  # a running training may still read the one before
                    for file in folder.glob(f"{stale.stem}.*"):
                        file.unlink(missing_ok=True)
    return path, files


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the lock of an import. Raises UserError if another process does not give it up."""
    try:
        held = lock(folder / "lock", wait=True)
    except TimeoutError as error:
        raise UserError(f"{folder} is being imported by another process: {error.strerror}") from None
    with held:
        yield


def state_of(url: str) -> str:
    """Return a text that changes with a file's size and time, or with those of any file of a folder of pairs.

    Raises UserError if the file cannot be read.
    """
    if not os.path.isdir(url):
        return stamp(url.partition("#")[0] if is_karpathy(url) else url)
    digest = hashlib.sha256()
    for name in image_text_pairs(url)[0]:
        for file in (name, f"{os.path.splitext(name)[0]}.txt"):
            with suppress(OSError):  # removed meanwhile
                status = os.stat(os.path.join(url, file))
                digest.update(f"{name}\0{status.st_size} {status.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:12]


def _folder(spec: str, first: str, options: dict[str, Any]) -> Path:
    """Return the folder of an import, which is next to the first file, or in the cache if that cannot be written."""
    where = os.path.abspath(spec) if os.path.exists(spec) else f"{os.getcwd()}\0{spec}"
    where = spec if is_remote(spec) or spec.startswith("hf:") else where
    name = hashlib.sha256(json.dumps([where, options]).encode()).hexdigest()[:16]
    folders = [cache_root() / "imports" / name]
    if not is_remote(first):
        place = first if os.path.isdir(first) else os.path.dirname(os.path.abspath(first))
        folders.insert(0, Path(place, ".clips", name))
    refusals = []
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "lock").touch()
            return folder
        except OSError as error:
            refusals.append(str(error))
    raise UserError(f"the index of {first} cannot be written ({'; '.join(refusals)}); set CLIPS_MLLM_CACHE to a folder")


class _Import:
    """One import of all files of a set."""

    def __init__(
        self, folder: Path, files: list[str], states: list[str], options: ImportOptions, old: dict[str, Any],
        done: dict[tuple[str, str], dict[str, Any]],
    ) -> None:  # fmt: skip
        self.folder, self.files, self.states, self.options, self.done = folder, files, states, options, done
        self.old_fields = old.get("fields")
        self.fields: Fields | None = None
        self.names: list[str] = []
        self.notes: list[str] = []
        self.base = ""
        if first := done.get((without_secrets(files[0]), states[0])):  # it tells the same again
            self.fields, self.names = Fields(**old["fields"]), old["names"]
            self.base = os.path.abspath(first["root"]) if first["root"] else ""
        self.copies = Copies(options.cache_bytes) if options.cache_bytes and any(map(is_remote, files)) else None

    def run(self, tables: bool) -> dict[str, Any]:
        """Import every file and return the content of the manifest."""
        one = self._table if tables else self._shard
        where = (
            self.files[0] if len(self.files) == 1 else f"{self.files[0]} … {self.files[-1]} ({len(self.files)} files)"
        )
        total = sum(os.path.getsize(file) for file in self.files if os.path.isfile(file))
        if total > LARGE:
            say(
                without_secrets(
                    f"importing {where}: {total / 1e9:.1f} GB are read once, the index goes to {self.folder}"
                )
            )
        with tqdm(desc="importing", unit=" rows", leave=False, disable=None) as self.bar:
            parts = [self._part(0, one)]
            while self.fields is None and len(parts) < len(self.files):  # the first one with samples fixes the fields
                parts.append(self._part(len(parts), one))
            with ThreadPoolExecutor(THREADS) as pool:
                parts += pool.map(lambda number: self._part(number, one), range(len(parts), len(self.files)))
        samples = sum(part["samples"] for part in parts)
        skipped = sum((Counter(part["skipped"]) for part in parts), Counter())
        self.notes = [line for part in parts for line in part["notes"]]
        if self.fields is not None and self.fields != self.options.fields:
            self.notes.append(f"{where}: {describe_fields(self.fields)} (guessed; --fields overrules)")
        if skipped:
            first = next(part["examples"][0] for part in parts if part["examples"])
            counts = ", ".join(f"{count:,} {reason}" for reason, count in skipped.most_common())
            of_all = f"{skipped.total():,} of {sum(part['rows'] for part in parts):,} rows"
            self.notes.append(f"{where}: {of_all} are skipped ({counts}); the first is {first[0]}: {first[1]}")
        if self.fields is None or not samples:
            raise BrokenDataError("\n".join([f"no sample of {where} can be used", *self.notes[-1:], mend_broken(1)]))
        size = sum(file.stat().st_size for file in self.folder.iterdir())
        say(without_secrets(f"imported {where}: {samples:,} samples, index of {size / 1e6:,.1f} MB in {self.folder}"))
        return {
            "fields": asdict(self.fields), "names": self.names, "notes": list(map(without_secrets, self.notes)),
            "parts": parts,
        }  # fmt: skip

    def _part(self, number: int, one: Callable[[str, BinaryIO | None, IndexWriter], dict[str, Any]]) -> dict[str, Any]:
        """Import one file, or take it over from the import before."""
        url, state = self.files[number], self.states[number]
        before = self.done.get((without_secrets(url), state))
        same = self.fields is not None and asdict(self.fields) == self.old_fields
        if before is not None and same and (self.folder / before["index"]).is_file():
            return before
        local = not is_remote(url)
        with _opened(url, state, self.copies) as file:
            name = f"{number:05}-{hashlib.sha256(f'{url} {state}'.encode('utf-8', 'surrogateescape')).hexdigest()[:8]}"
            index = IndexWriter(self.folder / name, None if local else self.options.cache_bytes, self.bar)
            with index:
                facts = one(url, file, index)
            facts |= index.finish(self.fields)
        is_file = local and os.path.isfile(url)
        facts |= {"sha256": sha256(Path(url)) if is_file else None, "size": os.path.getsize(url) if is_file else 0}
        return {"url": without_secrets(url), "state": state} | facts

    # ----------------------------------------------------------------------------------------------------- tar shards
    def _shard(self, url: str, file: BinaryIO | None, index: IndexWriter) -> dict[str, Any]:
        assert file is not None
        label = without_secrets(url)
        samples, problems = read_samples(file, url)
        index.notes += [f"{url}: {line}" for line in problems]
        if self.fields is None and samples:
            self._guess_from_shard(label, samples, file)
        fields = {
            part: _alternatives(getattr(self.fields or self.options.fields, part)) for part in ("image", "web", "long")
        }
        for key, members in samples.items():
            try:
                index.add(key, *self._of_shard(_Members(key, members, file), fields, label if is_remote(url) else None))
            except BrokenSample as broken:
                index.skip(key, broken.reason)
        return {"root": None, "identity": "key" if self.options.key else "name" if is_remote(url) else "bytes"}

    def _guess_from_shard(self, label: str, samples: dict[str, dict[str, Place]], file: BinaryIO) -> None:
        """Choose the fields among extensions, and `ext:key` for JSON keys of the first samples."""
        given = self.options.fields
        names = {extension for members in samples.values() for extension in members}
        lists: set[str] = set()
        extensions = {e for part in ("image", "web", "long") for e, key in _alternatives(getattr(given, part)) if key}
        for key, members in itertools.islice(samples.items(), PROBED_SAMPLES):
            for extension in extensions | {"json"}:
                with suppress(BrokenSample):  # counted when the sample itself is read
                    cells = dict(flat(_Members(key, members, file).json(extension) or {}))
                    names |= {f"{extension}:{cell}" for cell in cells}
                    lists |= {f"{extension}:{cell}" for cell, value in cells.items() if isinstance(value, list)}
        self.names = sorted(names)
        fields = guess_fields(given, self.names, lists)
        for part in ("image", "web"):
            found = [e if key is None else f"{e}:{key}" for e, key in _alternatives(getattr(fields, part))]
            if not set(found) & names:
                raise missing_field(label, part, getattr(fields, part), self.names)
        self._check_key(self.names)
        self.fields = fields

    def _of_shard(
        self, members: "_Members", fields: dict[str, list[tuple[str, str | None]]], remote: str | None
    ) -> tuple[Place, list[str], list[str], int, dict[str, Any]]:
        places = [members.places[e] for e, _ in fields["image"] if e in members.places]
        place = next((place for place in places if place[1]), None)
        if place is None:
            raise BrokenSample(members.key, "image: the file is empty" if places else "no image")
        if place[1] > MAX_BYTES:
            raise BrokenSample(members.key, f"image: {place[1]} bytes are above the limit of {MAX_BYTES}")
        if not any(e in members.places for e, _ in fields["web"]):
            raise BrokenSample(members.key, "no web caption")
        web, long = (
            next(filter(None, (members.text(e, key) for e, key in fields[part])), None) for part in ("web", "long")
        )
        extra = members.json("json") or {}
        if (label := members.read("cls")) is not None:
            extra = {"cls": label.decode("utf-8", "replace").strip()} | extra
        if remote is not None:  # not the bytes: their hashes were never part of a run on remote data
            identity = f"{os.path.basename(remote)}#{members.key}".encode()
        else:
            identity = members.at(place, "image")
        if (key := self.options.key) is not None:
            ((extension, cell),) = _alternatives(key if key in self.names else f"json:{key}")
            identity = _key_identity(members.text(extension, cell), identity)
        texts = _captions(members.key, [web], [long])
        return place, *texts, image_hash(identity), extra

    # --------------------------------------------------------------------------------------------------------- tables
    def _table(self, url: str, file: BinaryIO | None, index: IndexWriter) -> dict[str, Any]:
        table = open_table(url, file, index.notes.append)
        if self.fields is None:
            self.names = [*table.columns]
            self.fields = guess_fields(self.options.fields, table.columns, table.lists)
            self._check_key(self.names)
        fields = self.fields
        spec = {part: [c for c in getattr(fields, part).split(";") if c] for part in ("image", "web", "long")}
        if fields.long == OTHERS:
            spec["long"] = []
        for part in ("image", "web") if spec["web"] or fields.web else ("image",):
            if not set(spec[part]) & set(table.columns):
                raise missing_field(table.name, part, getattr(fields, part), table.columns)
        used = {column for columns in spec.values() for column in columns}
        rows = iter(table)
        probed = list(itertools.islice(rows, PROBED_SAMPLES))
        root = self.options.image_root or table.root
        cells = [_value(row, spec["image"]) for row in probed if isinstance(row, dict)]
        paths = [cell for cell in cells if isinstance(cell, str) and cell]
        if paths and not any(isinstance(cell, (bytes, dict)) for cell in cells):
            slashed = [_with_slashes(root, path) for path in paths]
            if slashed != paths:
                index.notes.append(f"{table.name}: Windows' backslashes in image paths are read as slashes")
            root = guess_root(
                table.name, root, slashed, index.notes.append, is_given=self.options.image_root is not None
            )
        self.base = self.base or os.path.abspath(root)
        is_path = True
        for number, row in enumerate(itertools.chain(probed, rows)):
            try:
                if isinstance(row, ValueError):  # bad JSON, wrong encoding
                    raise BrokenSample(str(number), str(row))
                place, texts, hashed, extra = self._of_row(number, row, spec, used, root, table, index)
                is_path &= isinstance(place, str)
                index.add(str(number), place, *texts, hashed, extra)
            except BrokenSample as broken:
                index.skip(str(number), broken.reason)
        if table.unfit:
            first = getattr(table, "first_unfit", 0)
            index.skip(f"line {first}", "more or fewer cells than the header, or an open quote", table.unfit)
        if spec["web"]:
            before = index.rows
            if index.group():
                index.notes.append(
                    f"{table.name}: {before:,} rows of {index.rows:,} images: the captions of each are gathered"
                )
            # A few repeated images make no lists.
            open_long = self.options.fields.long == Fields().long and not fields.long
            if url == self.files[0] and open_long and 3 * index.rows < 2 * before:
                self.fields = replace(fields, long=OTHERS)
        return {"root": root, "identity": "key" if self.options.key else "path" if is_path else "bytes"}

    def _of_row(
        self, number: int, row: dict[str, Any], spec: dict[str, list[str]], used: set[str], root: str,
        table: Table | PairFolder | KarpathyFile, index: IndexWriter,
    ) -> tuple[Place | str, tuple[list[str], list[str]], int, dict[str, Any]]:  # fmt: skip
        key = str(number)
        image = image_in(_value(row, spec["image"]))
        for column in used:
            if isinstance(cell := row.get(column), str) and NO_UTF8.search(cell):
                raise BrokenSample(key, f"column {column}: not UTF-8")
        texts = _captions(key, *([_value(row, spec[part])] for part in ("web", "long"))) if spec["web"] else ([], [])
        place: Place | str
        if isinstance(image, bytes):
            identity, place = image, index.store(image)
        else:
            place = self._path(key, image, root, table.lists_images)
            identity = os.fsencode(os.path.relpath(os.path.join(os.path.abspath(root), place), self.base))
        if self.options.key:
            identity = _key_identity(cell_of(row, self.options.key), identity)
        extra = {name: cell for name, cell in row.items() if name not in used and not isinstance(cell, bytes)}
        return place, texts, image_hash(identity), extra

    def _path(self, key: str, image: Any, root: str, is_there: bool) -> str:
        """Return an image's path below `root`. Raises BrokenSample if there is no such image."""
        if not isinstance(image, str) or not image:
            raise BrokenSample(key, f"image: {type(image).__name__} is neither a path nor bytes")
        if "\0" in image or not can_encode(image):
            raise BrokenSample(key, f"image: {image!r:.200} is no path")
        image = _with_slashes(root, image)
        path = os.path.join(os.path.abspath(root), image)
        if not self.options.allow_outside:
            try:
                path = inside(root, image)
            except ValueError as error:
                hint = "--image-root names the folder above it, --set data.allow_outside=true takes any path"
                raise BrokenSample(key, f"image outside: {error} ({hint})") from None
        if not is_there and not os.path.isfile(path):
            raise BrokenSample(key, f"missing image: {clip(image, 200)!r} is not in {root}")
        return os.path.relpath(path, os.path.abspath(root))

    def _check_key(self, names: Sequence[str]) -> None:
        if (key := self.options.key) and not {key, f"json:{key}"} & set(names):
            raise UserError(f"--key {key!r} is not among the fields found: {clip(', '.join(names))}")


class _Members:
    """The members of one sample of a shard, read on demand."""

    def __init__(self, key: str, places: dict[str, Place], file: BinaryIO) -> None:
        self.key, self.places, self._file = key, places, file
        self._json: dict[str, dict[str, Any] | None] = {}

    def at(self, place: Place, what: str) -> bytes:
        """Return the bytes at a place. Raises BrokenSample if they are too many or cut off."""
        offset, size = place
        if size > MAX_BYTES:
            raise BrokenSample(self.key, f"{what}: {size} bytes are above the limit of {MAX_BYTES}")
        try:
            self._file.seek(offset)
            data = self._file.read(size)
        except OSError as error:
            raise BrokenSample(self.key, f"{what}: {error}") from None
        if len(data) != size:
            raise BrokenSample(self.key, f"{what}: cut off, {len(data)} of {size} bytes are there")
        return data

    def read(self, extension: str) -> bytes | None:
        """Return a member's bytes, or None if there is none. Raises BrokenSample."""
        return self.at(self.places[extension], extension) if extension in self.places else None

    def json(self, extension: str) -> dict[str, Any] | None:
        """Return the parsed JSON member, or None if there is none. Raises BrokenSample if it is no object."""
        if extension not in self._json:
            data = self.read(extension)
            try:
                value = None if data is None else from_json(data)
            except (ValueError, RecursionError) as error:
                raise BrokenSample(self.key, f"{extension}: bad JSON ({error})") from None
            if value is not None and not isinstance(value, dict):
                raise BrokenSample(self.key, f"{extension}: not a JSON object")
            self._json[extension] = value
        return self._json[extension]

    def text(self, extension: str, key: str | None) -> Any:
        """Return a text member, or the value of `key` in a JSON member. Raises BrokenSample."""
        if key is not None:
            return cell_of(self.json(extension) or {}, key)
        data = self.read(extension)
        try:
            return None if data is None else data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise BrokenSample(self.key, f"{extension}: not UTF-8 ({error})") from None


def _opened(url: str, state: str, copies: Copies | None) -> Any:
    if os.path.isdir(url) or is_karpathy(url):
        return nullcontext()
    copy = copies.open(url, state) if copies is not None and is_remote(url) else None
    return copy or open_binary(url)


def _captions(key: str, web: list[Any], long: list[Any]) -> tuple[list[str], list[str]]:
    texts = texts_in(key, "web", web), texts_in(key, "long", long)
    if not texts[0]:
        raise BrokenSample(key, "web caption is empty")
    return texts


def _value(row: dict[str, Any], columns: Sequence[str]) -> Any:
    return next((cell for column in columns if (cell := cell_of(row, column)) is not None), None)


def _key_identity(cell: Any, image: bytes) -> bytes:
    return image if cell is None or cell == "" else f" key {cell}".encode("utf-8", "surrogatepass")


def _with_slashes(root: str, path: str) -> str:
    """Return `path` with slashes for the backslashes of Windows, unless a file has that very name."""
    is_of_windows = "\\" in path and not os.path.exists(os.path.join(root, path))
    return path.replace("\\", "/") if is_of_windows else path


def _alternatives(spec: str) -> list[tuple[str, str | None]]:
    """Parse `ext;ext:key` into [(ext, None), (ext, key)]."""
    parts = [part.partition(":") for part in spec.split(";") if part]
    return [(extension.lower().removeprefix("."), key or None) for extension, _, key in parts]


def missing_field(where: str, name: str, spec: str, names: Sequence[str]) -> UserError:
    """Return the error for data without images, web captions or long captions, with the fields that it has."""
    what = {"image": "images", "web": "web captions", "long": "long captions, which this training needs"}[name]
    reason = f"data.fields.{name} = {spec!r} is not" if spec else "no usual name is"
    return UserError(
        f"{where} has no {what}: {reason} among the fields found: "
        f"{clip(', '.join(names)) or 'none'}. Name the right one with --fields {name}=FIELD"
        + (f".{CHOICES}" if name == "long" else "")
    )
