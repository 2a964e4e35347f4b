"""Random access to tar files: one pass over the headers finds every member.

A sample is the members that share a key: the path up to the first dot of the file name, as in webdataset.
A damaged shard still yields its good samples; `problems` says what was lost.
"""

import json
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save
from tqdm import tqdm

from clips.common.errors import UserError
from clips.common.paths import is_plain
from clips.data.sidecar import open_binary, sidecar

BLOCK = tarfile.BLOCKSIZE
THREADS = 16
"""Shards whose indexes are read at once; for remote shards this is waiting for the network."""
MAX_NAME = 1 << 16
"""Longest extended header in bytes; a longer one is damage."""
MAX_DIGITS = 18
"""Maximum number of digits of a size in bytes."""
MAX_PROBLEMS = 50
INDEX = ".idx.safetensors"
"""The ending of an index. Not numpy's format: it parses headers with `ast`, and that fails now and then if two threads
do so at once (SystemError in Python 3.11 and 3.12)."""
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")
"""First bytes of gzip, bzip2, xz and zstd files."""


@dataclass(frozen=True)
class ShardSummary:
    """The part of a shard's index that opening a set needs."""

    index: Path
    layouts: dict[tuple[str, ...], int]
    """Number of samples by their exact set of extensions."""
    problems: list[str]
    """What could not be used."""


@dataclass(frozen=True)
class ShardIndex:
    """Positions of members. `offsets` and `sizes` are int64 [samples, extensions], −1 for a missing member."""

    keys: list[str]
    extensions: list[str]
    offsets: np.ndarray
    sizes: np.ndarray


def shard_summary(url: str) -> ShardSummary:
    """Return the summary of a shard's index; the index is built and stored on first use.

    Raises UserError if the shard cannot be indexed, or if its stored index is damaged.
    """
    path = sidecar(url, INDEX, lambda target: _write_index(url, target))
    try:
        with safe_open(path, "numpy") as stored:
            meta = from_array(stored.get_tensor("meta"))
        return ShardSummary(path, {tuple(names): n for names, n in meta["layouts"]}, meta["problems"])
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): remove it, and it is made again") from None


def open_shards(urls: Sequence[str]) -> list[ShardSummary]:
    """Return the summary of each shard. Missing indexes are made in threads, with a progress bar.

    Finished indexes stay, so a stopped command continues where it was. Raises UserError like `shard_summary`.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        done = pool.map(shard_summary, urls)
        return list(tqdm(done, "indexing shards", len(urls), unit="shard", leave=False, disable=None))


def load_index(path: Path) -> ShardIndex:
    """Load the index of a shard from its sidecar file."""
    stored = load_file(path)
    extensions = from_array(stored["meta"])["extensions"]
    return ShardIndex(from_array(stored["keys"]), extensions, stored["offsets"], stored["sizes"])


def names_and_sizes(path: Path) -> bytes:
    """Return the names and sizes of a shard's members from its index, but not their positions, as bytes to hash."""
    with safe_open(path, "numpy") as stored:
        meta = from_array(stored.get_tensor("meta"))
        arrays = [stored.get_tensor(name) for name in ("keys", "sizes")]
    return b"".join([json.dumps(meta["extensions"]).encode(), *(array.tobytes() for array in arrays)])


def as_array(value: Any) -> np.ndarray:
    """Return `value` as JSON in uint8 [bytes], since the header of a safetensors file holds only 100 MB."""
    return np.frombuffer(json.dumps(value).encode(), dtype=np.uint8)


def from_array(stored: np.ndarray) -> Any:
    """Undo `as_array`."""
    return json.loads(stored.tobytes())


def read_members(url: str) -> tuple[dict[str, tuple[int, int]], list[str]]:
    """Return {name: (offset of the data, size)} of the regular members of a tar file, and problems as lines of text.

    Raises UserError if the file has no member, or is not an uncompressed tar.
    """
    problems: list[str] = []
    members: dict[str, tuple[int, int]] = {}
    with open_binary(url) as file:
        for name, offset, size in _members(file, url, problems):
            if name in members:
                problems.append(_twice(name))
            else:
                members[name] = (offset, size)
    if not members:
        raise UserError(f"{url} is not an uncompressed tar, or an empty one")
    return members, _bounded(problems)


