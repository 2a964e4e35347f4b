"""A folder of generated data, built once: under a lock, stamped, and renamed into place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from clips.common.errors import UserError
from clips.common.files import from_json, lock, read_bytes, replacing, write_json

STAMP = "manifest.json"


def ensure_built(
    directory: Path, settings: Mapping[str, Any], write: Callable[[Path], Mapping[str, Any]], *, what: str
) -> Path:
    """Build `directory` by `write(temporary folder)` unless it is stamped with `settings`; returns `directory`.

    `settings` is JSON that decides the content, with a version; facts that `write` returns are stamped beside it.
    An older build is replaced. Of several processes one builds while the others wait. Raises UserError if the folder
    holds something else than `what`, or cannot be written.
    """
    if built_as(directory) == settings:
        return directory
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with lock(directory.parent / f".{directory.name}.lock", wait=True):
            built = built_as(directory)
            if built == settings:  # by the process that held the lock
                return directory
            # The same entries in the stamp mean an older build of the same kind.
            is_other = directory.exists() and any(directory.iterdir()) and (built or {}).keys() != settings.keys()
            if is_other:
                raise UserError(f"{directory} exists and holds no {what}: name another folder")
            with replacing(directory) as work:
                facts = write(work)
                write_json(work / STAMP, {"built": settings, **facts})
    except OSError as error:
        raise UserError(f"the {what} cannot be written to {directory}: {error}") from None
    return directory


def built_as(directory: Path) -> dict[str, Any] | None:
    """The `settings` that `directory` was built with; None if it was not built here."""
    try:
        stamp = from_json(read_bytes(directory / STAMP))
        built = stamp["built"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return built if isinstance(built, dict) and "version" in built else None
