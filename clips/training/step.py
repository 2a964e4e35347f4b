"""The loop's step (clips/training/loop.py) without log and verdict, for benchmarks, tests and gpu_report.py."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from clips.data.loader import Batch
from clips.training.engine import Agreed, Engine
from clips.training.grad_cache import forward_passes


def optimizer_step(engine: Engine, batches: Iterable[Batch]) -> Agreed:
    """Take one step on `batches`, this rank's micro-batches (run.train.accumulation of them). Collective."""
    losses = []
    for _, loss, parts in forward_passes(engine, batches):
        engine.backward(loss)
        losses.append(parts["loss"])
        if len(losses) < engine.accumulation:
            engine.step()
    agreed = engine.agree(torch.stack(losses).mean(), stop=0)
    engine.step()
    engine.limit_logit_scale()
    return agreed
