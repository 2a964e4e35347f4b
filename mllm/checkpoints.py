"""Which of the Trainer's checkpoints are whole: each is sealed with the SHA-256 of its files after it was written."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from pathlib import Path

import numpy as np

from clips.checkpoint import MANIFEST, write_atomically
from clips.errors import NoCheckpointError


def seal(directory: Path) -> None:
    """Write MANIFEST.json; before that the checkpoint does not count."""
    files = [path for path in sorted(directory.rglob("*")) if path.is_file() and path.name != MANIFEST]
    digests = {str(path.relative_to(directory)): _sha256(path) for path in files}
    write_atomically(directory / MANIFEST, json.dumps(digests, indent=2) + "\n")


def newest(stage_dir: Path) -> Path | None:
    """The newest sealed checkpoint whose files match their hashes; None where none was ever sealed.

    A damaged one is named in a warning and the one before it is used; one that was never finished is passed over.
    Raises NoCheckpointError when there are sealed ones and none is good: never a silent restart from zero.
    """
    found = [path for path in stage_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    sealed = [path for path in found if (path / MANIFEST).is_file()]
    for path in sorted(sealed, key=lambda path: -int(path.name.partition("-")[2])):
        fault = _fault(path)
        if fault is None:
            return path
        print(f"warning: checkpoint {path} is not usable ({fault}); trying the one before it", file=sys.stderr)
    if sealed:
        raise NoCheckpointError(
            f"no usable checkpoint in {stage_dir}, although some were written. Restore one from a copy, or start over "
            "on purpose: under another --output_dir, or with that directory removed"
        )
    return None


def _fault(path: Path) -> str | None:
    try:
        for name, digest in json.loads((path / MANIFEST).read_text()).items():
            if _sha256(path / name) != digest:
                return f"{name} does not match its SHA-256 in {MANIFEST}"
    except (OSError, ValueError) as error:
        return str(error)
    return None


def _sha256(path: Path) -> str:
    # Mapped, not read: a checkpoint may be larger than memory. (An empty file cannot be mapped.)
    return hashlib.sha256(np.memmap(path, mode="r") if path.stat().st_size else b"").hexdigest()
