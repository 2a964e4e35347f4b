"""Which of the Trainer's checkpoints are whole: each is sealed (clips/common/files.py) after it was written."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from clips.common.errors import NoCheckpointError
from clips.common.files import MANIFEST, check_seal, first_usable


def newest(stage_dir: Path) -> Path | None:
    """The newest sealed checkpoint whose files match their hashes; None where none was ever sealed.

    A damaged one is named in a warning and the one before it is used; one that was never finished is passed over.
    Raises NoCheckpointError when there are sealed ones and none is good: never a silent restart from zero.
    """
    sealed = [path for path in _newest_first(stage_dir) if (path / MANIFEST).is_file()]
    good = first_usable(sealed, check_seal)
    if sealed and good is None:
        raise NoCheckpointError(
            f"no usable checkpoint in {stage_dir}, although some were written. Restore one from a copy, or start over "
            "on purpose: under another --output_dir, or with that directory removed"
        )
    return good


def prune(stage_dir: Path, keep: int) -> None:
    """Remove all checkpoints that are older than the `keep` newest sealed ones."""
    found = _newest_first(stage_dir)
    sealed = [path for path in found if (path / MANIFEST).is_file()][:keep]
    for path in found[found.index(sealed[-1]) + 1 :] if len(sealed) == keep else []:
        shutil.rmtree(path)


def _newest_first(stage_dir: Path) -> list[Path]:
    found = [path for path in stage_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: -int(path.name.partition("-")[2]))
