"""Started by test_leave_out.py under torchrun: steps that are left out, in each ZeRO stage.

python leave_out_worker.py OUT
"""

from __future__ import annotations

import json
import sys

import torch
import torch.distributed as dist
from conftest import tiny_batch
from zero_worker import CPU, STAGES, build, whole_state

from clips.common.runtime import init_distributed, shutdown
from clips.training.engine import Agreed, Engine

ACCUMULATION = 2
STAGES = STAGES | {"offload3": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}
OF_KIND = {"adamw": [name for name in STAGES if name != "zero2"], "muon": ["zero0", "zero2", "zero3"]}
"""Optimizer → the stages in which it is tried; ZeRO-2 with AdamW is tried with its offload."""


def step(engine: Engine, seed: int, *, leave_out: bool = False) -> Agreed:
    engine.set_lr(1e-2, 2e-2)
    share = 8 // (engine.world_size * ACCUMULATION)
    losses = []
    for micro in range(ACCUMULATION):
        begin = (micro * engine.world_size + dist.get_rank()) * share
        loss, _ = engine({key: value[begin : begin + share] for key, value in tiny_batch(seed).items()})
        losses.append(loss.detach())
        engine.backward(loss)
        if micro < ACCUMULATION - 1:
            engine.step()
    agreed = engine.agree(torch.stack(losses).mean(), stop=0)
    engine.step(leave_out=leave_out)
    return agreed


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def measure(kind: str, zero: dict) -> dict[str, object]:
    """What rank 0 finds; whole states are empty elsewhere."""
    engine = build(kind, zero, accumulation=ACCUMULATION)
    step(engine, 0)
    step(engine, 1)
    before = whole_state(engine)
    agreed = step(engine, 2, leave_out=True)
    unchanged = same(whole_state(engine), before)
    step(engine, 3)
    skipped = whole_state(engine)

    never_saw_it = build(kind, zero, accumulation=ACCUMULATION)
    for seed in (0, 1, 3):
        step(never_saw_it, seed)
    return {"unchanged": unchanged, "as if never seen": same(skipped, whole_state(never_saw_it)), "agreed": agreed}


def main(out: str) -> None:
    init_distributed(CPU)
    found = {kind: {name: measure(kind, STAGES[name]) for name in names} for kind, names in OF_KIND.items()}
    ranks: list[dict] = [{}] * dist.get_world_size()
    dist.all_gather_object(ranks, found)
    if dist.get_rank() == 0:
        with open(out, "w", encoding="utf-8") as file:
            json.dump(ranks, file)
    shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
