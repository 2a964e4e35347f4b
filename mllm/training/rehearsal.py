"""Forward and backward pass of a LLaVA stage on torch's device "meta": what they take on a GPU, without one.

As clips/training/rehearsal.py for pretraining. The weights are bf16, as DeepSpeed trains them. The vision encoder is
CLIP's L/14 at 336 pixels, as LLaVA-1.5's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from clips.common.rehearsal import META, Rehearsal, agreement
from mllm.model.packing import Counts
from mllm.model.quantize import quantize
from mllm.model.tiles import Layout, Llava
from mllm.training.arguments import TrainArguments
from mllm.training.freeze import apply_freeze
from mllm.training.lora import add_lora
from mllm.training.plan import ANSWERS, LANGUAGE_MODELS, WORDS, Planned, StepBytes
from mllm.training.stages import STAGES, freeze_table
from mllm.training.trainer import TrainingModel

TOWER = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
TOWER |= {"image_size": 336, "patch_size": 14}
AGREEMENT: dict[tuple[str, str], tuple[int, dict[str, Any]]] = {
    **{(name, "stage 2"): (2, {}) for name in LANGUAGE_MODELS},
    ("vicuna-7b", "stage 1"): (1, {}),
    ("qwen2.5-7b", "stage 2, LoRA, no checkpointing"): (2, {"lora": True, "checkpointing": False}),
    ("smollm2-135m", "stage 1, videos of 32 frames"): (1, {"sees": {"tiles": "2x2", "frames": 32}}),
}
"""(language model, its step in words) → stage and arguments of `made`."""


def agreements(names: Sequence[str] = tuple(LANGUAGE_MODELS)) -> list[list[str]]:
    """Rows of the formula beside the rehearsal, for a rank without its optimizer: four samples of stage 2's length."""
    rows = []
    for (name, step), (stage, how) in AGREEMENT.items():
        if name in names:
            training, arguments = made(name, stage, **how)
            rehearsal, there = stepped(training, batch_of(training, 4))
            rows.append(agreement(name, step, there + planned(training, arguments), rehearsal.peak))
    return rows


def planned(training: TrainingModel, arguments: TrainArguments) -> int:
    """What the formula says of activations and gradients."""
    length = Layout.of(training.llava.config).most + WORDS[2]
    step = StepBytes.of(training.llava, arguments, length=length, learned=ANSWERS[2], packed=training.packed)
    gradients = 2 * sum(p.numel() for p in training.parameters() if p.requires_grad)
    head = training.llava.lm_head.weight
    return step.peak(gradients, 2 * head.numel() if head.requires_grad else 0)


def made(
    name: str,
    stage: int,
    *,
    lora: bool = False,
    checkpointing: bool = True,
    bits: Literal[4, 8, 16] = 16,
    sees: dict[str, Any] | None = None,
    **kinds: bool,
) -> tuple[TrainingModel, TrainArguments]:
    """A stage's model without weights, for micro-batches of 4. `kinds`: features (cached), tower (trained), padded."""
    model = Planned.of(name, TOWER, lora=lora, bits=16, **sees or {}).build()
    if bits < 16:
        quantize(model.model.language_model, bits, torch.bfloat16, META)
    training, arguments = staged(model, stage, lora=lora, checkpointing=checkpointing, **kinds)
    return training.to(torch.bfloat16), replace(arguments, per_device_train_batch_size=4)


def staged(
    model: Llava,
    stage: int,
    *,
    lora: bool,
    checkpointing: bool = True,
    features: bool = False,
    tower: bool = False,
    padded: bool = False,
) -> tuple[TrainingModel, TrainArguments]:
    """A stage's model made of `model`, as mllm/training/prepare.py makes it, and its arguments."""
    arguments = TrainArguments(stage=stage, data_path="data.json", lora_enable=lora, bf16=True).resolve(1)
    arguments = replace(arguments, gradient_checkpointing=checkpointing, feature_cache=features)
    if checkpointing:
        model.model.language_model.activation_checkpointing_enable({"use_reentrant": False})
    with torch.device(model.device):
        whole: nn.Module = add_lora(model, arguments) if lora else model
    apply_freeze(whole, freeze_table(STAGES[stage], lora=lora, unfreeze_mm_vision_tower=tower))
    return TrainingModel(whole, features=features, packed=not padded).train(), arguments


def batch_of(training: TrainingModel, samples: int, *, stage: int = 2, pictures: bool = True) -> dict[str, Any]:
    """A batch of random values on the model's device, counted on the host before as the Trainer's.

    All samples begin with one common token.
    """
    config, layout, device = training.llava.config, Layout.of(training.llava.config), training.llava.device
    vision: Any = config.vision_config
    tokens, squares = layout.most, samples * layout.most_squares
    length = tokens + WORDS[stage]
    ids = torch.randint(3, 90, (samples, length))
    ids[:, 0], ids[:, 1] = 7, 8 + torch.arange(samples)
    if pictures:
        ids[:, 10 : 10 + tokens] = config.image_token_id
    labels = ids.masked_fill(torch.arange(length) < length - ANSWERS[stage], -100)
    batch: dict[str, Any] = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
    counts = Counts.of(batch, config.image_token_id)
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    half: dict[str, Any] = {"dtype": training.llava.dtype, "device": device}
    if pictures and training.features:
        batch["image_features"] = torch.randn(squares, layout.square, vision.hidden_size, **half)
    elif pictures:
        batch["pixel_values"] = torch.randn(squares, 3, vision.image_size, vision.image_size, **half)
    batch |= {"image_sizes": [max(layout.sizes, key=layout.tokens)] * samples} if layout.pinpoints else {}
    return batch | {"counts": counts, "num_items_in_batch": torch.tensor(samples * ANSWERS[stage], device=device)}


def stepped(training: TrainingModel, batch: dict[str, Any]) -> tuple[Rehearsal, int]:
    """The rehearsal of forward and backward pass, and the bytes that are there before."""
    with Rehearsal() as rehearsal:
        tensors = [x for x in batch.values() if isinstance(x, torch.Tensor)]
        there = rehearsal.hold([*training.parameters(), *training.buffers(), *tensors])
        training(**batch)["loss"].backward()
    return rehearsal, there
