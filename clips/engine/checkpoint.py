"""A run's checkpoints: written atomically, hashed, and never silently started over.

`checkpoints/step-N/` holds `model.safetensors`, `optimizer.safetensors`, `state.json` and `MANIFEST.json` with the
SHA-256 of each. A crash at any moment leaves the older checkpoints and a directory that is ignored. A checkpoint holds
no code, and tensors are unsharded and by name, so a run may resume on another number of ranks or in another ZeRO stage.
Training waits for the copy to host memory only: a `Writer` does the rest in a thread.
"""

from __future__ import annotations

import copy
import json
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from clips.common.errors import NoCheckpointError, UserError, in_one_line
from clips.common.files import check_seal, from_json, fsync, read_bytes, replacing, seal, write_atomically
from clips.common.live import say
from clips.common.rundir import METRICS, checkpoints, chosen_checkpoint
from clips.common.tensors import read_weights

RETIRED = ("logit_scale",)
"""Fields in the state.json of earlier versions that nothing reads."""


@dataclass
class TrainState:
    """The progress of a run; everything else follows from the configuration and (seed, epoch, position)."""

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
    recent_losses: list[float] = field(default_factory=list)
    """Losses of the last steps of this phase, with which a spike is compared (clips/engine/watchdog.py)."""
    recent_norms: list[float] = field(default_factory=list)
    """Gradient norms of the same steps."""
    left_out: list[int] = field(default_factory=list)
    """Skipped steps (0-based, over all phases), whose samples were seen without an update."""


@dataclass
class Checkpoint:
    """A complete checkpoint on disk; its tensors are mapped from the files, so ranks of a machine share one copy."""

    path: Path
    state: TrainState

    def weights(self) -> dict[str, Tensor]:
        """Map the weights by name, on the CPU."""
        return read_weights(self.path / "model.safetensors")

    def optimizer(self) -> dict[str, Tensor]:
        """Map the tensors of the optimizer's state by name, on the CPU."""
        return read_weights(self.path / "optimizer.safetensors")


def save(run_dir: Path, weights: dict[str, Tensor], optimizer: dict[str, Tensor], state: TrainState, keep: int) -> Path:
    """Write a checkpoint, make it the latest, and delete all but the newest `keep` and the chosen one. Rank 0 only.

    Raises OSError (for example: disk full) with the older checkpoints and LATEST untouched.
    """
    parent = run_dir / "checkpoints"
    final = parent / f"step-{state.step:08d}"
    try:
        with replacing(final) as partial:  # a damaged checkpoint of the same step is replaced
            save_file(weights, partial / "model.safetensors")
            save_file(optimizer, partial / "optimizer.safetensors")
            (partial / "state.json").write_text(json.dumps(asdict(state)) + "\n", encoding="utf-8")
            seal(partial)
            for path in [*partial.iterdir(), partial]:
                fsync(path)
    except SafetensorError as error:  # how safetensors reports a full disk
        raise OSError(str(error)) from error
    fsync(parent)
    write_atomically(run_dir / "LATEST", final.name + "\n")
    chosen = chosen_checkpoint(run_dir)
    for old in checkpoints(run_dir)[keep:]:
        if old != chosen:
            shutil.rmtree(old, ignore_errors=True)
    return final


class Writer:
    """Writes checkpoints in the background of the training, at most one at a time, on rank 0.

    Use it as a context; its exit waits for a write in progress.
    """

    def __init__(self, run_dir: Path, keep: int) -> None:
        self.run_dir = run_dir
        self.keep = keep
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: tuple[int, Future[Path]] | None = None

    def begin(self, weights: dict[str, Tensor], optimizer: dict[str, Tensor], state: TrainState) -> None:
        """Begin to write a checkpoint. Nobody may change the tensors any more; `state` is copied.

        Raises RuntimeError if `wait` was not called since the last `begin`.
        """
        if self._writing is not None:
            raise RuntimeError("a checkpoint is being written still: wait for it first")
        snapshot = copy.deepcopy(state)
        future = self._thread.submit(save, self.run_dir, weights, optimizer, snapshot, self.keep)
        self._writing = (state.step, future)

    def has_failed(self) -> bool:
        """Return True if the last write has ended without a checkpoint; do not wait for it."""
        return self._writing is not None and self._writing[1].done() and self._writing[1].exception() is not None

    def wait(self) -> str | None:
        """Wait until nothing is being written; return why the last write failed, but only once."""
        if self._writing is None:
            return None
        step, future = self._writing
        error = future.exception()
        self._writing = None
        if error is None:
            return None
        why = str(error) if isinstance(error, OSError) else in_one_line(error)
        return f"the checkpoint of step {step} cannot be written to {self.run_dir}: {why}"

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        failure = self.wait()
        self._thread.shutdown()
        if failure is not None:  # another error is what ends the run
            say(f"warning: {failure}")


