"""Checkpoints of a run in progress, as all its ranks write them. Both functions are collective."""

from __future__ import annotations

import torch.distributed as dist

from clips.common.errors import CommandError
from clips.training.engine import Engine
from clips.weights.checkpoint import TrainState, Writer


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
