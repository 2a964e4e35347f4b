"""Files derived from a data file on first use (tar indexes, Arrow copies), and opening data by path or URL."""

import hashlib
import os
import re
import threading
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, cast

from clips.common.errors import UserError
from clips.common.files import open_regular, placing
from clips.common.paths import cache_root, is_remote
from clips.data.remote import RemoteFile, stamp

SAMPLE_BYTES = 1 << 18
"""Bytes of one request to a remote file if single samples are read; most are smaller."""
LONGEST_NAME = 120
"""Bytes of a file's name that its derived files repeat; file systems take 255."""
SCAN_BYTES = 1 << 22
"""Bytes of one request if the full file is read."""

_STAMPED = re.compile(r"(\..+)\.[0-9a-f]{12}(\.idx\.\w+)", re.DOTALL)
_listing = threading.Lock()


def open_binary(url: str, buffer: int = SCAN_BYTES) -> BinaryIO:
    """Open a local path or an fsspec URL for reading. Raises UserError if that fails.

    A remote file is read in requests of `buffer` bytes.
    """
    try:
        return cast(BinaryIO, RemoteFile(url, buffer)) if is_remote(url) else open_regular(url)
    except (OSError, ImportError, ValueError) as error:
        raise UserError(f"{url} cannot be read: {error}") from None


def sidecar(url: str, suffix: str, build: Callable[[Path], None]) -> Path:
    """Return the path of the file that is derived from `url`; `build(temporary path)` makes it if there is none yet.

    A file that was made for another size or modification time of `url` does not count, and a new one replaces it. The
    file is next to a local file, or in `cache_root()` for a URL or a read-only folder. Several processes may ask at
    once. Raises UserError if `url` cannot be read, if `build` raises an OSError, or if neither place can be written.
    """
    name = Path(url).name
    state = stamp(url)
    in_cache = cache_root() / hashlib.sha256(os.fsencode(os.path.abspath(url))).hexdigest()[:24]
    if len(os.fsencode(name)) > LONGEST_NAME:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    folders = [in_cache] if is_remote(url) else [Path(url).parent, in_cache]
    paths = [folder / f".{name}.{state}{suffix}" for folder in folders]
    for path in paths:
        if path.is_file():
            return path
    refusals = []
    for path in paths:
        begun = False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with placing(path) as file:
                begun = True
                build(Path(file.name))
        except OSError as error:
            if begun:
                raise UserError(f"the index of {url} cannot be made: {error}") from None
            refusals.append(str(error))
            continue
        for stale in _replaced(path, f".{name}{suffix}"):
            stale.unlink(missing_ok=True)
        return path
    raise UserError(f"the index of {url} cannot be written ({'; '.join(refusals)}); set CLIPS_MLLM_CACHE to a folder")


def made_for(path: Path, suffix: str) -> str:
    """Return the stamp (`clips.data.remote.stamp`) of the data file for which the sidecar `path` was built.

    `suffix` is the suffix with which `sidecar` made it.
    """
    return path.name.removesuffix(suffix).rpartition(".")[2]


def _replaced(path: Path, family: str) -> list[Path]:
    """Return the older files of the same family as the new file `path`, with other stamps."""
    with _listing:
        stamped = _derived(path.parent).setdefault(family, set())
        older = [path.with_name(name) for name in stamped if name != path.name]
        stamped.clear()
        stamped.add(path.name)
    return older


@lru_cache(16)
def _derived(folder: Path) -> dict[str, set[str]]:
    """Return the derived files of a folder by family. Cached: listing a large folder for each shard took hours."""
    by_source: dict[str, set[str]] = {}
    for name in os.listdir(folder):
        if stamped := _STAMPED.fullmatch(name):
            by_source.setdefault(stamped[1] + stamped[2], set()).add(name)
    return by_source
