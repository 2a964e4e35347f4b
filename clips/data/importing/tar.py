"""Scan tar files: one pass over the headers finds every member.

A sample is the members that share a key: the path up to the first dot of the file name, as in webdataset.
A damaged shard still yields its good samples; the problems say what was lost.
"""

import tarfile
from collections.abc import Iterator
from typing import BinaryIO

from clips.common.errors import UserError
from clips.common.paths import is_plain
from clips.data.remote import open_binary

BLOCK = tarfile.BLOCKSIZE
MAX_NAME = 1 << 16
"""Longest extended header in bytes; a longer one is damage."""
MAX_DIGITS = 18
"""Maximum number of digits of a size in bytes."""
MAX_PROBLEMS = 50
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")
"""First bytes of gzip, bzip2, xz and zstd files."""
Place = tuple[int, int]
"""Offset and size of a member's data in bytes."""


def read_members(url: str) -> tuple[dict[str, Place], list[str]]:
    """Return the place of each regular member of a tar file by its name, and problems as lines of text.

    Raises UserError if the file has no member, or is not an uncompressed tar.
    """
    problems: list[str] = []
    members: dict[str, Place] = {}
    with open_binary(url) as file:
        for name, offset, size in tar_members(file, url, problems):
            _add(members, name, name, (offset, size), problems)
    if not members:
        raise UserError(f"{url} is not an uncompressed tar, or an empty one")
    return members, bounded(problems)


def read_samples(file: BinaryIO, url: str) -> tuple[dict[str, dict[str, Place]], list[str]]:
    """Return the places of the members of each sample, by key and lower-case extension, and problems."""
    problems: list[str] = []
    samples: dict[str, dict[str, Place]] = {}
    for name, offset, size in tar_members(file, url, problems):
        folder, _, base = name.rpartition("/")
        stem, dot, extension = base.partition(".")
        if stem and dot:  # as webdataset: no member without extension, and no hidden file such as macOS's ._x
            members = samples.setdefault(f"{folder}/{stem}" if folder else stem, {})
            _add(members, extension.lower(), name, (offset, size), problems)
    return samples, bounded(problems)


def _add(members: dict[str, Place], key: str, name: str, place: Place, problems: list[str]) -> None:
    if key in members:
        problems.append(f"member {name} appears twice; the first is used")
    else:
        members[key] = place


def bounded(problems: list[str]) -> list[str]:
    """Return at most MAX_PROBLEMS lines, and the number of the others."""
    more = len(problems) - MAX_PROBLEMS
    return [*problems[:MAX_PROBLEMS], f"and {more} more"] if more > 0 else problems


def tar_members(file: BinaryIO, shard: str, problems: list[str]) -> Iterator[tuple[str, int, int]]:
    """Yield (name, offset of the data, size) of each regular member; append what is unusable to `problems`.

    Python's tarfile ends silently at a damaged header; this scan continues at the next valid header. Raises UserError
    for a compressed file, a link, and a name that leads out of the shard.
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
