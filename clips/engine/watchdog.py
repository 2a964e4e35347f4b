"""What a run of days is watched for besides values that are not finite: spikes, and each rank's own time.

A spike is a loss or a gradient norm many times those of the last steps. Both are positive and vary in proportion to
their size, so logarithms are compared: with the median of the last ones, by deviations that are told from the median
change between two steps. Neither is moved by a few outliers, and the second not by the fall of the loss either (von
Neumann et al., Ann. Math. Stat. 12, 1941, have the mean of the squares instead of the median). The decision is a pure
function of figures that are the same on every rank and stand in the checkpoint, so all ranks take it together and a
resumed run takes it again.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import nn

from clips.common.errors import DivergedError
from clips.engine.checkpoint import TrainState
from clips.engine.engine import Agreed

WINDOW = 32
"""Steps of the phase that are looked back on."""
FEWEST = 16
"""Steps before which nothing counts as a spike."""
DEVIATIONS = 8.0
NORMAL = 1.0484
"""Median absolute difference of two values of a normal distribution → its standard deviation: 1 / (0.6745 √2)."""
SMALLEST_DEVIATION = 0.05
"""Values that hardly vary would make a spike of everything: it is at least exp(8 · 0.05) = 1.5 times the usual."""
PATIENCE = 5
"""Steps left out of twice as many before the run ends: then it is no matter of a batch."""


def limit(recent: Sequence[float]) -> float:
    """Above this a value that follows `recent` (not negative) is a spike; infinite where there are too few."""
    if len(recent) < FEWEST:
        return math.inf
    logs = [math.log(max(value, sys.float_info.min)) for value in recent]
    deviation = NORMAL * median(abs(after - before) for before, after in pairwise(logs))
    exponent = median(logs) + DEVIATIONS * max(deviation, SMALLEST_DEVIATION)
    return math.exp(exponent) if exponent < math.log(sys.float_info.max) else math.inf


def find_spike(state: TrainState, agreed: Agreed) -> dict[str, Any] | None:
    """Figures of the spike that the step is, None where it is none."""
    loss_limit, norm_limit = limit(state.recent_losses), limit(state.recent_norms)
    norm = agreed.grad_norm
    if agreed.loss <= loss_limit and (norm is None or norm <= norm_limit):
        return None
    return {
        "loss": agreed.loss,
        "usual_loss": median(state.recent_losses),
        "loss_jumps": agreed.loss > loss_limit,
        "grad_norm": norm,
        "usual_grad_norm": median(state.recent_norms) if state.recent_norms else None,
    }


def remember(state: TrainState, agreed: Agreed) -> None:
    """Let a step that is taken count among the recent ones; one that is left out never does."""
    for recent, value in ((state.recent_losses, agreed.loss), (state.recent_norms, agreed.grad_norm)):
        if value is not None:
            recent.append(value)
            del recent[:-WINDOW]


def leave_out(state: TrainState, since: int) -> None:
    """Note that the step at hand is left out; DivergedError where too many were from step `since` on."""
    state.left_out = sorted({*state.left_out, state.step})
    if sum(step >= since for step in state.left_out) > PATIENCE:
        raise DivergedError(
            f"step {state.step + 1} is spike number {PATIENCE + 1} within {state.step + 1 - since} steps: leaving "
            "batches out does not mend this run. spikes.jsonl names the samples. Look at them, lower the rate "
            "(--set 'phases.*.lr=…'), or take the spikes (--on-spike continue), with --allow-config-change; the run "
            "goes on from its last checkpoint"
        )


class OwnTime:
    """Seconds that this rank's device spends in the model's forward pass, in which it waits for no other rank.

    The rest of a step is full of collectives, in which the fast ranks wait for the slow one and all look alike. On a
    GPU the time is the device's, read by `seconds` and not before: reading it waits for the device.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.device = device
        self.marks: list[Any] = []
        """Begin and end of each forward pass, by turns: seconds, or CUDA events."""
        model.register_forward_pre_hook(lambda *_: self._mark())
        model.register_forward_hook(lambda *_: self._mark())

    def _mark(self) -> None:
        if self.device.type != "cuda":
            self.marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.marks.append(event)

    def seconds(self) -> float:
        """Since the last call."""
        pairs = list(zip(self.marks[::2], self.marks[1::2], strict=True))
        self.marks = []
        if self.device.type != "cuda":
            return sum(end - begin for begin, end in pairs)
        torch.cuda.synchronize(self.device)
        return sum(begin.elapsed_time(end) for begin, end in pairs) / 1e3
