"""Paths of scripts and cached results, an id of this machine, and checks that an outside path stays below a root."""

import itertools
import os
import re
from pathlib import Path, PurePosixPath

CACHE_VARIABLE = "CLIPS_MLLM_CACHE"
REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPTS = REPOSITORY / "scripts"
"""Folder of the scripts; comparisons start them as processes."""
DS_CONFIGS = REPOSITORY / "ds_configs"


def cache_root() -> Path:
    """Return the folder of cached results: indexes of read-only data, features, converted models. It may be deleted.

    It is `$CLIPS_MLLM_CACHE` if that is set, otherwise `$XDG_CACHE_HOME/clips-mllm` or `~/.cache/clips-mllm`.
    """
    if folder := os.environ.get(CACHE_VARIABLE):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clips-mllm"


def this_machine() -> str | None:
    """Return an id shared by exactly the processes of one PID namespace, or None if the system exposes none.

    It changes with a restart. Host names cannot serve: rented machines and containers often have the same one.
    """
    boot, numbers = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    if not boot.exists() or not numbers.exists():
        return None
    # Each container of a machine numbers its processes anew.
    return f"{boot.read_text(encoding='utf-8').strip()} {os.readlink(numbers)}"


def unused(path: Path) -> Path:
    """Return `path`, or the first of path-2, path-3, … that does not exist."""
    others = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
    return next(candidate for candidate in itertools.chain([path], others) if not candidate.exists())


def is_remote(url: str) -> bool:
    """Return True for a URL such as s3://bucket/x.tar, False for a local path."""
    return "://" in url


_URL = re.compile(r"(\w://)(?:[^\s/@?#]*@)?([^\s?#'\"]*)(?:\?[^\s#'\"()]*=[^\s#'\"()]*)?")


def without_secrets(text: str) -> str:
    """Return `text` with its URLs as a message may show them: without user, password, and the query with signatures."""
    return _URL.sub(r"\1\2", text) if is_remote(text) else text


def can_encode(name: str) -> bool:
    """Return True if `name` can be encoded as the name of a file.

    A lone surrogate cannot, except for U+DC80 to U+DCFF: they stand for single bytes of a name that is not UTF-8.
    """
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return True


def is_plain(name: str) -> bool:
    """Return True if `name` is a relative path that only goes down."""
    return not name.startswith("/") and ".." not in PurePosixPath(name).parts and "\0" not in name


def inside(root: str | Path, name: str) -> str:
    """Return the path of `name` below the folder `root`. Raises ValueError if it leads out of the folder.

    An absolute `name` is allowed if it is below `root`. A link inside the folder is inside, wherever it points, as in
    the folders of the Hugging Face cache, DVC and git-annex.
    """
    if "\0" not in name and not is_remote(name):
        top = os.path.abspath(root)
        path = os.path.normpath(os.path.join(top, name))
        if Path(path).is_relative_to(top):
            return path
    raise ValueError(f"{name!r} is outside {str(root)!r}")
