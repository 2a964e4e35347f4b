"""What a pretraining run needs before it begins: memory, time, communication, GPU hours, money, disk; and what fits.

Nothing here was measured on a GPU. What is assumed is printed with the plan (`assumptions`): the memory formula of
clips/training/memory.py, FLOPs from shapes (clips/model/flops.py), a share of the GPU's peak, bandwidths
(clips/common/cards.py). Where a step does not fit, it is cut into micro-batches; the contrastive loss is then taken to
run over all of them (GradCache), at the price of one more forward pass of the towers.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from clips.common.cards import PER_MACHINE, TIME_HEAD, USABLE, Machine, Time, card
from clips.common.errors import UserError
from clips.common.memory import FP32, Parameters
from clips.common.page import markdown, print_table
from clips.common.paths import DS_CONFIGS
from clips.common.rehearsal import agreement
from clips.config import Contrastive, PhaseConfig, RunConfig
from clips.data.loader import micro_batch_size
from clips.recipes import captions_alone, recipe
from clips.training.memory import Usage, count_parameters, usage
from clips.training.prepare import flops_per_sample, fullest_shape
from clips.training.rehearsal import rehearse

ENGINES = ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
"""Files of ds_configs/, in the order in which they are tried: the simplest that fits is taken."""
PCIE = 25e9
"""Bytes per second between a GPU and the machine's memory, for offload."""
HOST_MEMORY = 10e9
"""Bytes per second of the machine's memory for one rank's AdamW, which touches 28 bytes a parameter."""


@cache
def engine_settings(name: str) -> dict[str, Any]:
    """The `zero_optimization` of ds_configs/`name`.json."""
    return json.loads((DS_CONFIGS / f"{name}.json").read_text(encoding="utf-8"))["zero_optimization"]


@dataclass(frozen=True)
class Fit:
    """A way to run a phase that fits."""

    engine: str
    accumulation: int
    micro: int
    usage: Usage


@dataclass(frozen=True)
class PhasePlan:
    phase: PhaseConfig
    fit: Fit
    time: Time


@dataclass(frozen=True)
class Plan:
    run: RunConfig
    machine: Machine
    parameters: Parameters
    phases: Sequence[PhasePlan]

    @property
    def gpu_hours(self) -> float:
        return 24 * self.days * self.machine.gpus

    @property
    def days(self) -> float:
        return sum(phase.time.hours for phase in self.phases) / 24

    @property
    def checkpoint_bytes(self) -> int:
        """Of one checkpoint: weights and optimizer state, fp32 and whole."""
        return FP32 * (self.parameters.trained + self.parameters.frozen + self.parameters.state)


def memory_of(run: RunConfig, phase: PhaseConfig, machine: Machine, engine: str, accumulation: int) -> Usage:
    """Of a step in `accumulation` micro-batches; UserError where the batch cannot be cut so."""
    micro = micro_batch_size(phase, accumulation, machine.gpus)
    shape = fullest_shape(run, phase, micro, machine.gpus)
    settings = engine_settings(engine)
    whole_step = run.task.contrasts and accumulation > 1
    return usage(run, shape, "cuda", settings, accumulation=accumulation, whole_step=whole_step)


def fits(run: RunConfig, phases: Sequence[PhaseConfig], machine: Machine, engine: str) -> list[Fit] | None:
    """Each phase with the largest micro-batch that lets all of `phases` fit, none larger than the run's own.

    All are cut into as many micro-batches, since a run has one `train.accumulation`. None where not even one sample
    at a time fits.
    """
    for count in cuts(phases, machine.gpus, run.train.accumulation):
        found = [memory_of(run, phase, machine, engine, count) for phase in phases]
        if all(usage.total <= machine.card.usable for usage in found):
            return [
                Fit(engine, count, micro_batch_size(phase, count, machine.gpus), usage)
                for phase, usage in zip(phases, found, strict=True)
            ]
    return None


def cuts(phases: Sequence[PhaseConfig], gpus: int, at_least: int) -> Iterable[int]:
    """The numbers of micro-batches that a step of each phase can be cut into, from `at_least` on."""
    most = min(phase.batch_size for phase in phases) // gpus
    return (n for n in range(at_least, most + 1) if not any(phase.batch_size % (gpus * n) for phase in phases))


