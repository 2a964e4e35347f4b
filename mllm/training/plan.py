"""What a stage, or captioning pictures with its model, will take: memory, time, GPU hours, money; and a stage's plan.

`print_plan` shows a stage before it begins. `print_stages` and `print_recaptioning` plan for GPUs that are not here:
the model is built without weights, FLOPs are those of mllm/model/flops.py. Nothing here was measured on a GPU; the
assumptions are printed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from torch import nn
from transformers import (
    AutoConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    ViTConfig,
)

from clips.common.cards import CARDS, TIME_HEAD, Machine, Time
from clips.common.errors import UserError
from clips.common.escape import for_rich
from clips.common.memory import Parameters, gigabytes, held
from clips.common.page import print_table, table_of
from mllm.data.video import MOST_DRAWN, VIDEO
from mllm.model.flops import LlavaFlops, LlavaShape
from mllm.model.packing import can_pack
from mllm.model.quantize import stored_bytes
from mllm.model.tiles import MOST_TILES_WITH_VIDEO, Layout, Llava
from mllm.training.arguments import STAGE_FLAGS, TrainArguments
from mllm.training.freeze import apply_freeze, count_parameters, llava_of
from mllm.training.lora import add_lora
from mllm.training.stages import PARTS, STAGES, Training, freeze_table

FEW = 20
"""Optimizer steps below which the plan says that a stage learns next to nothing."""


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


@dataclass(frozen=True)
class StepBytes:
    """Bytes of activations of one step, by its moments. tests/rehearsal/test_llava.py compares them with rehearsals."""

    kept: int
    """For the backward pass, at the end of the forward pass."""
    loss: int
    """Beside `kept`, where the loss's gradient is made."""
    layers: int
    """Beside `kept`, where the last layer's gradients are made; without gradients of weights."""
    end: int
    """In place of `kept`, where the first layer's gradients are made; without gradients of weights."""
    first: int
    """In place of `kept`, where the word embeddings' gradient is made, the last of all; without gradients."""
    tower: int
    """Alone, before the others: the forward pass of a frozen encoder, which holds the states of all its layers."""
    depth: int
    """Layers of the language model."""

    @classmethod
    def of(
        cls, model: Llava, arguments: TrainArguments, *, length: int, learned: int, packed: bool | None = None
    ) -> StepBytes:
        """Of `per_device_train_batch_size` samples with `length` positions, `learned` of them labels, and a picture
        of the most squares. `packed`: whether batches are packed; if not given, as the language model allows.

        A layer keeps, per position: of each norm the fp32 input, and where its weight trains its result and output; of
        attention q, k, v, output and, for the last projection's weights, the packed output; of the MLP gate, up, their
        activation and, for weights that train, the product; with LoRA each adapter's input after dropout, the mask, and
        what comes out of its first half. Keys are repeated to all heads, and attention keeps its mask in the type of
        its inputs: packed rows with a shared beginning want both, and padded rows a mask for each sample. A single
        packed sample wants neither.
        A layer is fullest where gate and up get their gradients from that of their product. With LoRA it is fullest
        before, in the pass that checkpointing repeats: dropout then holds a copy of the product. In 8 bits the inputs
        of all linear layers stay to the end, checkpointing or not: bitsandbytes keeps them outside of autograd's store.
        """
        text, vision = model.config.get_text_config(), model.model.vision_tower.config
        samples, half = arguments.per_device_train_batch_size, bool(arguments.bf16)
        D, heads, e = text.hidden_size, text.num_attention_heads, 2 if half else 4
        H = heads * (getattr(text, "head_dim", None) or D // heads)
        ff = getattr(text, "intermediate_size", 4 * D)
        trains = arguments.stage == 2 and not arguments.freeze_backbone
        lora = trains and arguments.lora_enable
        full = trains and not lora
        packed = can_pack(text) if packed is None else packed
        masks = 0 if packed and samples == 1 else 1 if packed else samples
        keys = H if masks else H * (getattr(text, "num_key_value_heads", None) or heads) // heads
        layer = 2 * D * (4 + 2 * e * full) + e * ff * (3 + full) + e * (H * (2 + (full and packed)) + 2 * keys)
        if lora:
            layer += (e + 1) * (5 * D + H + ff) + 7 * e * arguments.lora_r
        tokens, words = samples * length, samples * learned
        layer += e * masks * -(-length // 16) * 16 // samples
        logits, norm = 4 * words * text.vocab_size, tokens * D * (4 + e * full)
        checkpointing = arguments.gradient_checkpointing
        kept = tokens * text.num_hidden_layers * (e * D if checkpointing else layer)
        kept += 0 if full else tokens * e * D  # the embeddings, into which the pictures' tokens were put
        made = tokens * e * (ff + 5 * D if lora else 3 * ff + D)
        made += e * D * ff if arguments.bits < 16 and not lora else 0  # a layer's weights in the type of its inputs
        inputs = tokens * text.num_hidden_layers * e * (2 * D + H + ff) if arguments.bits == 8 else 0
        layout = Layout.of(model.config)
        cells = samples * layout.square * layout.most_squares
        seen = 0 if arguments.caches_features else cells + samples * layout.most_squares  # with class tokens
        mlp = getattr(vision, "intermediate_size", 4 * vision.hidden_size)
        tower = seen * e * (vision.hidden_size * (vision.num_hidden_layers + 2) + 2 * mlp)
        pictures = cells * e * (vision.hidden_size + 2 * D)
        whole = tokens * (layer if checkpointing else 0)
        moment = max(tokens * 9 * e * D - logits, whole + made - logits - norm)
        kept, pictures = kept + logits + norm + pictures + inputs, pictures + inputs
        end, first = tokens * layer + made + pictures, tokens * e * D + pictures
        return cls(kept, 2 * logits, moment, end, first, tower, text.num_hidden_layers)

    def peak(self, gradients: int, head: int) -> int:
        """With all `gradients`, `head` of them the output layer's, which come first. The first layer's come last."""
        late = gradients - head - (gradients - head) // self.depth
        held = max(self.kept + self.loss, self.kept + self.layers + head, late + self.end, gradients + self.first)
        return max(held, self.tower)


def memory_estimate_gb(
    model: Llava,
    counts: dict[str, tuple[int, int]],
    arguments: TrainArguments,
    *,
    length: int,
    zero: int,
    world_size: int,
    learned: int | None = None,
) -> dict[str, float]:
    """Peak of one rank: what it holds from step to step, and the activations of a step (`StepBytes`).

    Trained weights are fp32 with autocast, or bf16 beside an fp32 copy under DeepSpeed. `learned`: labels of a sample,
    all positions if not given. ds_configs/ set `overlap_comm`.
    """
    half = bool(arguments.bf16)
    total, trained = (sum(count[i] for count in counts.values()) for i in (0, 1))
    element = 2 if half and zero else 4
    frozen_element: float = next(model.parameters()).itemsize if element == 4 else 2
    frozen = total - trained
    if arguments.bits < 16:
        modules = model.model.language_model.modules()  # bitsandbytes' layers are linear ones too
        layers = [m for m in modules if isinstance(m, nn.Linear) and not m.weight.requires_grad]
        stored = sum(stored_bytes(m, arguments.bits, double_quant=arguments.double_quant is not False) for m in layers)
        sizes = [m.in_features * m.out_features for m in layers]
        frozen_element = (frozen_element * (frozen - sum(sizes)) + stored) / frozen
    parameters = Parameters({"trained": trained}, frozen, element=element, frozen_element=frozen_element)
    found = held(parameters, {"stage": zero, "overlap_comm": True}, world_size)
    step = StepBytes.of(model, arguments, length=length, learned=length if learned is None else learned)
    head = element * model.lm_head.weight.numel() if trained > total / 2 else 0
    activations = step.peak(found.gradients, head) - found.gradients
    activations += found.reducing if parameters.trained > found.bucket else 0
    parts = {
        "weights": found.weights,
        "gradients and AdamW": found.gradients + found.optimizer,
        "activations": max(activations, found.reducing),
        "DeepSpeed's buffers": found.buffers,
    }
    return {name: size / 1e9 for name, size in parts.items() if size}


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
    table = []
    for part in PARTS:
        total, trained = counts[part]
        rate = "–" if freeze[part] == "frozen" else f"{arguments.rates[part]:g}"
        how = freeze[part] + (f", {arguments.bits} bits" if part == "language_model" and arguments.bits < 16 else "")
        table.append((part, how, f"{total / 1e6:.2f} M", f"{trained / 1e6:.3f} M" if trained else "0", rate))
    head = ("part", "trains", "parameters", "trained", "learning rate")
    console.print(table_of(f"stage {stage.number}: {stage.name}", head, table, names=2))
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
    if steps < FEW:
        more = "more --max_steps" if arguments.max_steps > 0 else "a smaller --batch_size, or more --num_train_epochs"
        facts["few steps"] = f"the model hardly changes: take {more}"
    facts["arithmetic"] = f"{'bf16' if arguments.bf16 else 'fp32'}, " + (f"ZeRO {zero}" if zero else "no ZeRO")
    facts["memory"] = (
        "about "
        + " + ".join(f"{gigabytes(1e9 * gb)} ({name})" for name, gb in memory.items())
        + f" = {gigabytes(1e9 * sum(memory.values()))} GB per rank, if every position is learned"
    )
    facts["writes to"] = str(Path(arguments.output_dir))
    facts["command"] = command_line(arguments, world_size)
    for name, value in facts.items():
        console.print(f"  [bold]{name:<16}[/] {for_rich(value)}", highlight=False, soft_wrap=True)


# --------------------------------------------------------------------------------------------- before there is a model

_WIDE: dict[str, Any] = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
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
    "qwen2.5-7b": {
        **{"model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28},
        **{"num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152_064},
    },
}
"""Sizes as published, fields of the config of `model_type`, which is llama if it is not given."""

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
    tiles: tuple[int, int] | None = None
    """Columns and rows of tiles beside the whole picture; None: a picture is one square."""
    frames: int = 0
    """Of a video; 0: none is trained on."""

    @classmethod
    def of(
        cls,
        language_model: str,
        vision: Mapping[str, Any],
        *,
        lora: bool,
        bits: Literal[4, 8, 16],
        tiles: str | None = None,
        frames: int = 0,
    ) -> Planned:
        """`tiles` like "2x2". UserError for other tiles and frames, and for a language model that is not known."""
        if language_model not in LANGUAGE_MODELS:
            known = ", ".join(LANGUAGE_MODELS)
            raise UserError(f"--language-model {language_model!r} is not known; choose one of: {known}")
        found = re.fullmatch(r"([1-6])x([1-6])", tiles or "1x1")
        if found is None:
            raise UserError(f"--tiles {tiles!r} must be columns x rows of tiles, from 1x1 to 6x6, such as 2x2")
        canvas = (int(found[1]), int(found[2])) if tiles else None
        if frames and (not 0 < frames <= MOST_DRAWN or canvas is None or math.prod(canvas) > MOST_TILES_WITH_VIDEO):
            raise UserError(
                f"--frames {frames} must be 0 to {MOST_DRAWN}, and needs --tiles of {MOST_TILES_WITH_VIDEO} at most: "
                "the stock class with videos sees pictures in tiles"
            )
        return cls(language_model, vision, lora or bits < 16, bits, canvas, frames)

    @property
    def layout(self) -> Layout:
        side = self.vision["image_size"]
        canvas = [(self.tiles[1] * side, self.tiles[0] * side)] if self.tiles else []
        return Layout((side // self.vision["patch_size"]) ** 2, side, tuple(canvas), self.frames)

    @property
    def image_tokens(self) -> int:
        """Of the picture or video with the most."""
        return self.layout.most

    def __str__(self) -> str:
        layout, pictures = self.layout, dataclasses.replace(self.layout, frames=0)
        tiles = f" in {self.tiles[0]} × {self.tiles[1]} tiles and whole" if self.tiles else ""
        video = f", {layout.tokens(VIDEO):,} a video of {self.frames} frames" if self.frames else ""
        return f"{self.language_model} with {pictures.most:,} tokens a picture{tiles}{video}"

    def build(self, device: str = "meta") -> Llava:
        """In bf16, and nothing of it trains: without weights, or with random weights on another `device`."""
        fields = {"model_type": "llama"} | LANGUAGE_MODELS[self.language_model]
        text = AutoConfig.for_model(**fields)
        vision = ViTConfig(**self.vision)
        parts: dict[str, Any] = {"vision_config": vision, "text_config": text, "image_seq_length": self.layout.square}
        pinpoints = [list(canvas) for canvas in self.layout.pinpoints]
        with torch.device(device):
            if self.frames:
                del parts["image_seq_length"]
                parts |= {"vision_feature_layer": -2, "vision_feature_select_strategy": "default"}
                parts["num_frames"] = self.frames  # a field of our own, which the class keeps
                videos = LlavaOnevisionConfig(**parts, image_grid_pinpoints=pinpoints)
                model: nn.Module = LlavaOnevisionForConditionalGeneration(videos)
            elif pinpoints:
                config = LlavaNextConfig(**parts, image_grid_pinpoints=pinpoints)
                model = LlavaNextForConditionalGeneration(config)
            else:
                model = LlavaForConditionalGeneration(LlavaConfig(**parts))
        model.to(torch.bfloat16).requires_grad_(False)
        return llava_of(model)

    def flops(self, model: Llava) -> LlavaFlops:
        size = self.vision["image_size"]
        return LlavaFlops(model, image_size=size, image_tokens=self.layout.square, features=False)


@dataclass(frozen=True)
class StagePlan:
    arguments: TrainArguments
    memory_gb: float
    time: Time


def plan_stage(planned: Planned, machine: Machine, number: int, *, propose: bool = True) -> StagePlan:
    """With the largest micro-batch, up to 16, that fits; UserError where not even one sample does.

    `propose`: the error names the changes with which the stage fits.
    """
    stage, model = STAGES[number], planned.build()
    length = planned.image_tokens + WORDS[number]
    shape = LlavaShape(samples=1, length=length, pictures=planned.layout.most_squares, predicted=ANSWERS[number])
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
        memory = memory_estimate_gb(
            model, counts, arguments, length=length, zero=zero, world_size=machine.gpus, learned=ANSWERS[number]
        )
        if 1e9 * sum(memory.values()) <= machine.card.usable:
            break
    else:
        raise UserError(
            f"stage {number} of {planned} does not fit {machine} ({machine.card.usable / 1e9:.0f} GB usable): one "
            f"sample at a time takes {', '.join(f'{gb:.1f} GB {name}' for name, gb in memory.items())}. It fits with "
            + (", or ".join(_that_fit(planned, machine, number) if propose else ()) or "a smaller --language-model")
        )
    passes = arguments.gradient_accumulation_steps
    flops = sum(planned.flops(model)(shape).values()) + repeated
    total, trained = (sum(count[i] for count in counts.values()) for i in (0, 1))
    # In bf16. ZeRO-2 reduces in each backward pass; ZeRO-3 gathers all weights in each pass, forward and backward.
    moved = 2 * (passes * (trained + 2 * total) if zero == 3 else (passes + 1) * trained)
    return StagePlan(
        arguments=arguments,
        memory_gb=sum(memory.values()),
        time=Time(
            steps=steps_of(arguments, SAMPLES[number], machine.gpus),
            compute_s=micro * passes * flops / machine.speed,
            communication_s=machine.collective_seconds(moved),
        ),
    )


def _that_fit(planned: Planned, machine: Machine, number: int) -> Iterator[str]:
    """The single changes with which a stage fits; of GPUs the fewest, of kinds that with the least memory."""
    adapters = dataclasses.replace(planned, lora=True)
    quantised = {f"--bits {bits}": (dataclasses.replace(adapters, bits=bits), machine) for bits in (8, 4)}
    more = [dataclasses.replace(machine, gpus=gpus) for gpus in (2, 4, 8, 16, 32, 64) if gpus > machine.gpus]
    cards = sorted(CARDS.items(), key=lambda named: named[1].memory_gb)
    larger = {name: card for name, card in cards if card.memory_gb > machine.card.memory_gb}
    for ways in (
        {"--lora": (adapters, machine)} if not planned.lora else {},
        {flag: way for flag, way in quantised.items() if way[0].bits < planned.bits},
        {f"--gpus {machines.gpus}": (planned, machines) for machines in more},
        {f"--kind {name}": (planned, dataclasses.replace(machine, card=card)) for name, card in larger.items()},
    ):
        for flag, way in ways.items():
            with contextlib.suppress(UserError):
                plan_stage(*way, number, propose=False)
                yield flag
                break


def _arguments(planned: Planned, machine: Machine, number: int, micro: int) -> TrainArguments:
    """LLaVA-1.5's, on its own data; UserError where its batch cannot be cut so."""
    arguments = TrainArguments(
        stage=number,
        data_path="data.json",
        bits=planned.bits,
        per_device_train_batch_size=micro,
        bf16=True,
        gradient_checkpointing=True,
        feature_cache=False,
    )
    if planned.lora and number == 2:
        arguments = dataclasses.replace(arguments, lora_enable=True)
    return arguments.resolve(machine.gpus)


def print_stages(planned: Planned, machine: Machine) -> None:
    """Both stages of LLaVA-1.5; UserError where one does not fit."""
    plans = [plan_stage(planned, machine, number) for number in STAGES]
    rows = [
        [
            plan.arguments.description.name,
            f"{plan.arguments.gradient_accumulation_steps} × {plan.arguments.per_device_train_batch_size}",
            f"{plan.memory_gb:.1f}",
            *plan.time.cells(plan.arguments.batch_size, machine.gpus),
        ]
        for plan in plans
    ]
    print_table(f"{planned} on {machine}", ("stage", "micro-batches", "GB a GPU", *TIME_HEAD), rows)
    hours = sum(plan.time.hours for plan in plans) * machine.gpus
    print(f"{hours:,.0f} GPU hours{machine.cost(hours)}", *_assumptions(machine), sep="\n")
    print(
        f"assumed, data: LLaVA-1.5's {SAMPLES[1]:,} and {SAMPLES[2]:,} samples of {WORDS[1]} and {WORDS[2]} tokens "
        f"beside the picture, of which {ANSWERS[1]} and {ANSWERS[2]} are learned; the encoder runs in every step"
    )


def caption_flops(flops: LlavaFlops, layout: Layout) -> float:
    """Of one caption of an assumed length."""
    length = layout.most + PROMPT + CAPTION
    shape = LlavaShape(samples=1, length=length, pictures=layout.most_squares, predicted=CAPTION)
    return sum(flops(shape).values())


def print_recaptioning(planned: Planned, machine: Machine, samples: int) -> None:
    """Captions of `samples` pictures; UserError where the weights leave no room for one."""
    model = planned.build()
    length = planned.image_tokens + PROMPT + CAPTION
    each = caption_flops(planned.flops(model), planned.layout)
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
    memory = "memory: StepBytes of mllm/training/plan.py; communication in bf16"
    return [f"assumed, {line}" for line in (*machine.rates, memory)]
