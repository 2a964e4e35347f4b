"""Which of the Trainer's checkpoints are whole: each is sealed (clips/checkpoint.py) after it was written."""

from __future__ import annotations

import re
from pathlib import Path

from clips.checkpoint import MANIFEST, check_seal, first_usable
from clips.errors import NoCheckpointError


def newest(stage_dir: Path) -> Path | None:
    """The newest sealed checkpoint whose files match their hashes; None where none was ever sealed.

    A damaged one is named in a warning and the one before it is used; one that was never finished is passed over.
    Raises NoCheckpointError when there are sealed ones and none is good: never a silent restart from zero.
    """
    found = [path for path in stage_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    sealed = [path for path in found if (path / MANIFEST).is_file()]
    good = first_usable(sorted(sealed, key=lambda path: -int(path.name.partition("-")[2])), check_seal)
    if sealed and good is None:
        raise NoCheckpointError(
            f"no usable checkpoint in {stage_dir}, although some were written. Restore one from a copy, or start over "
            "on purpose: under another --output_dir, or with that directory removed"
        )
    return good
