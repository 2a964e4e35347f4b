"""Started by test_memory.py under torchrun: the bytes that an engine of each ZeRO stage holds on each rank.

python held_worker.py OUT
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable

import torch
import torch.distributed as dist
from conftest import tiny_batch
from zero_worker import CPU, STAGES, build

from clips.common.runtime import init_distributed, shutdown
from clips.training.engine import Engine


def size(tensors: Iterable[torch.Tensor]) -> int:
    """Of their storages, each counted once."""
    return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())


def holds(engine: Engine) -> dict[str, int]:
    """Between the backward pass and the step, after one whole step."""
    for step in range(2):
        loss, _ = engine({key: value[:4] for key, value in tiny_batch(step).items()})
        engine.backward(loss)
        engine.agree(loss, stop=0)
        gradients = size(part for parts in engine.state.gradients() for part in parts)
        engine.step()
    inner = engine.optimizer if engine.stage == 0 else engine.optimizer.optimizer
    flats = [p for group in inner.param_groups for p in group["params"]]
    state = [v for held in inner.state.values() for v in held.values() if torch.is_tensor(v) and v.ndim]
    weights = [p.ds_tensor if engine.stage == 3 else p for p in engine.model.parameters()]
    copies = flats if engine.stage in (1, 2) else []  # elsewhere they are the weights themselves
    return {"weights": size(weights), "optimizer": size([*state, *copies]), "gradients": gradients}


def main(out: str) -> None:
    init_distributed(CPU)
    found = {}
    for name, zero in STAGES.items():
        ranks: list[dict[str, int] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, holds(build("adamw", zero | {"reduce_bucket_size": 30_000})))
        found[name] = ranks
    if dist.get_rank() == 0:
        with open(out, "w", encoding="utf-8") as file:
            json.dump(found, file)
    shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
