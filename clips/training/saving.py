"""Checkpoints of a run in progress, as all its ranks write and find them. Every function is collective."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from clips.common.errors import CommandError
from clips.training.engine import Engine
from clips.weights import checkpoint
from clips.weights.checkpoint import Checkpoint, TrainState, Writer


def save(engine: Engine, state: TrainState, writer: Writer) -> None:
    """Copy the content of a checkpoint to rank 0's memory, and begin to write it."""
    await_checkpoint(writer)  # one at a time: in memory, too
    weights, optimizer = engine.state.gather_weights(), engine.state.gather_optimizer()
    if dist.get_rank() == 0:
        writer.begin(weights, optimizer, state)


def await_checkpoint(writer: Writer) -> None:
    """Wait until the checkpoint in progress is written. CommandError on every rank if the write failed."""
    failure = [writer.wait()]
    dist.broadcast_object_list(failure)
    if failure[0] is not None:
        raise CommandError(
            f"{failure[0]}. The older ones are intact: make room, then the same command goes on from the last one"
        )


def last_checkpoint(writer: Writer) -> Checkpoint | None:
    """The newest good checkpoint, as rank 0 sees it."""
    await_checkpoint(writer)
    path: list[Path | None] = [None]
    if dist.get_rank() == 0:
        found = checkpoint.latest(writer.run_dir)
        path = [found.path if found is not None else None]
    dist.broadcast_object_list(path)
    return checkpoint.load(path[0]) if path[0] is not None else None
