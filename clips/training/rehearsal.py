"""Rehearse an optimizer step of a pretraining run, to learn without a GPU how much memory it takes on one.

The step runs the code of a real run. Of DeepSpeed's engine only the copy of the gradients in ZeRO 0 is modelled.
"""

import json
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from clips.common.errors import UserError
from clips.common.page import print_table, table_of
from clips.common.paths import DS_CONFIGS
from clips.common.rehearsal import (
    BUCKET,
    CPU,
    FP32,
    META,
    Rehearsal,
    Rehearsed,
    drop_gradients,
    leave_meta,
    rehearsed_ranks,
    without_data,
)
from clips.config import PhaseConfig, RunConfig
from clips.data.loader import micro_batch_size
from clips.engine.engine import Batch
from clips.engine.loop import accumulate
from clips.engine.metrics import USABLE, Machine
from clips.model.clips import CLIPSModel
from clips.training.grad_cache import CachedGradients
from clips.training.optim import parameter_groups
from clips.training.prepare import full_batch
from clips.training.trainer import Task, flops_of, shared_inputs


@dataclass(frozen=True)
class _Engine:
    """The passes of clips/engine/engine.py."""

    module: Task
    run: RunConfig
    device: torch.device = CPU

    @property
    def accumulation(self) -> int:
        return self.run.train.accumulation

    def __call__(self, batch: Batch, cached: CachedGradients | None = None, **options: Any) -> Any:
        return self.module(self.module.to_device(batch, self.device), cached, **options)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()


def rehearse(run: RunConfig, phase: PhaseConfig, ranks: int, *, stage: int = 0) -> Rehearsed:
    """Rehearse an optimizer step of rank 0 of `ranks` under ZeRO `stage`, and return the bytes that it takes.

    All captions have full length. Raises torch's error for a step that reads values from the device, and UserError if
    the ranks cannot share the batch evenly.
    """
    micro = micro_batch_size(phase, run.train.accumulation, ranks)
    batch = without_data(full_batch(run.model, run.task, phase.image_size, micro, META))
    task = built(run, phase)
    leave_meta(task)
    groups = parameter_groups(task, run.optim)
    trained = sum(p.numel() for group in groups for p in group["params"])
    by_muon = sum(p.numel() for group in groups for p in group["params"] if group["name"] == "muon")
    engine: Any = _Engine(task, run)

    with rehearsed_ranks(ranks), Rehearsal() as rehearsal:
        weights = rehearsal.hold([*task.parameters(), *task.buffers()])
        if stage >= 2:
            drop_gradients(task.parameters())
        elif run.train.accumulation > 1:
            for parameter in filter(lambda p: p.requires_grad, task.parameters()):
                parameter.grad = torch.empty_like(parameter)
        rehearsal.hold(x for x in batch.values() if isinstance(x, Tensor))
        step = [batch] * (run.train.accumulation if run.train.whole_step else 1)
        accumulate(engine, step, shared_inputs(engine, step))
        if ranks > 1:  # DeepSpeed reduces the gradients in a copy
            torch.empty(min(trained, BUCKET))

    state = FP32 * (2 * trained - by_muon)
    return Rehearsed(trained, weights, FP32 * trained, state, rehearsal.peak)


def built(run: RunConfig, phase: PhaseConfig) -> Task:
    """Return the model of `run` on "meta", as the engine sets it up for the image size of `phase`.

    Precision "auto" is bf16, as on a GPU.
    """
    if run.train.precision == "auto":
        run = replace(run, train=replace(run.train, precision="bf16"))
    with torch.device(META):
        model = CLIPSModel(run.model, pad_id=0)
        model.visual.set_image_size(phase.image_size)
    model.freeze(run.train.freeze)
    model.set_activation_checkpointing(run.train.activation_checkpointing)
    return Task(model, run.task, run.train)


def flops_per_sample(run: RunConfig, phase: PhaseConfig, ranks: int) -> int:
    """Return the mean FLOPs of a sample in one rank's micro-batch, including what is computed twice.

    With masked padding a text is assumed to fill half of its context.
    """
    micro = micro_batch_size(phase, run.train.accumulation, ranks)
    words = run.model.text.context_length // (2 if run.model.text.trim else 1)
    batch = full_batch(run.model, run.task, phase.image_size, micro, META, words=words, share=run.task.caption_share)
    with rehearsed_ranks(ranks):
        return flops_of(built(run, phase), batch, repeated=True) // micro


def print_pretraining(run: RunConfig, machine: Machine, engine: str) -> None:
    """Print a row for each phase of the run by ds_configs/`engine`.json.

    Raises UserError, after the table, if a phase does not fit.
    """
    zero = json.loads((DS_CONFIGS / f"{engine}.json").read_text(encoding="utf-8"))["zero_optimization"]
    accumulation = run.train.accumulation
    rows, days, too_large = [], 0.0, []
    for phase in run.phases:
        step = rehearse(run, phase, machine.gpus, stage=zero["stage"])
        memory = step.on_rank(zero, machine.gpus)
        if not machine.fits(memory):
            too_large.append(phase.name)

        flops = flops_per_sample(run, phase, machine.gpus)
        days_of_phase = machine.days(phase.seen * flops)
        days += days_of_phase
        rows.append([
            phase.name, f"{accumulation} × {phase.batch_size // (accumulation * machine.gpus):,}",
            f"{memory / 1e9:.3g}", f"{flops / 1e9:,.1f}", f"{phase.steps:,}", f"{days_of_phase:.1f}",
            f"{24 * days_of_phase * machine.gpus:,.0f}",
        ])  # fmt: skip
    head = ("phase", "micro-batches", "memory per rank, GB", "GFLOP per sample", "steps", "days", "GPU hours")
    print_table(table_of(f"{run.recipe} on {machine} with ds_configs/{engine}.json", head, rows))
    checkpoint = step.weights + step.state
    print(
        f"{step.parameters / 1e6:,.0f} M parameters train; {days:.1f} days, {24 * days * machine.gpus:,.0f} GPU hours; "
        f"{checkpoint / 1e9:.2g} GB per checkpoint, at most {run.train.keep_checkpoints + 1} of them on disk\n"
        f"assumed: {machine.mfu:.0%} of the GPUs' peak (--mfu), including what is computed twice; texts fill half of "
        "their context (for the memory all of it); training never waits for data"
    )
    if too_large:
        contrastive = "" if run.train.contrastive == "global" else " train.contrastive=global"
        stage = zero["stage"]
        next_stage = f"--engine {engine.replace(str(stage), str(stage + 1))}, " if stage < 3 else ""
        raise UserError(
            f"phase {', '.join(too_large)} does not fit {USABLE:.0%} of a GPU's memory: try --set "
            f"train.accumulation={2 * accumulation}{contrastive}, {next_stage}or more --gpus"
        )
