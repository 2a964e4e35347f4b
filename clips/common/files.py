"""Files that a crash cannot leave half written: atomic replacement, locks, sealed and built directories; JSON files."""

import errno
import fcntl
import hashlib
import json
import logging
import operator
import os
import shutil
import stat
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO, TypeVar

from clips.common.errors import UserError, reason

T = TypeVar("T")
log = logging.getLogger("clips.files")
REPORTED, LONGEST_WAIT = 5.0, 6 * 3600.0
"""Seconds of waiting for a lock after which a line says so, and after which the wait ends with an error."""
MANIFEST = "MANIFEST.json"
STAMP = "manifest.json"
"""Name of the file, in lower case, in which `ensure_built` records the settings that a folder was built with."""


def seal(directory: Path) -> None:
    """Write MANIFEST.json with the SHA-256 of every file in `directory`; a checkpoint without it is never used."""
    files = [path for path in sorted(directory.rglob("*")) if path.is_file() and path.name != MANIFEST]
    digests = {str(path.relative_to(directory)): sha256(path) for path in files}
    write_json(directory / MANIFEST, digests)


def check_seal(directory: Path, required: Iterable[str] = ()) -> Path:
    """Return `directory` if its files have the SHA-256s that its MANIFEST.json lists, else raise ValueError.

    The `required` files must be among them.
    """
    try:
        digests = from_json(read_bytes(directory / MANIFEST))
        for name in dict.fromkeys([*required, *digests]):
            if digests.get(name) != sha256(directory / name):
                raise ValueError(f"{name} does not match its SHA-256 in {MANIFEST}")
    except OSError as error:
        raise ValueError(f"{Path(error.filename or directory).name}: {error.strerror}") from None
    except (AttributeError, TypeError) as error:
        raise ValueError(f"{MANIFEST} was not written by this program: {error}") from None
    return directory


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` by `text`; a reader sees, and a crash leaves, the old text or the new one, never a part."""
    with placing(path) as file:
        file.write(text.encode())


@contextmanager
def placing(path: Path) -> Iterator[BinaryIO]:
    """Yield an open file. If the block ends without an error, the file is synced and renamed to `path`.

    The file has a unique name until then (`file.name`, for writers that take a path), so several processes may write
    `path` at once, and the last one wins.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing(directory: Path) -> Iterator[Path]:
    """Yield an empty directory. If the block ends without an error, this directory replaces `directory`.

    Otherwise it is removed, and `directory` stays as it is. It is called NAME.partial and lies beside `directory`.
    Leftovers of that name are removed first, so two processes must not replace the same directory at once.
    """
    partial = directory.with_name(f"{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for weights in partial.rglob("*.safetensors"):
            usual_mode(weights)
        shutil.rmtree(directory, ignore_errors=True)
        partial.rename(directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_once(directory: Path, write: Callable[[Path], None]) -> Path:
    """Return `directory`. If it is missing, `write(empty directory)` fills it, once for all processes."""
    if not directory.is_dir():
        directory.parent.mkdir(parents=True, exist_ok=True)
        with lock(directory.parent / f".{directory.name}.lock", wait=True):
            if not directory.is_dir():  # the process that held the lock may have written it
                with replacing(directory) as partial:
                    write(partial)
    return directory


def differing(
    left: Any, right: Any, same: Callable[[Any, Any], bool] = operator.eq, path: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Yield (path, left value, right value) wherever two JSON values differ; a missing field is None."""
    if isinstance(left, dict) and isinstance(right, dict):
        for key in sorted(left.keys() | right.keys()):
            yield from differing(left.get(key), right.get(key), same, f"{path}.{key}" if path else key)
    elif isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
        for i, pair in enumerate(zip(left, right, strict=True)):
            yield from differing(*pair, same, f"{path}.{i}" if path else str(i))
    elif not same(left, right):
        yield path, left, right


def write_json(path: Path, content: Any) -> None:
    """Replace `path` by `content` as JSON, atomically."""
    write_atomically(path, json.dumps(content, indent=2) + "\n")


MOST_JSON = 2**28
"""Largest JSON file that is read, in bytes."""


def from_json(text: str | bytes) -> Any:
    """Return the value of a JSON text. Raises ValueError if it is not JSON, or nested too deep."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def read_bytes(path: str | Path, most: int = MOST_JSON) -> bytes:
    """Return the content of a file. Raises OSError for a pipe, and ValueError for a file of more than `most` bytes."""
    data = read_regular(path, most + 1)
    if len(data) > most:
        raise ValueError(f"it has more than {most:,} bytes")
    return data


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`, or {} if the file is missing. Raises UserError for any other content."""
    try:
        content = from_json(read_bytes(path)) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged, it is not JSON ({error}): restore it, or remove it") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged, it holds no JSON object: restore it, or remove it")
    return content


def read_json_records(path: Path) -> list[Any]:
    """Return the records in a LLaVA .json or .jsonl file, unchecked.

    Raises UserError if the file cannot be read, is not JSON, or does not hold a list of at least one record.
    """
    path = Path(path)
    try:
        text = read_regular(path, -1).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data file {path} cannot be read: {reason(error)}; give a LLaVA JSON or JSONL file") from None
    place = str(path)
    try:
        if path.suffix == ".jsonl":
            records = []
            for number, line in enumerate(text.split("\n"), 1):
                place = f"{path} line {number}"
                if line.strip():
                    records.append(from_json(line))
        else:
            records = from_json(text)
    except ValueError as error:
        raise UserError(f"{place} is not JSON: {error}; one record a line is a .jsonl") from None
    if not isinstance(records, list) or not records:
        raise UserError(f"{path} must hold a list of records that is not empty")
    return records


def read_regular(path: str | Path, most: int) -> bytes:
    """Return the first `most` bytes of a file, or all of them for −1. Raises OSError like `open_regular`."""
    with open_regular(path) as file:
        return file.read(most)


def open_regular(path: str | Path) -> BinaryIO:
    """Open a file of unknown origin for reading. Raises OSError also for a pipe, which could block forever."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # opening a pipe would wait already
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return open(descriptor, "rb")


