"""Started by test_memory.py under torchrun: the bytes that an engine of each ZeRO stage holds on each rank.

python held_worker.py OUT KIND BUCKET
"""

from __future__ import annotations

import json
import sys
import weakref
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from conftest import tiny_batch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from zero_worker import CPU, STAGES, build

from clips.common.runtime import init_distributed, shutdown
from clips.training.engine import Engine


class Made(TorchDispatchMode):
    """`peak`: the most bytes at a time of storages that are made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        there = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)}
        for storage in (x.untyped_storage() for x in tree_leaves(out) if torch.is_tensor(x)):
            key, size = storage._cdata, storage.nbytes()
            if key not in self.known | there:
                self.known.add(key)
                self.live += size
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._gone, key, size).atexit = False
        return out

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


def size(tensors: Iterable[torch.Tensor]) -> int:
    """Of their storages, each counted once."""
    return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())


def holds(engine: Engine) -> dict[str, int]:
    """Between the backward pass and the step, after one whole step; and the most that the backward pass made."""
    for step in range(2):
        loss, _ = engine({key: value[:4] for key, value in tiny_batch(step).items()})
        with Made() as made:
            engine.backward(loss)
        engine.agree(loss, stop=0)
        gradients = size(part for parts in engine.state.gradients() for part in parts)
        engine.step()
    inner = engine.optimizer if engine.stage == 0 else engine.optimizer.optimizer
    flats = [p for group in inner.param_groups for p in group["params"]]
    state = [v for held in inner.state.values() for v in held.values() if torch.is_tensor(v) and v.ndim]
    weights = [p.ds_tensor if engine.stage == 3 else p for p in engine.model.parameters()]
    copies = flats if engine.stage in (1, 2) else []  # elsewhere they are the weights themselves
    return {"weights": size(weights), "optimizer": size([*state, *copies]), "gradients": gradients, "made": made.peak}


def main(out: str, kind: str, bucket: str) -> None:
    init_distributed(CPU)
    found = {}
    for name, zero in STAGES.items():
        ranks: list[dict[str, int] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, holds(build(kind, zero | {"reduce_bucket_size": int(bucket)})))
        found[name] = ranks
    if dist.get_rank() == 0:
        with open(out, "w", encoding="utf-8") as file:
            json.dump(found, file)
    shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
