"""Files derived from a data file on first use (tar indexes, Arrow copies), and opening data by path or URL."""

from __future__ import annotations

import hashlib
import io
import os
import re
import threading
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, cast

from clips.common.errors import UserError
from clips.common.files import placing
from clips.common.paths import cache_root, is_remote
from clips.data.remote import RemoteFile, remote_facts

VERSION = 2
"""Part of every sidecar's name: raise it when what is written changes."""
SAMPLE_BYTES = 1 << 18
"""Asked of a remote file at once where single samples are read: most are smaller."""
SCAN_BYTES = 1 << 22
"""… and where all of it is gone through."""

_STAMPED = re.compile(r"(\..+)\.[0-9a-f]{12}(\.idx\.\w+)", re.DOTALL)
_listing = threading.Lock()


def open_binary(url: str, buffer: int = SCAN_BYTES) -> BinaryIO:
    """Open a local path or an fsspec URL for reading; an unreadable one raises UserError.

    Of a remote file `buffer` bytes are asked for at once; while it is read, errors are those of `read_range`.
    """
    try:
        return cast(BinaryIO, io.BufferedReader(RemoteFile(url), buffer)) if is_remote(url) else open(url, "rb")
    except (OSError, ImportError, ValueError) as error:
        raise UserError(f"{url} cannot be read: {error}") from None


def sidecar(url: str, suffix: str, build: Callable[[Path], None]) -> Path:
    """The path of `url`'s derived file, built by `build(temporary path)` if there is none for its size and time.

    It stands beside a local file, else (read-only folder, URL) in `cache_root()`. Writing is atomic, so several
    processes may ask at once. Raises UserError when neither place can be written.
    """
    name = Path(url).name
    state = stamp(url)
    in_cache = cache_root() / hashlib.sha256(os.path.abspath(url).encode()).hexdigest()[:24]
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


def stamp(url: str, *, fresh: bool = False) -> str:
    """Names the present state of the file behind `url` in the names of what is made of it; `fresh` as remote_facts."""
    return stamp_of(fingerprint(url, fresh=fresh))


def stamp_of(facts: str) -> str:
    """The stamp of a file whose fingerprint is `facts`."""
    return hashlib.sha256(f"{VERSION}\n{facts}".encode()).hexdigest()[:12]


def check_state(url: str, state: str) -> None:
    """UserError where the file is not in the state of which an index was made: its members are elsewhere now."""
    if stamp(url, fresh=True) != state:
        raise UserError(f"{url} has changed since this run opened it: start the command again, and it is indexed anew")


def made_for(path: Path, suffix: str) -> str:
    """The stamp in a sidecar's own name: of which state of its file it was made."""
    return path.name.removesuffix(suffix).rpartition(".")[2]


def _replaced(path: Path, family: str) -> list[Path]:
    """The files that stood in the place of `path`, which is new: of the same family, with another stamp."""
    with _listing:
        stamped = _derived(path.parent).setdefault(family, set())
        older = [path.with_name(name) for name in stamped if name != path.name]
        stamped.clear()
        stamped.add(path.name)
    return older


@lru_cache(16)
def _derived(folder: Path) -> dict[str, set[str]]:
    """The derived files of a folder by family, kept: to list a folder of many shards for each of them took hours."""
    found: dict[str, set[str]] = {}
    for name in os.listdir(folder):
        if stamped := _STAMPED.fullmatch(name):
            found.setdefault(stamped[1] + stamped[2], set()).add(name)
    return found


def fingerprint(url: str, *, fresh: bool = False) -> str:
    """Changes when the file behind `url` does: its size with its time, or a store's tag."""
    try:
        if is_remote(url):
            return remote_facts(url, fresh=fresh)[1]
        status = os.stat(url)
    except (OSError, ImportError, ValueError) as error:
        raise UserError(f"{url} cannot be read: {error}") from None
    return f"{status.st_size} {status.st_mtime_ns}"
