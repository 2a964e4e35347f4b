"""The checkpoints in a run directory of either half: list, verify and prune them."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from clips.common import rundir
from clips.common.errors import CommandError, UserError
from clips.common.escape import for_terminal
from clips.common.files import MANIFEST, check_seal
from clips.common.page import print_table

LLAVA = re.compile(r"checkpoint-\d+")


@dataclass(frozen=True)
class Group:
    """Consecutive checkpoints: of a pretraining run, of one stage of a LLaVA run, or put aside together."""

    directory: Path
    found: list[Path]
    """Newest first, at least one."""
    counts: bool
    """Whether a run goes on from the newest; False if a rewind has put them aside."""

    @property
    def is_llava(self) -> bool:
        return LLAVA.fullmatch(self.found[0].name) is not None


def groups(place: Path) -> list[Group]:
    """The checkpoints of a run directory, or one checkpoint. Raises UserError if there is none."""
    if (place / MANIFEST).is_file():
        return [Group(place.parent, [place], counts=False)]
    aside = sorted((place / "checkpoints").glob("aside-*"))
    stages = sorted({path.parent for path in place.glob("*/checkpoint-*") if LLAVA.fullmatch(path.name)})
    candidates = [
        Group(place / "checkpoints", rundir.checkpoints(place), counts=True),
        *(Group(folder, _newest_first(folder.glob("step-*")), counts=False) for folder in aside),
        *(Group(stage, _newest_first(stage.glob("checkpoint-*")), counts=True) for stage in stages),
    ]
    if not (kept := [group for group in candidates if group.found]):
        raise UserError(f"{place} holds no checkpoints: give a run directory, runs/NAME, or one of its checkpoints")
    return kept


def _newest_first(paths: Iterable[Path]) -> list[Path]:
    numbered = [path for path in paths if re.fullmatch(r"[a-z]+-\d+", path.name)]
    return sorted(numbered, key=lambda path: int(path.name.partition("-")[2]), reverse=True)


def fault_of(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint by its hashes, or None."""
    try:
        check_seal(checkpoint)
    except ValueError as fault:
        return str(fault)
    return None


def list_saved(place: Path, *, verify: bool = False) -> None:
    """Print a table of the checkpoints; `verify` hashes every file and raises CommandError if one is damaged."""
    damaged, rows = [], []
    for group in groups(place):
        for path in group.found:
            fault = fault_of(path) if verify else None if (path / MANIFEST).is_file() else f"no {MANIFEST}"
            damaged += [f"{path}: {fault}"] if fault else []
            samples = None if group.is_llava else rundir.weights_of(path)["samples"]
            size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            rows.append(
                (
                    str(path.relative_to(place)) if path != place else path.name,
                    f"{int(path.name.partition('-')[2]):,}",
                    "" if samples is None else f"{samples:,}",
                    f"{size / 1e6:,.1f}",
                    _age(time.time() - path.stat().st_mtime),
                    fault or "yes",
                    _note(group, path),
                )
            )
    head = ("checkpoint", "step", "samples", "MB", "age", "verified" if verify else "sealed", "")
    print_table(str(place), head, rows)
    if verify and damaged:
        raise CommandError("damaged, and passed over when the run goes on:\n  " + "\n  ".join(damaged))


def _note(group: Group, path: Path) -> str:
    if not group.counts:
        return "put aside" if group.directory.name.startswith("aside-") else ""
    return "latest" if path == group.found[0] else ""


def _age(seconds: float) -> str:
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def prune_saved(place: Path, keep: int, keep_every: int, *, dry_run: bool) -> None:
    """Delete the `surplus` checkpoints; those that were put aside stay.

    Raises UserError if the run is training, and CommandError if no checkpoint that would stay is whole.
    """
    if keep < 1 or keep_every < 0:
        raise UserError(
            f"--keep {keep} --keep-every {keep_every}: at least one checkpoint stays, and no multiple is negative"
        )
    if (place / MANIFEST).is_file():
        raise UserError(f"{place} is one checkpoint: give the run directory that it is in")
    counted = [group for group in groups(place) if group.counts]
    if keep_every and any(group.is_llava for group in counted):
        raise UserError(f"--keep-every: the checkpoints of {place} do not tell their samples; give --keep")
    if not dry_run:
        rundir.hold(place)
    for group in counted:
        sealed = [path for path in group.found if (path / MANIFEST).is_file()]
        goes = rundir.surplus(sealed, keep, keep_every)
        if goes and not any(fault_of(path) is None for path in sealed if path not in goes):
            raise CommandError(
                f"none of the checkpoints that would stay in {group.directory} is whole; nothing is deleted"
            )
        for path in reversed(goes):  # oldest first, so that a crash leaves the newer ones
            if not dry_run:
                shutil.rmtree(path)
            print(for_terminal(f"{'would delete' if dry_run else 'deleted'} {path}"), flush=True)