def plan(run: RunConfig, machine: Machine, *, engine: str | None = None, strict: bool = True) -> Plan:
    """The plan of `run` with `engine`, or with the first one that fits.

    UserError where a phase does not fit as the run says, with what does; where that is an accumulation and not
    `strict`, it is taken. One engine is chosen for all phases, since a run has one.
    """
    if run.train.precision == "auto":
        run = replace(run, train=replace(run.train, precision="bf16"))
    for phase in run.phases:
        micro_batch_size(phase, run.train.accumulation, machine.gpus)
    tried = {name: fits(run, run.phases, machine, name) for name in ((engine,) if engine else ENGINES)}
    found = [chosen for chosen in tried.values() if chosen is not None]
    if not found:
        raise UserError(_nothing_fits(run, machine, engine))
    chosen = min(found, key=lambda fits: fits[0].accumulation)  # of equals the first
    if strict and chosen[0].accumulation > run.train.accumulation:
        raise UserError(_does_not_fit(run, machine, chosen))
    parameters = count_parameters(run.model, run.optim, run.train.freeze)
    phases = [_timed(run, phase, found, machine, parameters) for phase, found in zip(run.phases, chosen, strict=True)]
    return Plan(run, machine, parameters, phases)


def _timed(run: RunConfig, phase: PhaseConfig, found: Fit, machine: Machine, parameters: Parameters) -> PhasePlan:
    samples = found.micro * found.accumulation
    whole: Contrastive = "global" if run.task.contrasts else "micro"
    cut = replace(run, train=replace(run.train, accumulation=found.accumulation, contrastive=whole))
    compute = samples * flops_per_sample(cut, phase) / machine.speed
    moved = collective_bytes(run, phase, found, machine.gpus, parameters)
    seconds = machine.collective_seconds(moved)
    if "offload" in found.engine:
        share = parameters.trained / machine.gpus
        seconds += share * (2 * FP32 / PCIE + 28 / HOST_MEMORY)
    return PhasePlan(phase, found, Time(phase.steps, compute, seconds))


def collective_bytes(run: RunConfig, phase: PhaseConfig, found: Fit, gpus: int, parameters: Parameters) -> float:
    """What each GPU sends in one optimizer step: gradients, weights, and the features of the contrastive loss."""
    stage = engine_settings(found.engine)["stage"]
    gradients, weights = FP32 * parameters.trained, FP32 * (parameters.trained + parameters.frozen)
    if stage <= 1:  # an all-reduce, or a reduce-scatter and the gathering of the new weights
        moved = 2 * gradients
    elif stage == 2:  # reduced in each backward pass
        moved = found.accumulation * gradients + gradients
    else:  # gathered in each forward and backward pass
        moved = found.accumulation * (gradients + 2 * weights)
    features = FP32 * (1 + len(run.task.texts)) * phase.batch_size * run.model.embed_dim
    return moved + 3 * features  # gathered, and their gradients all-reduced


def _does_not_fit(run: RunConfig, machine: Machine, chosen: Sequence[Fit]) -> str:
    lines = []
    for phase, found in zip(run.phases, chosen, strict=True):
        asked = memory_of(run, phase, machine, found.engine, run.train.accumulation)
        micro = micro_batch_size(phase, run.train.accumulation, machine.gpus)
        lines.append(
            f"  phase {phase.name}: {asked.total / 1e9:.0f} GB with micro-batches of {micro:,}; "
            f"{found.usage.total / 1e9:.0f} GB with {found.accumulation} of {found.micro:,}"
        )
    return (
        f"{run.recipe} does not fit {machine} ({machine.card.usable / 1e9:.0f} GB usable) with "
        f"ds_configs/{chosen[0].engine}.json:\n"
        + "\n".join(lines)
        + f"\nGive --set train.accumulation={chosen[0].accumulation}"
        + (" train.contrastive=global" if run.task.contrasts else "")
        + ("" if run.train.activation_checkpointing else " or --set train.activation_checkpointing=true")
        + ", or more --gpus"
    )


def _nothing_fits(run: RunConfig, machine: Machine, engine: str | None) -> str:
    name = engine or ENGINES[-1]
    single = max(cuts(run.phases, machine.gpus, run.train.accumulation))
    needs = [(memory_of(run, phase, machine, name, single), phase) for phase in run.phases]
    least, phase = max(needs, key=lambda pair: pair[0].total)
    return (
        f"{run.recipe} does not fit {machine} ({machine.card.usable / 1e9:.0f} GB usable): with ds_configs/{name}.json "
        f"and steps cut into {single:,} micro-batches phase {phase.name} still needs {least.total / 1e9:.0f} GB "
        f"({least.weights / 1e9:.1f} weights, {least.optimizer / 1e9:.1f} optimizer, {least.buffers / 1e9:.1f} "
        f"DeepSpeed's buffers, {least.batch / 1e9:.1f} pictures and features, {least.working / 1e9:.1f} "
        "gradients, activations and logits). Try "
        + ("another --engine, " if engine else "")
        + "more --gpus, a --kind with more memory, or a smaller batch"
    )


