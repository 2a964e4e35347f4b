"""Finds the Trainer's whole checkpoints, and checks their content before anything else opens them.

Each checkpoint is sealed (clips/common/files.py) once it is written. The seal shows damage, not a file's origin, so
sealed files are still read as data: nothing in them is run.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import TrainerState
from transformers.trainer_pt_utils import safe_globals as numpy_arrays

from clips.common.errors import CommandError, NoCheckpointError, UserError, first_line
from clips.common.files import MANIFEST, check_seal, first_usable
from clips.common.tensors import only_data, read_torch

TRAINED = "trained.safetensors"
"""The trained parameters, without DeepSpeed."""
OPTIMIZER, SCHEDULER, STATE = "optimizer.pt", "scheduler.pt", "trainer_state.json"
"""The Trainer's own files."""


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.partition("-")[2])


def engine_tag(checkpoint: Path) -> str:
    """The folder of DeepSpeed's files in a checkpoint."""
    return f"global_step{step_of(checkpoint)}"


def newest(stage_dir: Path) -> Path | None:
    """The newest sealed checkpoint whose files match their hashes; None if no checkpoint was ever sealed.

    A warning names a damaged checkpoint, and the checkpoint before it is used. An unsealed checkpoint is ignored.
    Raises NoCheckpointError if every sealed checkpoint is damaged: never a silent restart from zero.
    """
    sealed = [path for path in _newest_first(stage_dir) if (path / MANIFEST).is_file()]
    good = first_usable(sealed, check_seal)
    if sealed and good is None:
        raise NoCheckpointError(
            f"no usable checkpoint in {stage_dir}, although some were written. Restore one from a copy, or start over "
            "on purpose: under another --output_dir, or with that directory removed"
        )
    return good


@contextmanager
def restoring(checkpoint: Path) -> Iterator[None]:
    """Turns any error inside into a UserError that names the checkpoint and the mend."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # torch, DeepSpeed and the Trainer raise many kinds for a file that is not theirs
        raise UserError(
            f"cannot go on from {checkpoint}: {first_line(error)}\nRestore it from a copy, or move it elsewhere: then "
            "the same command goes on from the one before it, or from the start where there is none"
        ) from None


@contextmanager
def writing(failed: str) -> Iterator[None]:
    """Turn any error of a full disk inside into a CommandError that begins with `failed`."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # each library has its own
        raise CommandError(
            f"{failed}: {first_line(error)}. The older checkpoints are intact: make room, then the same command goes "
            "on from the last one"
        ) from error


def check_content(checkpoint: Path, *, deepspeed: Sequence[type] | None, world_size: int) -> None:
    """Raises UserError if a checkpoint is of another kind of run, or if one of its files has the wrong content.

    Every rank checks the files of all ranks, so all ranks refuse alike. The values of tensors are not read.
    `deepspeed` lists the classes whose instances DeepSpeed's files hold; None without DeepSpeed.
    """
    parts = len(list((checkpoint / engine_tag(checkpoint)).glob("*optim_states.pt")))
    with restoring(checkpoint):
        if deepspeed is not None and not parts:
            raise UserError("it was written without DeepSpeed: go on without it (--deepspeed none)")
        if deepspeed is None and parts:
            raise UserError("it was written under DeepSpeed: go on under it, see --deepspeed")
        if deepspeed is not None and parts != world_size:
            raise UserError(f"DeepSpeed cut it for {parts} ranks, and here are {world_size}: go on with as many")
        needed = [SCHEDULER, STATE] + ([TRAINED, OPTIMIZER] if deepspeed is None else [])
        for name in needed:
            if not (checkpoint / name).is_file():
                raise UserError(f"{name} is missing")

        with only_data(deepspeed or ()), numpy_arrays():  # numpy's random state is an array
            for path in sorted(path for path in checkpoint.rglob("*") if path.suffix in (".pt", ".pth")):
                read_torch(path, mapped=True)
        step = TrainerState.load_from_json(str(checkpoint / STATE)).global_step
        if step != step_of(checkpoint):
            raise UserError(f"{STATE} is of step {step}, not {step_of(checkpoint)}")


def prune(stage_dir: Path, keep: int) -> None:
    """Remove all checkpoints that are older than the `keep` newest sealed checkpoints."""
    paths = _newest_first(stage_dir)
    sealed = [path for path in paths if (path / MANIFEST).is_file()][:keep]
    for path in paths[paths.index(sealed[-1]) + 1 :] if len(sealed) == keep else []:
        shutil.rmtree(path)


def _newest_first(stage_dir: Path) -> list[Path]:
    paths = [path for path in stage_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(paths, key=lambda path: -step_of(path))