def is_one(path: Path) -> bool:
    """Return True if `path` looks like a checkpoint; only `load` checks that it is complete."""
    return (path / "state.json").is_file() and (path / "optimizer.safetensors").is_file()


def run_of(path: Path) -> Path:
    """Return the run directory of a checkpoint, also of one that was put aside."""
    folder = next((parent for parent in path.resolve().parents if parent.name == "checkpoints"), path.resolve())
    return folder.parent


def rewind(run_dir: Path, to: Checkpoint) -> Path | None:
    """Move the checkpoints newer than `to`, and a copy of the metrics, into a directory aside, and return its path.

    They are kept but no longer used, and LATEST names `to`. Return None if no checkpoint is newer. Rank 0 only.
    """
    parent = run_dir / "checkpoints"
    newer = [path for path in checkpoints(run_dir) if int(path.name[5:]) > to.state.step]
    if not newer:
        return None
    aside = parent / time.strftime("aside-%Y%m%d-%H%M%S")
    aside.mkdir(exist_ok=True)
    if (run_dir / METRICS).is_file():
        shutil.copy2(run_dir / METRICS, aside)
    for path in newer:  # newest first: after a crash in between, the same command goes on with it
        path.rename(aside / path.name)
    fsync(aside)
    fsync(parent)
    write_atomically(run_dir / "LATEST", f"{to.path.name}\n")
    return aside


def latest(run_dir: Path) -> Checkpoint | None:
    """Return the newest checkpoint whose files match their hashes, or None if none was ever finished.

    A warning names each damaged checkpoint, and the one before it is tried. Raises NoCheckpointError if there are
    checkpoints but none is usable: a run never starts again from zero in silence.
    """
    candidates = checkpoints(run_dir)
    for older, path in enumerate(candidates, 1):
        try:
            return _verified(path)
        except ValueError as fault:
            what_next = "; trying the one before it" if older < len(candidates) else ""
            say(f"warning: checkpoint {path} is not usable ({fault}){what_next}")
    if candidates or (run_dir / "LATEST").exists():
        raise NoCheckpointError(
            f"no usable checkpoint in {run_dir / 'checkpoints'}, although some were written. "
            f"Restore one from a copy, or start over on purpose under another --name or with {run_dir} removed"
        )
    return None


def remove_leftovers(run_dir: Path) -> None:
    """Remove what interrupted saves have left behind; only for the process that is about to write here."""
    for leftover in (run_dir / "checkpoints").glob("*.partial"):
        shutil.rmtree(leftover, ignore_errors=True)


def load(path: Path, what: str = "--resume") -> Checkpoint:
    """Load the checkpoint in `path`. Raises UserError ("`what` …") unless it matches its hashes."""
    try:
        return _verified(path)
    except ValueError as fault:
        raise UserError(
            f"{what} {path}: {fault}. Give a complete directory runs/NAME/checkpoints/step-N of this program"
        ) from None


def _verified(path: Path) -> Checkpoint:
    """Return the checkpoint in `path`. Raises ValueError with what is wrong unless every file matches its hash."""
    check_seal(path, ("model.safetensors", "optimizer.safetensors", "state.json"))
    try:
        record = from_json(read_bytes(path / "state.json"))
        state = TrainState(**{name: value for name, value in record.items() if name not in RETIRED})
        for name in ("seed", "step", "samples", "phase", "phase_step", "skipped"):
            if type(getattr(state, name)) is not int:
                raise TypeError(f"{name} is {getattr(state, name)!r}, no whole number")
        return Checkpoint(path, state)
    except (AttributeError, TypeError) as error:
        raise ValueError(f"state.json was not written by this program: {error}") from None
