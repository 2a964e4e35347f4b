"""The verdict on each step of the loop: take the update, leave it out, or end the run."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from clips.common.errors import NotFiniteError
from clips.config import RunConfig
from clips.data.loader import Batch
from clips.training import watchdog
from clips.training.engine import Agreed
from clips.training.log import RunLog
from clips.training.saving import await_checkpoint
from clips.weights.checkpoint import TrainState, Writer


class Judge:
    """Sees the micro-batches of a step, then decides from the figures that all ranks agreed on."""

    def __init__(self, run: RunConfig, state: TrainState, log: RunLog, writer: Writer) -> None:
        self.run, self.state, self.log, self.writer = run, state, log, writer
        self.seen: list[tuple[Tensor, list[str]]] = []
        """Loss and sample keys of each micro-batch of the step, of this rank."""

    def watch(self, batch: Batch, parts: dict[str, Tensor]) -> None:
        self.seen.append((parts["loss"], batch["keys"]))

    def __call__(self, agreed: Agreed) -> bool:
        """Whether the step's update is left out. Collective at a spike, which all ranks see.

        NotFiniteError for a loss or gradient that is not finite, DivergedError if leaving steps out does not help,
        CommandError if a checkpoint could not be written.
        """
        if agreed.unsaved:
            await_checkpoint(self.writer)
        if not agreed.finite:
            self._end_not_finite()
        figures = watchdog.find_spike(self.state, agreed)
        leave_out = figures is not None and self._on_spike(figures)
        if not leave_out:
            watchdog.remember(self.state, agreed)
        self.seen.clear()
        return leave_out

    def _on_spike(self, figures: dict[str, Any]) -> bool:
        """Record the spike with its samples. Returns whether the step is left out."""
        action = self.run.train.on_spike
        self.log.spike({"step": self.state.step + 1, "action": action, **figures}, self._of_all_ranks(self.seen))
        if action == "skip":
            watchdog.leave_out(self.state, since=self.state.step + 1 - 2 * watchdog.PATIENCE)
        return action == "skip"

    def _end_not_finite(self) -> None:
        """End the run on every rank, weights untouched, with the samples of the micro-batches that are not finite.

        The contrastive loss runs over all ranks: the samples of one rank break the losses of all.
        """
        broken = self._of_all_ranks([(loss, keys) for loss, keys in self.seen if not torch.isfinite(loss).all()])
        where = "\n".join(f"  rank {rank}: {', '.join(keys)}" for rank, keys in enumerate(broken) if keys)
        named = "Every loss was finite."
        if where:
            named = f"Samples of the micro-batches whose loss is not finite:\n{where}"
        phase = self.run.phases[self.state.phase].name
        raise NotFiniteError(
            f"the loss or a gradient is not finite at step {self.state.step + 1} (phase {phase}); no weight was "
            f"changed.\n{named}"
        )

    @staticmethod
    def _of_all_ranks(seen: list[tuple[Tensor, list[str]]]) -> list[list[str]]:
        """The sample keys of each rank."""
        keys: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(keys, [key for _, part in seen for key in part])
        return keys