# ------------------------------------------------------------------------------------------------------------ showing


def memory_rows(run: RunConfig, machine: Machine) -> list[list[str]]:
    """GB of one GPU by engine and checkpointing (rows) and phase (columns), the step in one piece and cut to fit."""
    rows = []
    for engine in ENGINES:
        for checkpointing in (True, False):
            train = replace(run.train, activation_checkpointing=checkpointing)
            changed = replace(run, train=train)
            row = [engine, "yes" if checkpointing else "no"]
            for phase in run.phases:
                asked = memory_of(changed, phase, machine, engine, run.train.accumulation)
                row.append(f"{asked.total / 1e9:.1f}" + ("" if asked.total <= machine.card.usable else " ✗"))
                found = fits(changed, [phase], machine, engine)
                row.append(f"{found[0].accumulation} × {found[0].micro:,}" if found else "–")
            row.append(f"{asked.host / 1e9 * min(machine.gpus, PER_MACHINE):.0f}" if asked.host else "–")
            rows.append(row)
    return rows


def totals(found: Plan) -> str:
    kept, each = found.run.train.keep_checkpoints, found.checkpoint_bytes / 1e9
    return (
        f"{found.days:.1f} days, {found.gpu_hours:,.0f} GPU hours{found.machine.cost(found.gpu_hours)}; "
        f"{each:.1f} GB a checkpoint, {each * (kept + 1):.0f} GB of disk for {kept} and the one being written"
    )


def assumptions(machine: Machine) -> list[str]:
    """Everything that the figures rest on and nobody measured here."""
    card = machine.card
    return [
        *machine.rates,
        f"memory: {USABLE:.0%} of {card.memory_gb:g} GB is filled; every text and caption has full length; kernels "
        "as in clips/training/memory.py",
        "time: texts fill half of their context; nothing waits for data; evaluation and checkpoints take none",
        f"offload: {PCIE / 1e9:.0f} GB/s to the machine's memory, {HOST_MEMORY / 1e9:.0f} GB/s of it for AdamW's "
        "28 bytes a parameter; communication in fp32",
        "accumulation: the contrastive loss runs over the whole step (GradCache), one more forward "
        "pass of the towers (train.contrastive=global)",
    ]


TABLE_HEAD = (
    *("recipe", "GPUs", "parameters", "engine", "micro-batches by phase", "GB a GPU by phase", "the first rehearsed"),
    *("step by phase, s", "communication", "days", "GPU hours", "cost", "a checkpoint, GB"),
)


def table_row(found: Plan) -> list[str]:
    """One line for a whole run, as docs/planning.md has them."""
    phases, price = found.phases, found.machine.price
    spent = sum(part.time.steps * part.time.step_s for part in phases)
    sent = sum(part.time.steps * part.time.communication_s for part in phases)
    return [
        f"`{found.run.recipe}`", str(found.machine.gpus), f"{found.parameters.trained / 1e6:,.0f} M",
        phases[0].fit.engine, ", ".join(f"{part.fit.accumulation} × {part.fit.micro:,}" for part in phases),
        ", ".join(f"{part.fit.usage.total / 1e9:.0f}" for part in phases), f"{_rehearsed(found) / 1e9:.1f}",
        ", ".join(f"{part.time.step_s:.2f}" for part in phases), f"{sent / spent:.0%}", f"{found.days:,.1f}",
        f"{found.gpu_hours:,.0f}", "–" if price is None else f"{found.gpu_hours * price:,.0f}",
        f"{found.checkpoint_bytes / 1e9:.1f}",
    ]  # fmt: skip


def _rehearsed(found: Plan) -> int:
    """Bytes of a GPU in the first phase: of a step on "meta", and what the engine holds beside it."""
    part = found.phases[0]
    whole: Contrastive = "global" if part.fit.accumulation > 1 and found.run.task.contrasts else "micro"
    train = replace(found.run.train, accumulation=part.fit.accumulation, contrastive=whole)
    step = rehearse(replace(found.run, train=train), part.phase, found.machine.gpus)
    return step.peak + part.fit.usage.optimizer + part.fit.usage.buffers


