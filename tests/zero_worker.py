"""Started by test_zero.py, under torchrun for two ranks: trains a tiny model in each ZeRO stage and saves the outcome.

python zero_worker.py OUT OTHER KIND[:FROZEN_TOWER|:caption] …

OTHER: an outcome to go on from in the middle of its kinds that no `:` follows, or "none".
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch
import torch.distributed as dist
from conftest import drawn_tokens, dropping, generative, random_model, tiny_batch, tiny_run

from clips.common.runtime import init_distributed, shutdown
from clips.training.engine import Engine
from clips.training.task import Part, Task

CPU = torch.device("cpu")
STAGES = {
    "zero0": {"stage": 0},
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero3": {"stage": 3},
    "offload": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
}
FEW_STAGES = ("zero0", "zero2", "zero3")
"""Each of another kind where parameters are concerned that do not train."""


def stages_of(kind: str, ranks: int) -> tuple[str, ...]:
    """One rank splits nothing, so that AdamW alone tries all stages there."""
    if ":" in kind:
        return FEW_STAGES if ranks == 2 else ("zero0", "zero3")
    return tuple(STAGES) if ranks == 2 or kind == "adamw" else FEW_STAGES


FRESH = (("adamw", "zero0"), ("muon", "zero2"))
"""Optimizer and stage of two ranks in which an optimizer begins anew."""


class Pulled(Task):
    """Its gradient pulls at the temperature alone, up or down, whatever the batch says."""

    direction = 1.0

    def _loss(self, batch: dict, part: Part | None) -> tuple[torch.Tensor, dict]:
        loss, parts = super()._loss(batch, part)
        return 0.0 * loss + self.direction * self.model.logit_scale.sum(), parts


def build(kind: str, zero: dict, weights: dict | None = None, task: type[Task] = Task, accumulation: int = 1) -> Engine:
    kind, _, variant = kind.partition(":")
    run = tiny_run(kind=kind)
    if variant == "caption":
        run = dropping(generative(run, "caption"))
    run = replace(run, train=replace(run.train, accumulation=accumulation))
    model = random_model(run)
    model.freeze(variant if variant in ("vision", "text") else "none")
    if weights is not None:
        model.load_state_dict(weights)
    return Engine(task(model, run), run, CPU, {"zero_optimization": dict(zero)})


def train(engine: Engine, first: int, last: int) -> list[float]:
    losses = []
    rank, share = dist.get_rank(), 8 // dist.get_world_size()
    for step in range(first, last):
        engine.set_lr(1e-2, 2e-2)
        whole = tiny_batch(step) | drawn_tokens(step)
        batch = {key: value[rank * share : (rank + 1) * share] for key, value in whole.items()}
        loss, _ = engine(batch)
        engine.backward(loss)
        agreed = engine.agree(loss, stop=0)
        assert (agreed.finite, agreed.stopping, agreed.unsaved) == (True, 0, False)
        engine.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / dist.get_world_size())
    return losses


def temperatures_at_the_limit(engine: Engine) -> list[float]:
    """The temperature that a forward pass uses, before and after a step up beyond the limit and one down."""
    found = []
    for direction in (-1.0, 1.0, 1.0):
        engine.engine.module.direction = direction
        engine.set_lr(3.0, 0.0)
        loss, parts = engine({key: value[:4] for key, value in tiny_batch(0).items()})
        found.append(parts["logit_scale"].item())
        engine.backward(loss)
        engine.agree(loss, stop=0)
        engine.step()
        engine.limit_logit_scale()
    return found


def whole_state(engine: Engine) -> dict[str, torch.Tensor]:
    return engine.state.gather_weights() | engine.state.gather_optimizer()


def fresh_in_the_middle(kind: str, zero: dict) -> list[list]:
    """Three steps, an optimizer that begins anew, three steps: [losses, state, losses, state …] of four ways there.

    Without a break; killed at the border, and one step behind it; and from the weights alone, which is what is meant.
    """
    engine = build(kind, zero)
    train(engine, 0, 3)
    border = [engine.state.gather_weights(), engine.state.gather_optimizer()]
    engine.state.reset_optimizer()
    losses = train(engine, 3, 4)
    behind = [engine.state.gather_weights(), engine.state.gather_optimizer()]
    ways = [[losses + train(engine, 4, 6), whole_state(engine)]]
    dist.broadcast_object_list(border)
    dist.broadcast_object_list(behind)
    at_border = build(kind, zero, border[0])
    at_border.state.restore_optimizer(border[1], steps=3)
    at_border.state.reset_optimizer()
    after = build(kind, zero, behind[0])
    after.state.restore_optimizer(behind[1], steps=1)
    ways.append([train(at_border, 3, 6), whole_state(at_border)])
    ways.append([losses + train(after, 4, 6), whole_state(after)])
    anew = build(kind, zero, border[0])
    ways.append([train(anew, 3, 6), whole_state(anew)])
    return ways


def outcome(kind: str, name: str, other: dict | None) -> dict:
    """Six steps in the stage `name`, and the last three again from the middle of these, and of `other`."""
    zero = STAGES[name]
    engine = build(kind, zero)
    losses = train(engine, 0, 3)
    parts = [engine.state.gather_weights(), engine.state.gather_optimizer()]
    losses += train(engine, 3, 6)
    state = whole_state(engine)
    dist.broadcast_object_list(parts)
    again = from_the_middle(kind, zero, parts)
    found = {
        "losses": losses,
        "state": state,
        "resumed_losses": train(again, 3, 6),
        "resumed_state": whole_state(again),
        "middle": parts,
    }
    alone = dist.get_world_size() == 1
    if (kind, name) in FRESH and not alone:
        found["fresh"] = fresh_in_the_middle(kind, zero)
    if kind == "adamw" and alone:
        found["temperatures"] = temperatures_at_the_limit(build(kind, zero, task=Pulled))
    if other is not None:
        found["after two ranks and zero3"] = train(from_the_middle(kind, zero, other["zero3"]["middle"]), 3, 6)
    return found


def from_the_middle(kind: str, zero: dict, parts: list[dict]) -> Engine:
    engine = build(kind, zero, parts[0])
    engine.state.restore_optimizer(parts[1], steps=3)
    return engine


def main(out: str, other: str, *kinds: str) -> None:
    init_distributed(CPU)
    before = torch.load(other, weights_only=True) if other != "none" else {}
    results = {
        kind: {
            name: outcome(kind, name, None if ":" in kind else before.get(kind))
            for name in stages_of(kind, dist.get_world_size())
        }
        for kind in kinds
    }
    if dist.get_rank() == 0:
        torch.save(results, out)
    shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
