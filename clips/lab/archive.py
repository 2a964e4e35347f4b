"""A finished study as one file: the raw answers that its figures rest on, and its report.

A tar in xz, sorted and without times or owners, so that equal studies give equal bytes. What `unpack` writes is
bounded, and it takes only files whose names match a pattern.
"""

from __future__ import annotations

import json
import lzma
import math
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from clips.common.errors import UserError
from clips.common.files import differing, placing, sha256
from clips.data.tar import read_members

ENDING = ".tar.xz"
MOST_PACKED, MOST_BYTES, MOST_MEMORY = 50_000_000, 200_000_000, 100_000_000
"""Bytes of an archive, of what it unpacks to, and of memory that its decoder may ask for (xz -6 needs 9 MB)."""
MOST_MEMBERS = 20_000
TOLERANCE = 1e-6
"""Relative and absolute: sums of the same numbers may end in other digits on another machine."""


def pack(output: Path, names: Sequence[str], archive: Path, allowed: re.Pattern[str]) -> str:
    """Write the files `names` of `output` to `archive`; returns the archive's SHA-256.

    Raises UserError for what could not be unpacked again: a name that `allowed` does not match, too many bytes.
    """
    if strange := [name for name in names if not allowed.fullmatch(name)]:
        raise UserError(f"{output}: {strange[0]} has a name that an archive cannot hold")
    total = sum((output / name).stat().st_size for name in names)
    if total > MOST_BYTES or len(names) > MOST_MEMBERS:
        raise UserError(f"{output}: {len(names):,} files of {total:,} bytes are more than an archive may hold")
    with (
        placing(archive) as file,
        lzma.open(file, "wb", preset=6) as packed,
        tarfile.open(fileobj=packed, mode="w|") as tar,
    ):
        for name in sorted(names):
            member = tarfile.TarInfo(name)  # mode 644, no owner, 1 January 1970
            member.size = (output / name).stat().st_size
            with (output / name).open("rb") as content:
                tar.addfile(member, content)
    return sha256(archive)


def unpack(archive: Path, directory: Path, allowed: re.Pattern[str]) -> None:
    """Write the files of `archive` below `directory`, which must be empty.

    Raises UserError for a damaged file, links, a name twice or one that `allowed` does not match, and for more bytes or
    members than the limits above.
    """
    if not archive.is_file():
        raise UserError(f"there is no archive {archive}")
    if archive.stat().st_size > MOST_PACKED:
        raise UserError(f"{archive} has more than {MOST_PACKED:,} bytes")
    plain = directory / "archive.tar"
    _decompress(archive, plain)
    members, problems = read_members(str(plain))  # refuses links and names that climb out
    problems += [f"{name!r} is no file of such a study" for name in members if not allowed.fullmatch(name)]
    problems += [f"it has more than {MOST_MEMBERS:,} files"] if len(members) > MOST_MEMBERS else []
    if problems:
        raise UserError(f"{archive} cannot be unpacked: {problems[0]}")
    with plain.open("rb") as tar:
        for name, (offset, size) in members.items():
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            tar.seek(offset)
            path.write_bytes(tar.read(size))
    plain.unlink()


def _decompress(archive: Path, plain: Path) -> None:
    decoder, written = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MOST_MEMORY), 0
    with archive.open("rb") as packed, plain.open("wb") as out:
        while not decoder.eof:
            piece = packed.read(1 << 20) if decoder.needs_input else b""
            if decoder.needs_input and not piece:
                raise UserError(f"{archive} is cut off")
            try:
                found = decoder.decompress(piece, max_length=1 << 20)
            except lzma.LZMAError as error:
                raise UserError(f"{archive} is no xz file, or damaged, or needs too much memory: {error}") from None
            written += len(found)
            if written > MOST_BYTES:
                raise UserError(f"{archive} unpacks to more than {MOST_BYTES:,} bytes")
            out.write(found)


# ------------------------------------------------------------------------------------------- verify
def differences(there: Any, here: Any, path: str = "") -> Iterator[str]:
    """Where two values of JSON differ, a line each; numbers within `TOLERANCE` are equal."""
    for place, a, b in differing(there, here, _alike, path):
        yield f"{place}: {json.dumps(a)[:80]} as recorded, {json.dumps(b)[:80]} computed again"


def _alike(there: Any, here: Any) -> bool:
    if isinstance(there, float) and isinstance(here, (int, float)) and not isinstance(here, bool):
        return math.isclose(there, here, rel_tol=TOLERANCE, abs_tol=TOLERANCE) or (there != there and here != here)
    return type(there) is type(here) and there == here