def _write_index(url: str, target: Path) -> None:
    problems: list[str] = []
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    with open_binary(url) as file:
        for name, offset, size in _members(file, url, problems):
            folder, _, base = name.rpartition("/")
            stem, dot, extension = base.partition(".")
            if not stem or not dot:
                continue  # as webdataset: no extension, or a hidden file such as macOS's ._x
            members = samples.setdefault(f"{folder}/{stem}" if folder else stem, {})
            if extension.lower() in members:
                problems.append(_twice(name))
            else:
                members[extension.lower()] = (offset, size)
    extensions = sorted({extension for members in samples.values() for extension in members})
    absent = (-1, -1)
    places = np.array(
        [[members.get(extension, absent) for extension in extensions] for members in samples.values()], dtype=np.int64
    ).reshape(len(samples), len(extensions), 2)
    layouts = Counter(tuple(sorted(members)) for members in samples.values())
    meta = {"extensions": extensions, "layouts": list(layouts.items()), "problems": _bounded(problems)}
    arrays = {
        "meta": as_array(meta),
        "keys": as_array(list(samples)),
        "offsets": np.ascontiguousarray(places[..., 0]),
        "sizes": np.ascontiguousarray(places[..., 1]),
    }
    target.write_bytes(save(arrays))  # raises OSError if it cannot be written; save_file raises its own error


def _twice(name: str) -> str:
    return f"member {name} appears twice; the first is used"


def _bounded(problems: list[str]) -> list[str]:
    more = len(problems) - MAX_PROBLEMS
    return [*problems[:MAX_PROBLEMS], f"and {more} more"] if more > 0 else problems


def _members(file: BinaryIO, shard: str, problems: list[str]) -> Iterator[tuple[str, int, int]]:
    """Yield (name, offset of the data, size) of each regular member; append unusable members to `problems`.

    Python's tarfile ends silently at a damaged header; this scan continues at the next valid header.
    """
    end = file.seek(0, 2)
    file.seek(0)
    if file.read(6).startswith(COMPRESSED):  # or the search for a next header would read all of it
        raise UserError(f"{shard} is a compressed file: members are read in place, so unpack it to a plain .tar")
    position, last, damaged, zeros = 0, "the beginning", False, False
    extended: dict[str, bytes] = {}  # fields of a long-name or pax header, for the next member
    while position + BLOCK <= end:
        file.seek(position)
        block = file.read(BLOCK)
        if block.count(0) == BLOCK:
            position, zeros = position + BLOCK, True
            continue
        try:
            if damaged and block[257:262] != b"ustar":
                raise tarfile.HeaderError("not a header")
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            stated = extended.get("size", b"0")
            if info.size < 0 or not stated.isdigit() or len(stated) > MAX_DIGITS:
                raise tarfile.HeaderError("a size that is none")
        except tarfile.HeaderError as error:
            if not damaged:
                problems.append(f"damaged at byte {position}, after {last} ({error}); reading on at the next header")
            position, damaged, extended = position + BLOCK, True, {}
            continue
        if zeros and last != "the beginning":
            problems.append(f"empty blocks before byte {position}, after {last}: an end mark or a hole in the file")
        damaged = zeros = False
        data = position + BLOCK
        if info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE) and info.size <= MAX_NAME:
            body = file.read(info.size)
            extended |= {"path": body.rstrip(b"\0")} if info.type == tarfile.GNUTYPE_LONGNAME else _pax(body)
            position = data + -(-info.size // BLOCK) * BLOCK
            continue
        name = extended["path"].decode("utf-8", "surrogateescape") if "path" in extended else info.name
        size = int(extended.get("size", info.size))
        is_sparse = info.issparse() or "sparse" in extended
        extended = {}
        position = data + -(-size // BLOCK) * BLOCK
        if data + size > end:  # the file is cut off, or the size is wrong and more members follow
            problems.append(f"member {name} is cut off: the file ends at byte {end}, it needs {data + size}")
            position, damaged = data, True
        elif info.isreg() and not is_sparse:
            name = name.removeprefix("./")
            if not is_plain(name):
                raise UserError(f"{shard}: member {name!r} points outside the shard; remove it or repack the shard")
            last = f"member {name}"
            yield name.encode("utf-8", "backslashreplace").decode(), data, size
        elif info.issym() or info.islnk():
            raise UserError(f"{shard}: member {name!r} is a link; repack the shard with tar --dereference")
        elif not info.isdir() and info.type != tarfile.XGLTYPE:
            problems.append(f"member {name} is {'sparse' if is_sparse else 'not a regular file'}")
    if 0 < end - position < BLOCK and not damaged:
        problems.append(f"the file ends inside a header, after {last}")


def _pax(body: bytes) -> dict[str, bytes]:
    """Return `path`, `size` and `sparse` of a POSIX extended header, whose records are "LENGTH key=value\\n"."""
    fields, position = {}, 0
    while position < len(body):
        length, space, _ = body[position:].partition(b" ")
        if not space or not length.isdigit() or len(length) > MAX_DIGITS or int(length) <= len(length) + 2:
            break
        key, _, value = body[position + len(length) + 1 : position + int(length) - 1].partition(b"=")
        if key in (b"path", b"size"):
            fields[key.decode()] = value
        elif key.startswith(b"GNU.sparse."):
            fields["sparse"] = b""
        position += int(length)
    return fields
