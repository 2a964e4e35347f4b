"""One optimizer step: the passes of its micro-batches, the agreement of all ranks, the update.

The training loop, the benchmarks and tools/gpu_report.py take this step, and no other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from clips.data.loader import Batch
from clips.training.engine import Agreed, Engine
from clips.training.grad_cache import forward_passes


def optimizer_step(
    engine: Engine,
    batches: Iterable[Batch],
    *,
    watch: Callable[[Batch, dict[str, Tensor]], None] = lambda batch, parts: None,
    asked: Callable[[], tuple[int, bool]] = lambda: (0, False),
    judge: Callable[[Agreed], bool] = lambda agreed: False,
) -> Agreed:
    """Take one step on `batches`, this rank's micro-batches (run.train.accumulation of them). Collective.

    `watch` sees each micro-batch and its detached losses after its backward pass. `asked` returns the arguments `stop`
    and `unsaved` of `Engine.agree`. `judge` says between the agreement and the update whether the update is left out:
    weights and optimizer state stay as they are. It may raise.
    """
    losses: list[Tensor] = []
    for batch, loss, parts in forward_passes(engine, batches):
        losses.append(parts["loss"])
        engine.backward(loss)
        watch(batch, parts)
        if len(losses) < engine.accumulation:
            engine.step()
    agreed = engine.agree(torch.stack(losses).mean(), *asked())
    engine.step(leave_out=judge(agreed))
    engine.limit_logit_scale()
    return agreed
