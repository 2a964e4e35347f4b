"""Started by test_grad_cache.py, under torchrun for two ranks: two accumulated steps of a tiny model in many ways.

python grad_cache_worker.py OUT
"""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from conftest import drawn_tokens, dropping, random_model, tiny_batch, tiny_run

from clips.common.distributed import init_distributed, shutdown
from clips.common.runtime import import_deepspeed
from clips.config import RunConfig
from clips.data.loader import counted
from clips.engine.engine import Engine
from clips.engine.loop import accumulate
from clips.training.optim import make_engine
from clips.training.trainer import Task, limit_logit_scale, rates_of, shared_inputs

CPU = torch.device("cpu")
STEPS, BATCH, MICRO = 2, 8, 2
"""Optimizer steps; samples of one, and of one rank's micro-batch."""


class Case(NamedTuple):
    stage: int
    kind: str
    objective: str = "clips"
    captioner: bool = True
    checkpointing: bool = False
    contrastive: str = "global"
    drops: bool = False
    """Image tokens, which both passes of a micro-batch must drop alike."""

    @property
    def name(self) -> str:
        captioner = "captioner" if self.captioner else "none"
        checkpointing = "checkpointing" if self.checkpointing else "plain"
        drops = "-drops" if self.drops else ""
        return f"zero{self.stage}-{self.kind}-{self.objective}-{captioner}-{checkpointing}-{self.contrastive}{drops}"


CASES = [
    *(Case(stage, kind) for stage, kind in product(range(4), ("adamw", "muon"))),
    *(Case(stage, "adamw", checkpointing=True) for stage in (0, 3)),
    *(Case(stage, kind, captioner=False) for stage, kind in ((0, "adamw"), (2, "muon"))),
    *(Case(stage, kind, objective="clip", captioner=False) for stage, kind in ((1, "adamw"), (3, "muon"))),
    *(Case(stage, kind, contrastive="micro") for stage, kind in ((0, "adamw"), (0, "muon"), (2, "adamw"), (3, "muon"))),
    *(Case(stage, "adamw", drops=True) for stage in (0, 3)),
]
"""Every stage with both optimizers; each variant in two stages or more."""
CASES_OF = {1: [case for case in CASES if case.stage == 0], 2: CASES}
"""By ranks: one rank splits nothing in any stage."""


def without_bf16() -> None:
    """Let Muon multiply in fp32, as on a CPU without bf16, so that two ways to a gradient can be told apart."""
    import_deepspeed().accelerator.get_accelerator().is_bf16_supported = lambda: False


def a_run(case: Case, accumulation: int) -> RunConfig:
    run = tiny_run(kind=case.kind)
    run = dropping(run) if case.drops else run
    return replace(
        run,
        model=run.model if case.captioner else replace(run.model, captioner=None),
        task=replace(run.task, objective=case.objective, caption_weight=2.0 if case.captioner else 0.0),
        # Adam divides by a gradient's size: with its own eps, key biases, whose gradient is rounding alone, would move.
        optim=replace(run.optim, eps=1e-3),
        train=replace(
            run.train, accumulation=accumulation, contrastive=case.contrastive,
            activation_checkpointing=case.checkpointing,
        ),
    )  # fmt: skip


def samples(case: Case, step: int, begin: int, end: int) -> dict[str, Any]:
    """Of a step's batch, as the loader gives them: images as bytes."""
    batch = tiny_batch(step, size=BATCH) | drawn_tokens(step, size=BATCH)
    batch["images"] = (batch["images"] * 50 + 128).clamp(0, 255).byte()
    wanted = {"images", "web"} | ({"sub"} if case.objective == "clips" else set())
    wanted |= {"caption"} if case.captioner else set()
    wanted |= {"patches", "image_tokens"} if case.drops else set()
    return {name: batch[name][begin:end] for name in wanted}


def micro_batches(case: Case, engine: Engine, step: int) -> Iterator[dict[str, Any]]:
    for micro in range(engine.accumulation):
        begin = (micro * engine.world_size + dist.get_rank()) * MICRO
        yield samples(case, step, begin, begin + MICRO)


def take_step(engine: Engine, batches: Iterable[dict[str, Any]]) -> tuple[list[dict[str, torch.Tensor]], bool]:
    """The losses of each micro-batch, and whether all ranks found them finite; else the update is left out."""
    config = engine.module.model.config
    step = [counted(batch, config, 0) for batch in batches]
    losses = accumulate(engine, step, shared_inputs(engine, step))
    agreed = engine.agree(torch.stack([parts["loss"] for parts in losses]).mean(), stop=0)
    engine.step(skip=not agreed.finite)
    limit_logit_scale(engine)
    return losses, agreed.finite


def mean_of(found: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    """Over micro-batches and ranks, as the log has it."""
    means = {}
    for name in found[0]:
        mean = torch.stack([parts[name].reshape(()) for parts in found]).mean()
        dist.all_reduce(mean)
        means[name] = mean.item() / dist.get_world_size()
    return means


def build(case: Case) -> Engine:
    run = a_run(case, BATCH // (MICRO * dist.get_world_size()))
    task = Task(random_model(run), run.task, run.train)
    return make_engine(task, run, CPU, {"zero_optimization": {"stage": case.stage}})


def train(case: Case) -> dict[str, Any]:
    engine, logged = build(case), []
    for step in range(STEPS):
        engine.set_rates(rates_of(1e-2, 2e-2))
        found, is_finite = take_step(engine, micro_batches(case, engine, step))
        assert is_finite
        logged.append(mean_of(found))
    return {"weights": engine.zero_state.gather_weights(), "logged": logged}


def poisoned(stage: int) -> dict[str, Any]:
    """Which losses are finite, [rank][micro-batch], when one sample of the last rank's second micro-batch is not."""
    engine = build(case := Case(stage, "adamw"))
    batches = list(micro_batches(case, engine, 0))
    if dist.get_rank() == engine.world_size - 1:
        batches[1]["images"] = batches[1]["images"].float()  # bytes hold no NaN
        batches[1]["images"][0, 0, 0, 0] = torch.nan
    found, is_finite = take_step(engine, batches)
    ranks: list[list[bool]] = [[] for _ in range(engine.world_size)]
    dist.all_gather_object(ranks, [bool(parts["loss"].isfinite()) for parts in found])
    return {"finite": ranks, "agreed": is_finite}


def main(out: str) -> None:
    init_distributed(CPU)
    without_bf16()
    results: dict[str, Any] = {case.name: train(case) for case in CASES_OF[dist.get_world_size()]}
    results |= {f"poisoned{stage}": poisoned(stage) for stage in (0, 3)}
    if dist.get_rank() == 0:
        torch.save(results, out)
    shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
