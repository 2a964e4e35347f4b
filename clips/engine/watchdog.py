"""Watch a long run for spikes.

A spike is a loss or a gradient norm many times larger than those of the last steps. Both are positive and vary in
proportion to their size, so logarithms are compared: with their median over the last steps, in units of a deviation
that is estimated from the median change between two steps. Both are robust to outliers, and the deviation is also
unaffected by the downward trend of the loss (von Neumann et al., Ann. Math. Stat. 12, 1941, use the mean square instead
of the median). The decision depends only on values that are the same on every rank and are stored in the checkpoint, so
all ranks decide alike and a resumed run decides as before.
"""

import math
import sys
from collections.abc import Sequence
from itertools import pairwise
from statistics import median
from typing import Any

from clips.common.errors import DivergedError
from clips.engine.checkpoint import TrainState
from clips.engine.engine import Reduced

WINDOW = 32
"""Number of steps of the phase to look back on."""
FEWEST = 16
"""Number of steps below which nothing counts as a spike."""
DEVIATIONS = 8.0
NORMAL = 1.0484
"""Ratio of a normal distribution's deviation to the median absolute difference of two values: 1 / (0.6745 √2)."""
SMALLEST_DEVIATION = 0.05
"""If values hardly vary, everything would be a spike. So a spike is at least exp(8 · 0.05) = 1.5 times the usual."""
PATIENCE = 5
"""The run stops if more than this many of the last 2 × PATIENCE steps were skipped: the cause is not a single batch."""


def limit(recent: Sequence[float]) -> float:
    """Return the limit above which a value after `recent` (not negative) is a spike; infinite after too few values."""
    if len(recent) < FEWEST:
        return math.inf
    logs = [math.log(max(value, sys.float_info.min)) for value in recent]
    deviation = NORMAL * median(abs(after - before) for before, after in pairwise(logs))
    exponent = median(logs) + DEVIATIONS * max(deviation, SMALLEST_DEVIATION)
    return math.exp(exponent) if exponent < math.log(sys.float_info.max) else math.inf


def find_spike(state: TrainState, reduced: Reduced) -> dict[str, Any] | None:
    """Return loss and gradient norm of a spike and the usual ones, or None if the step is no spike."""
    loss_limit, norm_limit = limit(state.recent_losses), limit(state.recent_norms)
    norm = reduced.grad_norm
    if reduced.loss <= loss_limit and (norm is None or norm <= norm_limit):
        return None
    return {
        "loss": reduced.loss,
        "usual_loss": median(state.recent_losses),
        "loss_jumps": reduced.loss > loss_limit,
        "grad_norm": norm,
        "usual_grad_norm": median(state.recent_norms) if state.recent_norms else None,
    }


def remember(state: TrainState, reduced: Reduced) -> None:
    """Append loss and gradient norm of a step to the recent ones in `state`; not called for skipped steps."""
    for recent, value in ((state.recent_losses, reduced.loss), (state.recent_norms, reduced.grad_norm)):
        if value is not None:
            recent.append(value)
            del recent[:-WINDOW]


def record_skip(state: TrainState, since: int) -> None:
    """Record that the current step is skipped. Raises DivergedError if too many were skipped since step `since`."""
    state.left_out = sorted({*state.left_out, state.step})
    if sum(step >= since for step in state.left_out) > PATIENCE:
        raise DivergedError(
            f"step {state.step + 1} is spike number {PATIENCE + 1} within {state.step + 1 - since} steps, so skipping "
            "batches does not mend this run. spikes.jsonl lists the samples. Look at them, lower the rate "
            "(--set 'phases.*.lr=…'), or train on spikes (--on-spike continue), with --allow-config-change; the run "
            "goes on from its last checkpoint"
        )
