"""A run's checkpoints, written whole or not at all, hashed, and never silently started over. Only this file writes one.

`checkpoints/step-N/` holds `model.safetensors`, `optimizer.safetensors`, `state.json` and `MANIFEST.json`
with the SHA-256 of each. It is written under a hidden temporary name, flushed to disk and renamed, and then
`LATEST` is replaced: a crash at any moment leaves the older checkpoints and a directory that is ignored.
Nothing in a checkpoint is code, and tensors are stored whole and by name, so a run may resume on another
number of ranks or another ZeRO stage.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from clips.common.errors import NoCheckpointError, UserError
from clips.common.files import check_seal, first_usable, fsync, seal, write_atomically
from clips.common.tensors import read_weights


@dataclass
class TrainState:
    """Where a run stands; everything else follows from the configuration and (seed, epoch, position)."""

    seed: int
    step: int = 0
    """Optimizer steps done, over all phases."""
    samples: int = 0
    """Samples seen, over all phases."""
    phase: int = 0
    phase_step: int = 0
    began_with: str | None = None
    """SHA-256 of the weights that the run began with (`train.init_from`)."""
    skipped: int = 0
    """Broken samples that were replaced."""
    best: float | None = None
    """Best validation text→image R@1 so far."""
    logit_scale: list[tuple[int, float]] = field(default_factory=list)
    """(samples, logit scale) at each logged step."""
    recent_losses: list[float] = field(default_factory=list)
    """Of the last steps of this phase that were taken: what a spike is measured by (clips/training/watchdog.py)."""
    recent_norms: list[float] = field(default_factory=list)
    """Their gradient norms."""
    left_out: list[int] = field(default_factory=list)
    """Steps (0-based, over all phases) whose samples were passed over without an update."""


@dataclass
class Checkpoint:
    path: Path
    state: TrainState

    def weights(self) -> dict[str, Tensor]:
        return read_weights(self.path / "model.safetensors")

    def optimizer(self) -> dict[str, Tensor]:
        return read_weights(self.path / "optimizer.safetensors")


def save(run_dir: Path, weights: dict[str, Tensor], optimizer: dict[str, Tensor], state: TrainState, keep: int) -> Path:
    """Write a checkpoint, make it the latest, and delete all but the newest `keep`. Rank 0 only.

    Raises OSError (disk full, say) with the older checkpoints and LATEST untouched.
    """
    parent = run_dir / "checkpoints"
    final = parent / f"step-{state.step:08d}"
    temporary = parent / f".{final.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        save_file(weights, temporary / "model.safetensors")
        save_file(optimizer, temporary / "optimizer.safetensors")
        (temporary / "state.json").write_text(json.dumps(asdict(state)) + "\n")
        seal(temporary)
        for path in [*temporary.iterdir(), temporary]:
            fsync(path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, SafetensorError):  # how safetensors reports a full disk
            raise OSError(str(error)) from error
        raise
    shutil.rmtree(final, ignore_errors=True)  # a bad one of the same step, or it would have been resumed from
    temporary.rename(final)
    fsync(parent)
    write_atomically(run_dir / "LATEST", final.name + "\n")
    for old in _steps(parent)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def latest(run_dir: Path) -> Checkpoint | None:
    """The newest checkpoint whose files match their hashes; None where none was ever finished.

    A damaged one is named in a warning and the one before it is used. Raises NoCheckpointError when there
    are checkpoints but none is good: a run never starts again from zero in silence.
    """
    parent = run_dir / "checkpoints"
    if not parent.is_dir():
        return None
    candidates = _steps(parent)
    if found := first_usable(candidates, _verified):
        return found
    if candidates or (run_dir / "LATEST").exists():
        raise NoCheckpointError(
            f"no usable checkpoint in {parent}, although some were written. "
            f"Restore one from a copy, or start over on purpose under another --name or with {run_dir} removed"
        )
    return None


def remove_leftovers(run_dir: Path) -> None:
    """Remove what kills in the middle of a save left behind; only for the process that is about to write here."""
    for leftover in (run_dir / "checkpoints").glob(".*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)


def load(path: Path) -> Checkpoint:
    """The checkpoint directory `path`, refused (UserError) unless it matches its hashes."""
    try:
        return _verified(path)
    except ValueError as fault:
        raise UserError(
            f"--resume {path}: {fault}. Give auto, never, or a directory runs/NAME/checkpoints/step-N of this program"
        ) from None


def _steps(parent: Path) -> list[Path]:
    """Finished checkpoint directories, newest first."""
    return sorted((p for p in parent.glob("step-*") if p.name[5:].isdigit()), reverse=True)


def _verified(path: Path) -> Checkpoint:
    """The checkpoint at `path` if every file matches its hash; ValueError saying what is wrong otherwise."""
    check_seal(path, ("model.safetensors", "optimizer.safetensors", "state.json"))
    try:
        state = TrainState(**json.loads((path / "state.json").read_text()))
        for name in ("seed", "step", "samples", "phase", "phase_step", "skipped"):
            if type(getattr(state, name)) is not int:
                raise TypeError(f"{name} is {getattr(state, name)!r}, no whole number")
        return Checkpoint(path, state)
    except TypeError as error:
        raise ValueError(f"state.json was not written by this program: {error}") from None
