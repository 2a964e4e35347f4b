"""What both LLaVA stages, and captioning pictures with such a model, take on GPUs: memory, time, GPU hours, money.

The model is built without weights; FLOPs are those of mllm/model/flops.py, memory that of the plan which every stage
prints (mllm/training/plan.py). Nothing here was measured on a GPU; what is assumed is printed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, ViTConfig

from clips.common.cards import BUS, PER_MACHINE, Machine
from clips.common.errors import UserError
from clips.common.page import print_table
from mllm.model.flops import LlavaFlops, LlavaShape
from mllm.training.arguments import TrainArguments
from mllm.training.freeze import apply_freeze, count_parameters, llava_of
from mllm.training.lora import add_lora
from mllm.training.plan import memory_estimate_gb, steps_of
from mllm.training.stages import STAGES, freeze_table

_WIDE = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
LANGUAGE_MODELS: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        **{"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9},
        **{"num_key_value_heads": 3, "vocab_size": 49_152, "tie_word_embeddings": True},
    },
    "vicuna-7b": {**_WIDE, "intermediate_size": 11_008, "vocab_size": 32_000},
    "vicuna-13b": {
        **{"hidden_size": 5120, "intermediate_size": 13_824, "num_hidden_layers": 40, "num_attention_heads": 40},
        "vocab_size": 32_000,
    },
    "llama3-8b": {**_WIDE, "intermediate_size": 14_336, "num_key_value_heads": 8, "vocab_size": 128_256},
}
"""Sizes as published, fields of LlamaConfig."""

SAMPLES = {1: 558_128, 2: 665_298}
"""Of LLaVA-1.5's two stages."""
WORDS = {1: 30, 2: 250}
"""Tokens of a sample beside its picture; rough figures for that data."""
ANSWERS = {1: 20, 2: 150}
"""Those of them that are learned."""
PROMPT, CAPTION = 40, 100
"""Tokens of the instruction and of the caption, in recaptioning."""
GENERATION = 0.5
"""Share of the training's speed at which captions are generated: it is bound by reading weights and cache."""


