"""A finished study as one file: the raw answers that its metrics rest on, and its report.

The file is a tar in xz, sorted and without times or owners, so that equal studies give equal bytes. `unpack` takes only
files whose names match a pattern, and a bounded number of bytes.
"""

import io
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

ENDING = ".tar.xz"
MOST_BYTES = 200_000_000
"""Maximum number of bytes that an archive unpacks to."""
TOLERANCE = 1e-6
"""Relative and absolute, because sums of the same numbers may end in other digits on another machine."""


def pack(output: Path, names: Sequence[str], archive: Path, allowed: re.Pattern[str]) -> str:
    """Write the files `names` below `output` to the .tar.xz file `archive`, and return its SHA-256 (hex).

    Equal files give an equal archive. Raises UserError if a name does not match `allowed`, or for more than MOST_BYTES.
    """
    for name in names:
        if not allowed.fullmatch(name):
            raise UserError(f"{output}: {name} has a name that an archive cannot hold")
    total = sum((output / name).stat().st_size for name in names)
    if total > MOST_BYTES:
        raise UserError(f"{output}: {total:,} bytes are more than an archive may hold")
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
    """Unpack `archive` into `directory`.

    Raises UserError if it is missing or damaged, unpacks to more than MOST_BYTES, or holds anything but regular files
    whose names match `allowed`; members before such a one have been written by then.
    """
    if not archive.is_file():
        raise UserError(f"there is no archive {archive}")
    try:
        with lzma.open(archive) as packed:
            content = packed.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise UserError(f"{archive} unpacks to more than {MOST_BYTES:,} bytes")

        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
            for member in tar:
                if not (member.isreg() and allowed.fullmatch(member.name)):
                    raise UserError(
                        f"{archive} cannot be unpacked: {member.name!r} is not a file of such a study in this version"
                    )
                path = directory / member.name
                path.parent.mkdir(parents=True, exist_ok=True)
                file = tar.extractfile(member)
                assert file is not None
                path.write_bytes(file.read())
    except (EOFError, lzma.LZMAError, tarfile.TarError) as error:
        raise UserError(f"{archive} is not an archive of a study, or is damaged: {error}") from None


# ------------------------------------------------------------------------------------------- verify
def mismatches(recorded: Any, current: Any, path: str = "") -> Iterator[str]:
    """Yield a line for each place in which two JSON values differ; numbers within `TOLERANCE` are equal."""
    for place, a, b in differing(recorded, current, _alike, path):
        yield f"{place}: {json.dumps(a)[:80]} as recorded, {json.dumps(b)[:80]} computed again"


def _alike(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, (int, float)) and not isinstance(b, bool):
        return math.isclose(a, b, rel_tol=TOLERANCE, abs_tol=TOLERANCE) or (a != a and b != b)
    return type(a) is type(b) and a == b
