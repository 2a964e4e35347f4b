"""The plan of a pretraining run for scripts/plan_run.py: parameters, memory per rank, FLOPs per sample, days."""

from __future__ import annotations

import json
from typing import Any

from clips.common.errors import UserError
from clips.common.page import print_table
from clips.common.paths import DS_CONFIGS
from clips.common.peaks import USABLE, Machine
from clips.config import RunConfig
from clips.training.rehearsal import flops_per_sample, rehearse

HEAD = ("phase", "micro-batches", "memory per rank, GB", "GFLOP per sample", "steps", "days", "GPU hours")


def engine_settings(name: str) -> dict[str, Any]:
    """Read the `zero_optimization` of ds_configs/`name`.json. Raises UserError with the files that are there."""
    files = {path.stem: path for path in sorted(DS_CONFIGS.glob("zero*.json"))}
    if name not in files:
        raise UserError(f"--engine {name!r} is not known; choose one of: {', '.join(files)}")
    return json.loads(files[name].read_text(encoding="utf-8"))["zero_optimization"]


def print_pretraining(run: RunConfig, machine: Machine, engine: str) -> None:
    """Print a row for each phase of the run. Raises UserError, after the table, if a phase does not fit."""
    zero = engine_settings(engine)
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
    print_table(f"{run.recipe} on {machine} with ds_configs/{engine}.json", HEAD, rows)
    checkpoint = step.weights + step.state
    print(
        f"{step.parameters / 1e6:,.0f} M parameters train; {days:.1f} days, {24 * days * machine.gpus:,.0f} GPU hours; "
        f"{checkpoint / 1e9:.2g} GB per checkpoint, at most {run.train.keep_checkpoints + 1} of them on disk\n"
        f"assumed: {machine.mfu:.0%} of the GPUs' peak (--mfu), including what is computed twice; texts fill half of "
        "their context (for the memory all of it); training never waits for data"
    )
    if too_large:
        mend = f"--set train.accumulation={2 * accumulation} train.contrastive=global, --engine zero1, or more --gpus"
        raise UserError(f"phase {', '.join(too_large)} does not fit {USABLE:.0%} of a GPU's memory: try {mend}")
