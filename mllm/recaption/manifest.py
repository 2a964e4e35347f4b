"""What a folder of recaptioned shards says of itself: how its captions were made, and what each shard came to.

OUT/NAME.tar               a shard, under its name only when whole
OUT/manifests/NAME.json    what it was made of, how, and what came of it; written last: with it the shard is done
OUT/rejected/NAME.jsonl    pairs that are not in it, with the reason and the caption that was refused
OUT/recaption.json         how captions are made here, which nobody may change
OUT/claims, OUT/work       of shards that are under way; OUT/speed: what each process has done in which time
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clips.common.errors import UserError
from clips.common.files import fsync, placing, read_json
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
    def claims(self) -> Path:
        return self.root / "claims"

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

    def manifests(self) -> set[str]:
        """Names of the shards that have one."""
        place = self.root / "manifests"
        return {name.removesuffix(".json") for name in os.listdir(place)} if place.is_dir() else set()

    def rejected(self, name: str) -> Path:
        return self.root / "rejected" / f"{name}.jsonl"

    def work(self, name: str) -> Path:
        return self.root / "work" / name


def agree(folder: Folder, settings: Mapping[str, Any]) -> None:
    """Make `settings` those of the folder, or compare them with what is there; UserError with the difference.

    Of several processes that come at once the first writes them, and the others compare.
    """
    wanted = {"format": FORMAT, **settings}
    folder.root.mkdir(parents=True, exist_ok=True)
    if not folder.settings.is_file():
        if any(folder.root.glob("*.tar")):
            raise UserError(f"{folder.root} holds shards that no recaptioning wrote: name another folder with --out")
        with placing(folder.settings, replace=False) as file:
            file.write((json.dumps(wanted, indent=2) + "\n").encode())
    _refuse(folder, read_json(folder.settings), wanted)


def agree_so_far(folder: Folder, settings: Mapping[str, Any], kind: str) -> None:
    """As `agree`, by what is known before the captioner is loaded: its kind alone."""
    there = read_json(folder.settings)
    if there:
        _refuse(
            folder, there | {"captioner": there["captioner"]["kind"]}, {"format": FORMAT, **settings, "captioner": kind}
        )


def _refuse(folder: Folder, there: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    refuse(
        difference(there, wanted),
        f"{folder.root} holds captions that were made otherwise (there → now)",
        "Name another folder with --out, or give the command as it was",
    )


def done_manifest(folder: Folder, shard: Shard) -> dict[str, Any] | None:
    """What the shard came to; None where it is not done. UserError where its data had another number of samples."""
    found = read_json(folder.manifest(shard.name))
    if not found:
        return None
    try:
        if os.path.getsize(folder.shard(shard.name)) != found["output"]["bytes"]:
            return None  # cut, or of an owner that lost its claim: it is written again
    except FileNotFoundError:
        return None
    if found["input"]["samples"] != len(shard):
        raise UserError(
            f"{shard.url} has {len(shard):,} pairs, and {folder.manifest(shard.name)} was made when it had "
            f"{found['input']['samples']:,}: remove that file to have its captions written anew"
        )
    return found


def publish(folder: Folder, name: str, written: Path, rejected: Iterator[Mapping[str, Any]], manifest: Any) -> None:
    """Put a whole shard under its name, then what was rejected, then the manifest, with which it counts."""
    for path in (folder.rejected(name), folder.manifest(name)):
        path.parent.mkdir(parents=True, exist_ok=True)
    os.replace(written, folder.shard(name))
    fsync(folder.root)
    with placing(folder.rejected(name)) as file:
        for record in rejected:
            file.write(json.dumps(record).encode() + b"\n")
    with placing(folder.manifest(name)) as file:
        file.write((json.dumps(manifest, indent=2) + "\n").encode())
