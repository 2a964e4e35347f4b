"""The output folder: its paths, the settings that all its captions share, and each shard's manifest.

OUT/NAME.tar               a shard; it has this name only when it is whole
OUT/manifests/NAME.json    input, captioner, settings and counts of a shard; written last, and with it the shard is done
OUT/rejected/NAME.jsonl    the pairs that are not in the shard, with the reason and the refused caption
OUT/recaption.json         captioner and settings of the folder; nobody may change them
OUT/locks, OUT/work        locks and journals of shards under way
OUT/speed                  a file for each process: its captions and their time
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from clips.common.errors import UserError
from clips.common.files import fsync, lock, placing, read_json, write_json
from clips.common.rundir import difference, refuse
from mllm.recaption.shards import Shard

FORMAT = 1


@dataclass(frozen=True)
class Folder:
    """The paths of an output folder."""

    root: Path

    @property
    def settings(self) -> Path:
        return self.root / "recaption.json"

    @property
    def locks(self) -> Path:
        return self.root / "locks"

    @property
    def speed(self) -> Path:
        return self.root / "speed"

    @property
    def report(self) -> Path:
        return self.root / "report" / "index.html"

    def shard(self, name: str) -> Path:
        return self.root / f"{name}.tar"

    def manifest(self, name: str) -> Path:
        return self.root / "manifests" / f"{name}.json"

    def rejected(self, name: str) -> Path:
        return self.root / "rejected" / f"{name}.jsonl"

    def work(self, name: str) -> Path:
        return self.root / "work" / name

    def lock(self, name: str) -> IO[str] | None:
        """The lock of a shard, held until the file is closed; None if another process holds the lock.

        The system frees the lock of a process that dies. Raises UserError if the file system has no locks.
        """
        self.locks.mkdir(parents=True, exist_ok=True)
        try:
            return lock(self.locks / name, wait=False)
        except (BlockingIOError, FileNotFoundError):  # another process holds it, or found all shards done
            return None
        except OSError as error:
            raise UserError(
                f"{self.locks}: {error.strerror}. Recaptioning locks each shard: name a folder on a file system with "
                "locks with --output (Lustre: mount it with -o flock)"
            ) from None


def agree(folder: Folder, settings: Mapping[str, Any]) -> None:
    """Store `settings` in a new folder; compare them with the settings of an old one.

    Raises UserError with the difference. If several processes come at once, the first one writes the settings.
    """
    folder.root.mkdir(parents=True, exist_ok=True)
    if not folder.settings.is_file():
        if any(folder.root.glob("*.tar")):
            raise UserError(f"{folder.root} holds shards that no recaptioning wrote: name another folder with --output")
        with placing(folder.settings, replace=False) as file:
            file.write((json.dumps({"format": FORMAT, **settings}, indent=2) + "\n").encode())
    _refuse(folder, read_json(folder.settings), settings)


def agree_so_far(folder: Folder, settings: Mapping[str, Any], kind: str) -> None:
    """Compare as `agree` does, before the captioner is loaded: of the captioner only its kind is compared."""
    there = read_json(folder.settings)
    if there:
        captioner = there.get("captioner")
        found = captioner.get("kind") if isinstance(captioner, dict) else captioner
        _refuse(folder, there | {"captioner": found}, {**settings, "captioner": kind})


def _refuse(folder: Folder, there: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    refuse(
        difference(there, {"format": FORMAT, **wanted}),
        f"{folder.root} holds captions that were made otherwise (there → now)",
        "Name another folder with --output, or give the command as it was",
    )


def done_manifest(folder: Folder, shard: Shard) -> dict[str, Any] | None:
    """The manifest of a finished shard; None if the shard is not done, or if its file has another size.

    Raises UserError if the shard's data had another number of samples.
    """
    found = read_json(folder.manifest(shard.name))
    if not found:
        return None
    if not _is_manifest(found):
        raise UserError(f"{folder.manifest(shard.name)} is no manifest: remove it, and its shard is captioned again")
    try:
        if os.path.getsize(folder.shard(shard.name)) != found["output"]["bytes"]:
            return None  # a copy that was cut: the shard is written again
    except FileNotFoundError:
        return None
    if found["input"]["samples"] != len(shard):
        raise UserError(
            f"{shard.url} has {len(shard):,} pairs, and {folder.manifest(shard.name)} was made when it had "
            f"{found['input']['samples']:,}: remove that file to have its captions written anew"
        )
    return found


def _is_manifest(found: Mapping[str, Any]) -> bool:
    """Whether the numbers of a manifest that are read again are numbers."""
    try:
        parts = (found["counts"], found["first_attempts_refused"], found["rejected"], *found["words"].values())
        sizes = (found["output"]["bytes"], found["output"]["samples"], found["input"]["samples"])
        numbers = [*sizes, *(number for part in parts for number in part.values())]
        keys = {"pairs", "left_out", "written", "tokens", "trimmed", "mended", "web words", "long words"}
        return (
            all(type(number) is int for number in numbers) and keys <= found["counts"].keys() and "captioner" in found
        )
    except (KeyError, TypeError, AttributeError):
        return False


def unfinished(folder: Folder, shards: Sequence[Shard]) -> list[Shard]:
    return [shard for shard in shards if done_manifest(folder, shard) is None]


def publish(folder: Folder, name: str, written: Path, rejected: Iterator[Mapping[str, Any]], manifest: Any) -> None:
    """Rename a whole shard into place, then write its rejected pairs, then its manifest."""
    for path in (folder.rejected(name), folder.manifest(name)):
        path.parent.mkdir(parents=True, exist_ok=True)
    os.replace(written, folder.shard(name))
    fsync(folder.root)
    with placing(folder.rejected(name)) as file:
        for record in rejected:
            file.write(json.dumps(record).encode() + b"\n")
    write_json(folder.manifest(name), manifest)
