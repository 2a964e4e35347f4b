"""What a stage is about to do, for a person to read before it does it: parts, rates, steps, memory, the command."""

from __future__ import annotations

import dataclasses
import math
import shlex
from pathlib import Path

from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import LlavaForConditionalGeneration

from clips.common.escape import for_rich
from mllm.training.arguments import STAGE_FLAGS, TrainArguments
from mllm.training.freeze import count_parameters, learning_rates, llava_of
from mllm.training.stages import PARTS, Training

BUCKET = 500_000_000
"""Elements of DeepSpeed's reduce_bucket_size."""
LIVE = 1_000_000_000
"""Parameters that ZeRO-3 leaves gathered, its stage3_max_live_parameters."""


def command_line(arguments: TrainArguments, world_size: int) -> str:
    """The command of this stage, with every flag that is not the parser's own default."""
    words = ["deepspeed", f"--num_gpus={world_size}"] if world_size > 1 else ["python"]
    words += ["scripts/train_llava.py", "--stage", str(arguments.stage)]
    for field in dataclasses.fields(TrainArguments):
        value = getattr(arguments, field.name)
        others = STAGE_FLAGS[3 - arguments.stage]
        if value is None or value == field.default or field.name in ("stage", "dry_run", *others):
            continue
        words += [f"--{field.name}", str(value)]
    return shlex.join(words)


def steps_of(arguments: TrainArguments, samples: int, world_size: int) -> int:
    """Optimizer steps, counted as the Trainer counts them."""
    if arguments.max_steps > 0:
        return arguments.max_steps
    batches = math.ceil(samples / (arguments.per_device_train_batch_size * world_size))
    per_epoch = math.ceil(batches / arguments.gradient_accumulation_steps)
    return math.ceil(arguments.num_train_epochs * per_epoch)


def memory_estimate_gb(
    model: LlavaForConditionalGeneration,
    counts: dict[str, tuple[int, int]],
    arguments: TrainArguments,
    *,
    length: int,
    zero: int,
    world_size: int,
) -> dict[str, float]:
    """Rough peak of one rank: weights, gradients with AdamW's state, activations of one forward pass.

    Trained weights are fp32 with autocast (4 + 4 + 8 bytes), or under DeepSpeed with bf16 2 bytes with 2 + 12 more.
    Activations: 34 bytes per token, layer and unit of width in bf16 (Korthikanti et al. 2022, section 4.1, without
    the attention matrix), twice that in fp32; with checkpointing the layers' inputs and one whole layer. DeepSpeed's
    buffers have the size of its defaults, whatever the model's: two to reduce gradients in (with `overlap_comm`, as in
    ds_configs/), in ZeRO-3 one, and the weights that it leaves gathered.
    """
    text = model.config.get_text_config()
    half = bool(arguments.bf16)
    trained = sum(count for _, count in counts.values())
    frozen = sum(total for total, _ in counts.values()) - trained
    frozen_bytes = (
        arguments.bits / 8 if arguments.bits < 16 else 2 if half and zero else next(model.parameters()).itemsize
    )
    weights = frozen * frozen_bytes + trained * (2 if half and zero else 4)
    state = trained * (14 if half and zero else 12)
    per_layer = 34 * (1 if half else 2)
    layers = text.num_hidden_layers
    factor = (2 * layers + per_layer) if arguments.gradient_checkpointing else per_layer * layers
    activations = arguments.per_device_train_batch_size * length * text.hidden_size * factor
    parts = {
        "weights": weights / (world_size if zero == 3 else 1) / 1e9,
        "gradients and AdamW": state / (world_size if zero else 1) / 1e9,
        "activations": activations / 1e9,
    }
    if zero:
        elements = BUCKET + min(trained + frozen, LIVE) if zero == 3 else 2 * BUCKET
        parts["DeepSpeed's buffers"] = elements * (2 if half else 4) / 1e9
    return parts


def print_plan(
    arguments: TrainArguments,
    model: nn.Module,
    freeze: dict[str, Training],
    rows: dict[str, str],
    *,
    samples: int,
    length: int,
    zero: int,
    world_size: int,
    console: Console,
) -> None:
    """The freeze table with counts and rates, then what else matters; `rows` come first."""
    stage = arguments.description
    counts = count_parameters(model)
    table = Table(title=f"stage {stage.number}: {stage.name}", title_justify="left")
    for column in ("part", "trains", "parameters", "trained", "learning rate"):
        table.add_column(column, justify="left" if column in ("part", "trains") else "right")
    rates = learning_rates(arguments.learning_rate, arguments.mm_projector_lr, arguments.mm_vision_tower_lr)
    for part in PARTS:
        total, trained = counts[part]
        rate = "–" if freeze[part] == "frozen" else f"{rates[part]:g}"
        how = freeze[part] + (f", {arguments.bits} bits" if part == "language_model" and arguments.bits < 16 else "")
        table.add_row(part, how, f"{total / 1e6:.2f} M", f"{trained / 1e6:.3f} M" if trained else "0", rate)
    console.print(table)
    memory = memory_estimate_gb(llava_of(model), counts, arguments, length=length, zero=zero, world_size=world_size)
    steps = steps_of(arguments, samples, world_size)
    batch = " × ".join(
        map(str, (world_size, arguments.gradient_accumulation_steps, arguments.per_device_train_batch_size))
    )
    facts = dict(rows)
    facts["steps"] = (
        f"{steps:,} of {arguments.batch_size} samples ({batch}: ranks, accumulation, micro-batch) = "
        f"{steps * arguments.batch_size:,} samples, {steps * arguments.batch_size / samples:.1f} epochs"
    )
    facts["arithmetic"] = f"{'bf16' if arguments.bf16 else 'fp32'}, " + (f"ZeRO {zero}" if zero else "no ZeRO")
    facts["memory"] = (
        "about "
        + " + ".join(f"{gb:.1f} ({name})" for name, gb in memory.items())
        + f" = {sum(memory.values()):.1f} GB per rank (rough)"
    )
    facts["writes to"] = str(Path(arguments.output_dir))
    facts["command"] = command_line(arguments, world_size)
    for name, value in facts.items():
        console.print(f"  [bold]{name:<16}[/] {for_rich(value)}", highlight=False, soft_wrap=True)
