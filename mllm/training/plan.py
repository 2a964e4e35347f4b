"""The plan of a stage before it begins: the freeze table, the steps, and the command that gives the same run again."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

from rich.console import Console

from clips.common.escape import for_rich
from clips.common.page import table_of
from mllm.data.captions import CaptionStore
from mllm.training.arguments import STAGE_FLAGS, TrainArguments
from mllm.training.freeze import count_parameters
from mllm.training.prepare import Prepared
from mllm.training.stages import PARTS
from mllm.training.task import steps_of

FEW = 20
"""Number of optimizer steps below which the plan says that a stage learns next to nothing."""


def command_line(arguments: TrainArguments, world_size: int) -> str:
    """Return the command of this stage, with every flag that differs from the parser's default."""
    words = ["deepspeed", f"--num_gpus={world_size}"] if world_size > 1 else ["python"]
    words += ["scripts/train_llava.py", "--stage", str(arguments.stage)]
    for field in dataclasses.fields(TrainArguments):
        value = getattr(arguments, field.name)
        others = STAGE_FLAGS[3 - arguments.stage]
        if value is None or value == field.default or field.name in ("stage", "dry_run", *others):
            continue
        words += [f"--{field.name}", *map(str, value if isinstance(value, tuple) else [value])]
    return shlex.join(words)


def print_plan(prepared: Prepared, ranks: int, console: Console) -> None:
    """Print the freeze table with counts and rates, then what else matters."""
    arguments = prepared.arguments
    freeze = prepared.freeze
    samples = len(prepared.dataset)
    stage = arguments.description
    counts = count_parameters(prepared.model)
    table = []
    for part in PARTS:
        total, trained = counts[part]
        rate = "–" if freeze[part] == "frozen" else f"{arguments.rates[part]:g}"
        how = freeze[part] + (f", {arguments.bits} bits" if part == "language_model" and arguments.bits < 16 else "")
        table.append((part, how, f"{total / 1e6:.2f} M", f"{trained / 1e6:.3f} M" if trained else "0", rate))
    head = ("part", "trains", "parameters", "trained", "learning rate")
    console.print(table_of(f"stage {stage.number}: {stage.name}", head, table, names=2))
    steps = steps_of(arguments, samples)
    batch = f"{ranks} × {arguments.gradient_accumulation_steps} × {arguments.per_device_train_batch_size}"
    facts = dict(prepared.facts)
    facts["steps"] = (
        f"{steps:,} of {arguments.batch_size} samples ({batch}: ranks, accumulation, micro-batch) = "
        f"{steps * arguments.batch_size:,} samples, {steps * arguments.batch_size / samples:.1f} epochs"
    )
    if steps < FEW:
        more = "more --max_steps" if arguments.max_steps > 0 else "a smaller --batch_size, or more --num_train_epochs"
        facts["few steps"] = f"the model hardly changes: take {more}"
    if stage.number == 2 and arguments.small and isinstance(prepared.store, CaptionStore):
        facts["to expect"] = (
            "short sentences in the words of these captions. It mentions what many captions do, and invents the rest. "
            "For more take published encoders and models, --vision hf:… --model_name_or_path …, without --small"
        )
    if stage.number == 1 and arguments.reader == "none" and "layers" in facts.get("language model", ""):
        facts["loss"] = "begins at 17 to 20, not at 5 to 8: the cut language model is wrong until stage 2 trains it"
    facts["arithmetic"] = f"{'bf16' if arguments.bf16 else 'fp32'}, " + (
        f"ZeRO {prepared.zero}" if prepared.zero else "no ZeRO"
    )
    facts["writes to"] = str(Path(arguments.output_dir))
    facts["command"] = command_line(arguments, ranks)
    for name, value in facts.items():
        console.print(f"  [bold]{name:<16}[/] {for_rich(value)}", highlight=False, soft_wrap=True)