def check_target(directory: Path) -> None:
    """Raise UserError if nothing can be written at `directory` (it need not exist). Call it before any work."""
    try:
        place = next(path for path in (directory, *directory.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise UserError(f"nothing can be written to {directory}: {error.strerror}; name another folder") from None


def usual_mode(path: Path) -> None:
    """Give a file the mode of any other new file, because safetensors makes files that only their owner may read."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def lock(path: Path, *, wait: bool) -> IO[str]:
    """Hold the lock file `path` until the returned file is closed, at the latest until this process ends.

    A kill leaves no lock behind. If another process holds the lock, `wait` waits for it and says so after some seconds.
    Raises BlockingIOError if `wait` is off, and TimeoutError after LONGEST_WAIT.
    """
    file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - held until the caller closes it
    begin, is_reported = time.monotonic(), False
    try:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return file
            except BlockingIOError:
                waited = time.monotonic() - begin
                if not wait:
                    raise
                if waited > LONGEST_WAIT:
                    raise TimeoutError(errno.ETIMEDOUT, f"another process holds it for {waited:,.0f} s", path) from None
            if waited > REPORTED and not is_reported:
                is_reported = True
                log.warning("waiting for another process that holds %s", path)
            time.sleep(0.05)
    except BaseException:
        file.close()
        raise


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as hex. Raises OSError like `open_regular`."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fsync(path: Path) -> None:
    """Write a file's content, or a directory's names, through to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def ensure_built(
    directory: Path, settings: Mapping[str, Any], write: Callable[[Path], Mapping[str, Any]], *, what: str
) -> Path:
    """Build `directory` with `write(temporary folder)` unless it was built with the same `settings`, and return it.

    `settings` is JSON on which the content depends, with a version. It is recorded in the directory, together with what
    `write` returns. An older build is replaced. If several processes ask at once, one builds while the others wait.
    Raises UserError if the directory holds anything else than a build of `what`, or cannot be written.
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
    """Return the `settings` that `directory` was built with, or None if `ensure_built` did not build it."""
    try:
        stamp = from_json(read_bytes(directory / STAMP))
        built = stamp["built"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return built if isinstance(built, dict) and "version" in built else None
