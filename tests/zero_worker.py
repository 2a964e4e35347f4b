"""Started under torchrun for two ranks: a tiny model in each ZeRO stage; rank 0 saves to OUT what was found.

python zero_worker.py train OUT OTHER KIND[:FROZEN_TOWER|:dropping] …  # how it trains (test_zero.py)
python zero_worker.py leave_out OUT                                   # steps that are left out (test_zero.py)
python zero_worker.py hold OUT                                        # bytes that each rank holds (test_memory.py)

OTHER: an outcome to go on from in the middle of its kinds that no `:` follows, or "none".
"""

import sys
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from conftest import drawn_tokens, dropping, random_model, tiny_batch, tiny_run

from clips.common.distributed import init_distributed, shutdown
from clips.engine.engine import Engine, Reduced
from clips.engine.loop import accumulate
from clips.training.grad_cache import CachedGradients
from clips.training.optim import make_engine
from clips.training.trainer import Task, limit_logit_scale, rates_of, shared_inputs

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
    """One rank splits nothing."""
    if ":" in kind:
        return FEW_STAGES if ranks == 2 else ("zero0", "zero3")
    return tuple(STAGES) if ranks == 2 else FEW_STAGES


FRESH = (("adamw", "zero0"), ("muon", "zero2"))
"""Optimizer and stage of two ranks in which an optimizer begins anew."""


class Pulled(Task):
    """Its gradient pulls at the temperature alone, up or down, whatever the batch says."""

    direction = 1.0

    def _loss(self, batch: dict, part: CachedGradients | None) -> tuple[torch.Tensor, dict]:
        loss, parts = super()._loss(batch, part)
        return 0.0 * loss + self.direction * self.model.logit_scale.sum(), parts


def build(kind: str, zero: dict, weights: dict | None = None, task: type[Task] = Task, accumulation: int = 1) -> Engine:
    kind, _, variant = kind.partition(":")
    run = tiny_run(kind=kind)
    if variant == "dropping":
        run = dropping(run)
    run = replace(run, train=replace(run.train, accumulation=accumulation))
    model = random_model(run)
    model.freeze(variant if variant in ("vision", "text") else "none")
    if weights is not None:
        model.load_state_dict(weights)
    return make_engine(task(model, run.task, run.train), run, CPU, {"zero_optimization": dict(zero)})


def train(engine: Engine, first: int, last: int) -> list[float]:
    losses = []
    rank, share = dist.get_rank(), 8 // dist.get_world_size()
    for step in range(first, last):
        engine.set_rates(rates_of(1e-2, 2e-2))
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
    results = []
    for direction in (-1.0, 1.0, 1.0):
        engine.engine.module.direction = direction
        engine.set_rates(rates_of(3.0, 0.0))
        loss, parts = engine({key: value[:4] for key, value in tiny_batch(0).items()})
        results.append(parts["logit_scale"].item())
        engine.backward(loss)
        engine.agree(loss, stop=0)
        engine.step()
        limit_logit_scale(engine)
    return results


def whole_state(engine: Engine) -> dict[str, torch.Tensor]:
    return engine.zero_state.gather_weights() | engine.zero_state.gather_optimizer()


def fresh_in_the_middle(kind: str, zero: dict) -> list[list]:
    """Three steps, an optimizer that begins anew, three steps: [losses, state, losses, state …] of four ways there.

    Without a break; killed at the border, and one step behind it; and from the weights alone, which is what is meant.
    """
    engine = build(kind, zero)
    train(engine, 0, 3)
    border = [engine.zero_state.gather_weights(), engine.zero_state.gather_optimizer()]
    engine.zero_state.reset_optimizer()
    losses = train(engine, 3, 4)
    behind = [engine.zero_state.gather_weights(), engine.zero_state.gather_optimizer()]
    ways = [[losses + train(engine, 4, 6), whole_state(engine)]]
    dist.broadcast_object_list(border)
    dist.broadcast_object_list(behind)
    at_border = build(kind, zero, border[0])
    at_border.zero_state.restore_optimizer(border[1], steps=3)
    at_border.zero_state.reset_optimizer()
    after = build(kind, zero, behind[0])
    after.zero_state.restore_optimizer(behind[1], steps=1)
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
    parts = [engine.zero_state.gather_weights(), engine.zero_state.gather_optimizer()]
    losses += train(engine, 3, 6)
    state = whole_state(engine)
    dist.broadcast_object_list(parts)
    again = from_the_middle(kind, zero, parts)
    record = {
        "losses": losses,
        "state": state,
        "resumed_losses": train(again, 3, 6),
        "resumed_state": whole_state(again),
        "middle": parts,
    }
    alone = dist.get_world_size() == 1
    if (kind, name) in FRESH and not alone:
        record["fresh"] = fresh_in_the_middle(kind, zero)
    if kind == "adamw" and alone:
        record["temperatures"] = temperatures_at_the_limit(build(kind, zero, task=Pulled))
    if other is not None:
        record["after two ranks and zero3"] = train(from_the_middle(kind, zero, other["zero3"]["middle"]), 3, 6)
    return record


