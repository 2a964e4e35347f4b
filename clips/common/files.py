"""Files that a crash cannot leave half written: atomic replacement, and directories sealed by a manifest of hashes."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
MANIFEST = "MANIFEST.json"


def first_usable(candidates: Iterable[Path], verified: Callable[[Path], T]) -> T | None:
    """What `verified` makes of the first candidate that it does not refuse with ValueError; the others are named."""
    for path in candidates:
        try:
            return verified(path)
        except ValueError as fault:
            print(f"warning: checkpoint {path} is not usable ({fault}); trying the one before it", file=sys.stderr)
    return None


def seal(directory: Path) -> None:
    """Write MANIFEST.json, the SHA-256 of every file below `directory`; before that a checkpoint does not count."""
    files = [path for path in sorted(directory.rglob("*")) if path.is_file() and path.name != MANIFEST]
    digests = {str(path.relative_to(directory)): _sha256(path) for path in files}
    write_atomically(directory / MANIFEST, json.dumps(digests, indent=2) + "\n")


def check_seal(directory: Path, required: Iterable[str] = ()) -> Path:
    """`directory`, if its files are what was sealed, `required` among them; ValueError says what is wrong otherwise."""
    try:
        digests = json.loads((directory / MANIFEST).read_text())
        for name in dict.fromkeys([*required, *digests]):
            if digests.get(name) != _sha256(directory / name):
                raise ValueError(f"{name} does not match its SHA-256 in {MANIFEST}")
    except OSError as error:
        raise ValueError(f"{Path(error.filename or directory).name}: {error.strerror}") from None
    except (AttributeError, TypeError) as error:
        raise ValueError(f"{MANIFEST} was not written by this program: {error}") from None
    return directory


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` so that a reader, or a crash, sees the old text or the new, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    _fsync(temporary)
    os.replace(temporary, path)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