@dataclass(frozen=True)
class Planned:
    """A model to be."""

    language_model: str
    vision: Mapping[str, Any]
    """Fields of ViTConfig, all of them numbers."""
    lora: bool
    bits: Literal[4, 8, 16]

    @classmethod
    def of(cls, language_model: str, vision: Mapping[str, Any], *, lora: bool, bits: Literal[4, 8, 16]) -> Planned:
        """UserError for a language model that is not known."""
        if language_model not in LANGUAGE_MODELS:
            known = ", ".join(LANGUAGE_MODELS)
            raise UserError(f"--language-model {language_model!r} is not known; choose one of: {known}")
        return cls(language_model, vision, lora or bits < 16, bits)

    @property
    def image_tokens(self) -> int:
        return (self.vision["image_size"] // self.vision["patch_size"]) ** 2

    def __str__(self) -> str:
        return f"{self.language_model} with {self.image_tokens} tokens a picture"

    def build(self) -> LlavaForConditionalGeneration:
        """Without weights, in bf16, and nothing of it trains."""
        text = LlamaConfig(**LANGUAGE_MODELS[self.language_model])
        config = LlavaConfig(vision_config=ViTConfig(**self.vision), text_config=text)
        with torch.device("meta"):
            model: nn.Module = LlavaForConditionalGeneration(config)
        model.to(torch.bfloat16).requires_grad_(False)
        return llava_of(model)

    def flops(self, model: LlavaForConditionalGeneration) -> LlavaFlops:
        size = self.vision["image_size"]
        return LlavaFlops(model, image_size=size, image_tokens=self.image_tokens, features=False)


@dataclass(frozen=True)
class StagePlan:
    arguments: TrainArguments
    memory_gb: float
    steps: int
    compute_s: float
    communication_s: float
    """Of one optimizer step each."""

    @property
    def hours(self) -> float:
        return self.steps * (self.compute_s + self.communication_s) / 3600


def plan_stage(planned: Planned, machine: Machine, number: int) -> StagePlan:
    """With the largest micro-batch, up to 16, that fits; UserError where not even one sample does."""
    stage, model = STAGES[number], planned.build()
    length = planned.image_tokens + WORDS[number]
    shape = LlavaShape(samples=1, length=length, pictures=1, predicted=ANSWERS[number])
    repeated = planned.flops(model)(shape)["language_model"]  # gradient checkpointing runs its layers twice
    freeze = freeze_table(stage, lora=planned.lora, bits=planned.bits)
    whole = add_lora(model, _arguments(planned, machine, number, 1)) if freeze["language_model"] == "lora" else model
    apply_freeze(whole, freeze)
    counts, zero = count_parameters(whole), 0
    if machine.gpus > 1:
        zero = 2 if planned.bits < 16 else stage.zero
    share = stage.llava["batch_size"] // machine.gpus
    for micro in (size for size in range(min(16, share), 0, -1) if share % size == 0):
        arguments = _arguments(planned, machine, number, micro)
        memory = memory_estimate_gb(model, counts, arguments, length=length, zero=zero, world_size=machine.gpus)
        if 1e9 * sum(memory.values()) <= machine.card.usable:
            break
    else:
        raise UserError(
            f"stage {number} of {planned} does not fit {machine} ({machine.card.usable / 1e9:.0f} GB usable): one "
            f"sample at a time takes {', '.join(f'{gb:.1f} GB {name}' for name, gb in memory.items())}. Try --lora, "
            "--bits 4, more --gpus, or a --kind with more memory"
        )
    passes = arguments.gradient_accumulation_steps
    flops = sum(planned.flops(model)(shape).values()) + repeated
    total, trained = (sum(count[i] for count in counts.values()) for i in (0, 1))
    # In bf16. ZeRO-2 reduces in each backward pass; ZeRO-3 gathers all weights in each pass, forward and backward.
    moved = 2 * (passes * (trained + 2 * total) if zero == 3 else (passes + 1) * trained)
    return StagePlan(
        arguments=arguments,
        memory_gb=sum(memory.values()),
        steps=steps_of(arguments, SAMPLES[number], machine.gpus),
        compute_s=micro * passes * flops / machine.speed,
        communication_s=machine.collective_seconds(moved),
    )


def _arguments(planned: Planned, machine: Machine, number: int, micro: int) -> TrainArguments:
    """LLaVA-1.5's, on its own data; UserError where its batch cannot be cut so."""
    lora: Any = (planned.lora and number == 2) or None  # None: as --bits says
    return TrainArguments(
        stage=number,
        data_path="data.json",
        bits=planned.bits,
        lora_enable=lora,
        per_device_train_batch_size=micro,
        bf16=True,
        gradient_checkpointing=True,
    ).resolve(machine.gpus)


def print_stages(planned: Planned, machine: Machine) -> None:
    """Both stages of LLaVA-1.5; UserError where one does not fit."""
    plans = [plan_stage(planned, machine, number) for number in STAGES]
    rows = []
    for plan in plans:
        arguments, step = plan.arguments, plan.compute_s + plan.communication_s
        rows.append([
            arguments.description.name,
            f"{arguments.gradient_accumulation_steps} × {arguments.per_device_train_batch_size}",
            f"{plan.memory_gb:.1f}", f"{plan.steps:,}", f"{step:.2f}", f"{plan.communication_s / step:.0%}",
            f"{arguments.batch_size / step / machine.gpus:.1f}", f"{plan.hours:.1f}",
            f"{plan.hours * machine.gpus:,.0f}",
        ])  # fmt: skip
    head = ("stage", "micro-batches", "GB a GPU", "steps", "step, s", "of it communication", "samples/s/GPU", "hours",
            "GPU hours")  # fmt: skip
    print_table(f"{planned} on {machine}", head, rows)
    hours = sum(plan.hours for plan in plans) * machine.gpus
    print(f"{hours:,.0f} GPU hours{machine.cost(hours)}", *_assumptions(machine), sep="\n")
    print(
        f"assumed, data: LLaVA-1.5's {SAMPLES[1]:,} and {SAMPLES[2]:,} samples of {WORDS[1]} and {WORDS[2]} tokens "
        f"beside the picture, of which {ANSWERS[1]} and {ANSWERS[2]} are learned; the encoder runs in every step"
    )


def caption_flops(flops: LlavaFlops, image_tokens: int) -> float:
    """Of one caption of an assumed length."""
    length = image_tokens + PROMPT + CAPTION
    return sum(flops(LlavaShape(samples=1, length=length, pictures=1, predicted=CAPTION)).values())


def print_recaptioning(planned: Planned, machine: Machine, samples: int) -> None:
    """Captions of `samples` pictures; UserError where the weights leave no room for one."""
    model = planned.build()
    length = planned.image_tokens + PROMPT + CAPTION
    each = caption_flops(planned.flops(model), planned.image_tokens)
    text = model.config.get_text_config()
    weights = sum(count for count, _ in count_parameters(model).values()) * 2
    cache = 2 * 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * length
    room = int((machine.card.usable - weights) // cache)
    if room < 1:
        raise UserError(
            f"{planned} does not fit a {machine.card.name} of {machine.card.memory_gb:g} GB: its weights take "
            f"{weights / 1e9:.1f} GB in bf16. Choose a --kind with more memory or a smaller --language-model"
        )
    seconds = samples * each / (machine.speed * GENERATION * machine.gpus)
    hours = seconds / 3600 * machine.gpus
    row = [f"{each / 1e12:.2f}", f"{weights / 1e9:.1f}", f"{room:,}",
           f"{samples / seconds / machine.gpus:.1f}", f"{seconds / 86_400:.1f}", f"{hours:,.0f}"]  # fmt: skip
    head = ("TFLOP a caption", "weights, GB", "captions at once", "captions/s/GPU", "days", "GPU hours")
    print_table(f"{samples:,} captions by {planned} on {machine}", head, [row])
    print(f"{hours:,.0f} GPU hours{machine.cost(hours)}", *_assumptions(machine), sep="\n")
    print(
        f"assumed, captions: {PROMPT} tokens of instruction and {CAPTION} of caption; generating runs at "
        f"{GENERATION:.0%} of --mfu, since each token reads weights and cache; one copy of the model a GPU, in bf16"
    )


def _assumptions(machine: Machine) -> list[str]:
    return [
        f"assumed, speed: {machine.mfu:.0%} of {machine.card.peak / 1e12:.0f} TFLOP/s (--mfu); what checkpointing "
        "computes again comes on top",
        "assumed, memory: that of the plan which a stage prints, which is rough (mllm/training/plan.py)",
        f"assumed, communication: bf16, ring collectives at {BUS:.0%} of {machine.card.link_gb_s:g} GB/s inside a "
        f"machine of {PER_MACHINE} and of {machine.card.network_gb_s:g} GB/s between machines, not behind computation",
    ]