def from_the_middle(kind: str, zero: dict, parts: list[dict]) -> Engine:
    engine = build(kind, zero, parts[0])
    engine.zero_state.restore_optimizer(parts[1], steps=3)
    return engine


def outcomes(other: str, *kinds: str) -> dict[str, dict[str, dict]]:
    before = torch.load(other, weights_only=True) if other != "none" else {}
    return {
        kind: {
            name: outcome(kind, name, None if ":" in kind else before.get(kind))
            for name in stages_of(kind, dist.get_world_size())
        }
        for kind in kinds
    }


# ---------------------------------------------------------------------------------------------- steps that are left out

ACCUMULATION = 2
LEFT_OUT = {"adamw": ("zero0", "zero1", "zero3", "offload", "offload3"), "muon": FEW_STAGES}
"""Optimizer → the stages in which it is tried; ZeRO-2 with AdamW is tried with its offload."""
OFFLOAD_3 = {"stage": 3, "offload_optimizer": {"device": "cpu"}}


def step(engine: Engine, seed: int, *, skip: bool = False) -> Reduced:
    engine.set_rates(rates_of(1e-2, 2e-2))
    share = 8 // (engine.world_size * ACCUMULATION)
    begins = [(micro * engine.world_size + dist.get_rank()) * share for micro in range(ACCUMULATION)]
    batches = [{key: value[begin : begin + share] for key, value in tiny_batch(seed).items()} for begin in begins]
    parts = accumulate(engine, batches, shared_inputs(engine, batches))
    agreed = engine.agree(torch.stack([of_batch["loss"] for of_batch in parts]).mean(), stop=0)
    engine.step(skip=skip)
    return agreed


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def left_out(kind: str, name: str) -> dict[str, object]:
    """What rank 0 finds; whole states are empty elsewhere."""
    zero = STAGES.get(name, OFFLOAD_3)
    engine = build(kind, zero, accumulation=ACCUMULATION)
    step(engine, 0)
    step(engine, 1)
    before = whole_state(engine)
    agreed = step(engine, 2, skip=True)
    unchanged = same(whole_state(engine), before)
    step(engine, 3)
    skipped = whole_state(engine)

    never_saw_it = build(kind, zero, accumulation=ACCUMULATION)
    for seed in (0, 1, 3):
        step(never_saw_it, seed)
    as_if = same(skipped, whole_state(never_saw_it))
    return {"unchanged": unchanged, "as if never seen": as_if, "agreed": tuple(agreed)}


# ---------------------------------------------------------------------------------------------- what a rank holds


def size(tensors: Iterable[torch.Tensor]) -> int:
    """Of their storages, each counted once."""
    return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())


def held(zero: dict) -> dict[str, int]:
    """Between the backward pass and the step, after one whole step."""
    engine = build("adamw", zero | {"reduce_bucket_size": 30_000})
    for seed in range(2):
        loss, _ = engine({key: value[:4] for key, value in tiny_batch(seed).items()})
        engine.backward(loss)
        engine.agree(loss, stop=0)
        gradients = size(part for parts in engine.zero_state.gradients() for part in parts)
        engine.step()
    inner = engine.optimizer if engine.zero_stage == 0 else engine.optimizer.optimizer
    flats = [p for group in inner.param_groups for p in group["params"]]
    state = [v for values in inner.state.values() for v in values.values() if torch.is_tensor(v) and v.ndim]
    weights = [p.ds_tensor if engine.zero_stage == 3 else p for p in engine.module.parameters()]
    copies = flats if engine.zero_stage in (1, 2) else []  # elsewhere they are the weights themselves
    return {"weights": size(weights), "optimizer": size([*state, *copies]), "gradients": gradients}


def of_all_ranks(value: object) -> list[Any]:
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, value)
    return ranks


def main(what: str, out: str, *words: str) -> None:
    init_distributed(CPU)
    if what == "train":
        results: Any = outcomes(*words)
    elif what == "leave_out":
        results = of_all_ranks({k: {name: left_out(k, name) for name in names} for k, names in LEFT_OUT.items()})
    else:
        results = {name: of_all_ranks(held(zero)) for name, zero in STAGES.items()}
    if dist.get_rank() == 0:
        torch.save(results, out)
    shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
