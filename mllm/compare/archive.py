"""A finished comparison as one file that verifies elsewhere: what the report rests on, and the report.

    report.json  compare.json  encoders.json  questions/NAME.jsonl
    cells/NAME/  cell.json config.json env.json cost.json align/done.json instruct/done.json
                 evaluation/NAME.jsonl evaluation/figures.json benchmarks/TASK/MODEL/DATE_results.json

A tar in xz, sorted and without times or owners, so that the same comparison gives the same bytes. One that is unpacked
was sent by a stranger: how much it may hold is bounded before it is held, and nothing but the files above is taken.
"""

from __future__ import annotations

import lzma
import re
import tarfile
from pathlib import Path

from clips import read_members
from clips.common.errors import UserError
from clips.common.files import placing, read_json, sha256
from mllm.compare.collect import REPORT, stored_files
from mllm.compare.plan import comparison_of

ENDING = ".tar.xz"
MOST_PACKED, MOST_BYTES, MOST_MEMORY = 50_000_000, 200_000_000, 100_000_000
"""Bytes of an archive, of what it unpacks to, and of memory that its decoder may ask for (xz -6 needs 9 MB)."""
MOST_MEMBERS = 20_000
_NAME = r"(?!\.{1,2}(?:/|$))[^/\\\x00-\x1f]{1,200}"
MEMBER = re.compile(
    rf"(?:report|compare|encoders)\.json|questions/{_NAME}\.jsonl?|cells/{_NAME}/(?:(?:cell|config|env|cost)\.json"
    rf"|(?:align|instruct)/done\.json|evaluation/{_NAME}\.jsonl?|benchmarks/{_NAME}/{_NAME}/{_NAME}_results\.json)"
)


def pack(output: Path, archive: Path) -> str:
    """Write the comparison in `output` to `archive`; returns the archive's SHA-256.

    Raises UserError for what could not be unpacked again.
    """
    comparison = comparison_of(read_json(output / REPORT)["plan"], output)
    names = sorted([REPORT, *stored_files(comparison)])
    if strange := [name for name in names if not MEMBER.fullmatch(name)]:
        raise UserError(f"{output}: {strange[0]} has a name that an archive cannot hold")
    total = sum((output / name).stat().st_size for name in names)
    if total > MOST_BYTES or len(names) > MOST_MEMBERS:
        raise UserError(f"{output}: {len(names):,} files of {total:,} bytes are more than an archive may hold")
    with (
        placing(archive) as file,
        lzma.open(file, "wb", preset=6) as packed,
        tarfile.open(fileobj=packed, mode="w|") as tar,
    ):
        for name in names:
            member = tarfile.TarInfo(name)  # mode 644, no owner, 1 January 1970
            member.size = (output / name).stat().st_size
            with (output / name).open("rb") as content:
                tar.addfile(member, content)
    return sha256(archive)


def unpack(archive: Path, directory: Path) -> None:
    """Write the files of `archive` below `directory`, which must be empty.

    Raises UserError, naming what is wrong, for anything that `pack` does not write: links, other names, a name twice,
    a damaged or cut file, more bytes or members than the limits above.
    """
    if not archive.is_file():
        raise UserError(f"there is no archive {archive}")
    if archive.stat().st_size > MOST_PACKED:
        raise UserError(f"{archive} has more than {MOST_PACKED:,} bytes")
    plain = directory / "archive.tar"
    _decompress(archive, plain)
    members, problems = read_members(str(plain))  # refuses links and names that climb out
    problems += [f"{name!r} is no file of a comparison" for name in members if not MEMBER.fullmatch(name)]
    problems += [f"it has more than {MOST_MEMBERS:,} files"] if len(members) > MOST_MEMBERS else []
    if problems:
        raise UserError(f"{archive} is no archive of a comparison: {problems[0]}")
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
        if decoder.unused_data or packed.read(1):
            raise UserError(f"{archive} has something behind its end")