TABLE = ("s16", "b16", "l14", "h14")
TABLE_GPUS = (8, 64)


def planning_table(kind: str, price: float | None, mfu: float, names: Sequence[str] = TABLE) -> str:
    """The paper's recipes on one machine and on eight, in Markdown."""
    plans = [
        plan(recipe(name), Machine(card(kind), gpus, mfu, price), strict=False) for name in names for gpus in TABLE_GPUS
    ]
    lines = [markdown(TABLE_HEAD, map(table_row, plans)), ""]
    return "\n".join([*lines, *(f"- {line}" for line in assumptions(plans[0].machine))])


WHOLE = "train.activation_checkpointing=false"
CLIP = ("task.objective=clip", "model.captioner=null")
AGREEMENT: dict[tuple[str, str], tuple[int, tuple[str, ...]]] = {
    ("l14", "clips, 512 GPUs"): (512, ()),
    ("h14", "clips, 512 GPUs"): (512, ()),
    ("s16", "clip, 64 GPUs"): (64, CLIP),
    ("h14", "clip, 64 GPUs"): (64, CLIP),
    ("b16", "caption, no checkpointing, 64 GPUs"): (64, (*captions_alone("caption"), WHOLE)),
    ("b16", "caption+web, no checkpointing, 64 GPUs"): (64, (*captions_alone("caption+web"), WHOLE)),
}
"""(recipe, its step in words) → GPUs and the fields of clips/config.py that are other than the recipe's."""


def agreements(names: Sequence[str] = TABLE) -> list[list[str]]:
    """Rows of the formula beside the rehearsal, for a rank without its optimizer."""
    rows = []
    for (name, step), (gpus, settings) in AGREEMENT.items():
        if name in names:
            run = recipe(name).override(["train.precision=bf16", *settings])
            phase = run.phases[0]
            micro = micro_batch_size(phase, run.train.accumulation, gpus)
            found = usage(run, fullest_shape(run, phase, micro, gpus), "cuda", {"stage": 0})
            planned = found.weights + found.batch + found.working
            rows.append(agreement(name, step, planned, rehearse(run, phase, gpus).peak))
    return rows


def asked_for(flags: argparse.Namespace) -> tuple[RunConfig, Machine]:
    """The run and the machines that the flags of scripts/plan_run.py describe."""
    if flags.gpus < 1 or not 0 < flags.mfu <= 1 or flags.samples < 1:
        raise UserError("--gpus and --samples must be at least 1, and --mfu above 0 and at most 1")
    if flags.engine is not None and flags.engine not in ENGINES:
        raise UserError(f"--engine {flags.engine!r} is not known; choose one of: {', '.join(ENGINES)}")
    run = recipe(flags.recipe).override(flags.set)
    return run, Machine(card(flags.kind), flags.gpus, flags.mfu, flags.price)


def image_tower(run: RunConfig) -> dict[str, Any]:
    """Its sizes by the names of transformers' configs, at the resolution of its export."""
    vision = run.model.vision
    return {
        "hidden_size": vision.width,
        "num_hidden_layers": vision.layers,
        "num_attention_heads": vision.heads,
        "intermediate_size": int(vision.width * vision.mlp_ratio),
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
    }


def print_pretraining(run: RunConfig, machine: Machine, engine: str | None) -> None:
    """The tables of a run; then UserError where it does not fit as it is."""
    if run.train.precision == "auto":
        run = replace(run, train=replace(run.train, precision="bf16"))
    head = ["engine", "checkpointing"]
    for phase in run.phases:
        micro = micro_batch_size(phase, run.train.accumulation, machine.gpus)
        head += [f"{phase.name}: {micro:,} at once, GB", "what fits"]
    title = f"{run.recipe} on {machine}: memory of one GPU (✗: too much)"
    print_table(title, [*head, "GB of a machine"], memory_rows(run, machine))
    found = plan(run, machine, engine=engine)
    rows = [
        [
            part.phase.name, part.fit.engine, f"{part.fit.accumulation} × {part.fit.micro:,}",
            f"{part.fit.usage.total / 1e9:.1f}", *part.time.cells(part.phase.batch_size, machine.gpus),
        ]
        for part in found.phases
    ]  # fmt: skip
    print_table("time", ("phase", "engine", "micro-batches", "GB", *TIME_HEAD), rows)
    print(totals(found), *(f"assumed, {line}" for line in assumptions(machine)), sep="\n")
