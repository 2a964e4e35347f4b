"""A stand-in for what was fetched from the Hugging Face hub: models in its own cache, as a download leaves them."""

from __future__ import annotations

import shutil
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cache_model(cache: Path, hub_id: str, directory: Path) -> None:
    """Put the files of `directory` into the hub's cache as the newest version of `hub_id`."""
    place = cache / f"models--{hub_id.replace('/', '--')}"
    snapshot = place / "snapshots" / COMMIT
    for number, file in enumerate(path for path in sorted(directory.rglob("*")) if path.is_file()):
        blob, link = place / "blobs" / f"{number:040x}", snapshot / file.relative_to(directory)
        for path in (blob, link):
            path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, blob)
        link.symlink_to(blob)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(COMMIT)
