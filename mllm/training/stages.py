"""The two stages of LLaVA: what each trains (the freeze table), at which rates, and the check that it is so.

The table below is the only place where this is decided; every run prints it, and asserts it before the first step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from transformers import LlavaForConditionalGeneration

from clips.common.errors import UserError
from mllm.model.projector import trainable_layers

Training = Literal["frozen", "full", "lora"]
PARTS = ("vision_tower", "projector", "language_model")
"""Every parameter is in exactly one; output layer and word embeddings belong to the language model."""
FREEZE: dict[str, dict[str, Training]] = {
    "align": {"vision_tower": "frozen", "projector": "full", "language_model": "frozen"},
    "instruct": {"vision_tower": "frozen", "projector": "full", "language_model": "full"},
    "instruct, lora": {"vision_tower": "frozen", "projector": "full", "language_model": "lora"},
}
"""Stage → what trains in it. Flags move single entries: see `freeze_plan`."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage and what its flags are when they are not given."""

    number: int
    name: str
    zero: int
    """ZeRO stage where there are several ranks: ds_configs/llava_zero{zero}.json."""
    llava: dict[str, Any]
    """LLaVA-1.5's recipe."""
    lora: dict[str, Any]
    """What LLaVA-1.5 changes for LoRA."""
    demo: dict[str, Any]
    """What the embedded demo (64 px scenes, SmolLM2-135M, a few CPU minutes) changes."""


STAGES = {
    1: Stage(
        number=1,
        name="align",
        zero=2,
        llava={
            "version": "plain",
            "learning_rate": 1e-3,
            "batch_size": 256,
            "image_aspect_ratio": "square",
            "mm_vision_select_layer": -2,
            "mm_projector_init": "random",
        },
        lora={},
        demo={
            "learning_rate": 1e-4,
            "batch_size": 32,
            "per_device_train_batch_size": 32,
            "max_steps": 20,
            "mm_vision_select_layer": -1,
            "mm_projector_init": "captions",
        },
    ),
    2: Stage(
        number=2,
        name="instruct",
        zero=3,
        llava={
            "version": "auto",
            "learning_rate": 2e-5,
            "batch_size": 128,
            "image_aspect_ratio": "pad",
            "mm_vision_select_layer": -2,
        },
        lora={"learning_rate": 2e-4, "mm_projector_lr": 2e-5},
        demo={
            "learning_rate": 1e-3,
            "mm_projector_lr": 1e-4,  # at 1e-3 it unlearns its start before the adapters can use it
            "batch_size": 8,
            "per_device_train_batch_size": 8,
            "max_steps": 400,
            "lora_enable": True,
            "lora_r": 32,
            "lora_alpha": 64,
            "lora_dropout": 0.0,
            "image_aspect_ratio": "square",
            "mm_vision_select_layer": -1,
        },
    ),
}


def freeze_plan(
    stage: Stage,
    *,
    lora: bool = False,
    bits: int = 16,
    unfreeze_mm_vision_tower: bool = False,
    tune_mm_mlp_adapter: bool = False,
    freeze_mm_mlp_adapter: bool = False,
    freeze_backbone: bool = False,
) -> dict[str, Training]:
    """Part → how it trains, from the table and LLaVA's flags.

    Raises UserError where the flags contradict each other or leave nothing to train.
    """
    plan = dict(FREEZE[f"{stage.name}, lora" if lora and stage.name == "instruct" else stage.name])
    if unfreeze_mm_vision_tower:
        if stage.name == "align":
            raise UserError(
                "--unfreeze_mm_vision_tower in stage 1 would train an encoder that stage 2 does not see, since stage 1 "
                "leaves the projector alone: give it for stage 2 (--instruct.unfreeze_mm_vision_tower)"
            )
        plan["vision_tower"] = "full"
    if tune_mm_mlp_adapter or freeze_backbone:
        plan["language_model"] = "frozen"
    if freeze_mm_mlp_adapter:
        plan["projector"] = "frozen"
    if bits < 16 and plan["language_model"] == "full":
        raise UserError(f"--bits {bits} cannot train the language model's own weights: add --lora_enable")
    if all(how == "frozen" for how in plan.values()):
        raise UserError(f"these flags leave nothing to train in stage {stage.number} ({stage.name})")
    return plan


def part_of(name: str) -> str:
    """The part that the parameter `name` (of a `LlavaForConditionalGeneration`, wrapped or not) belongs to."""
    if "vision_tower." in name:
        return "vision_tower"
    return "projector" if "multi_modal_projector." in name else "language_model"


def wanted(model: nn.Module, plan: dict[str, Training]) -> Iterator[tuple[str, nn.Parameter, bool]]:
    """(name, parameter, whether it trains by `plan`) of every parameter of a LLaVA model, with adapters or without."""
    llava = next(module for module in model.modules() if isinstance(module, LlavaForConditionalGeneration))
    projector = llava.model.multi_modal_projector
    # The second layer of a `linear` projector is a fixed identity.
    projector_trains = {id(p) for layer in trainable_layers(projector).values() for p in layer.parameters()}
    for name, parameter in model.named_parameters():
        part = part_of(name)
        trains = plan[part] == "full" or (plan[part] == "lora" and ".lora_" in name)
        if part == "projector":
            trains = trains and id(parameter) in projector_trains
        yield name, parameter, trains


def apply_plan(model: nn.Module, plan: dict[str, Training]) -> None:
    """Set `requires_grad` of every parameter."""
    for _, parameter, trains in wanted(model, plan):
        parameter.requires_grad_(trains)


def assert_plan(model: nn.Module, plan: dict[str, Training]) -> None:
    """Raise RuntimeError naming parameters that train against `plan`, and parts that should train and do not."""
    wrong = [name for name, parameter, trains in wanted(model, plan) if parameter.requires_grad != trains]
    missing = [part for part in PARTS if plan[part] != "frozen" and not count_parameters(model)[part][1]]
    if wrong or missing:
        raise RuntimeError(f"the freeze table is not kept: {', '.join(wrong[:5] or missing)}")


def count_parameters(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Part → (parameters, trained ones); shared tensors count once, 4-bit weights as what they stand for."""
    counts = {part: [0, 0] for part in PARTS}
    for name, parameter in model.named_parameters():
        state = getattr(parameter, "quant_state", None)
        size = state.shape.numel() if state is not None else getattr(parameter, "ds_numel", parameter.numel())
        counts[part_of(name)][0] += size
        counts[part_of(name)][1] += size * parameter.requires_grad
    return {part: (total, trained) for part, (total, trained) in counts.items()}


def learning_rates(
    learning_rate: float, mm_projector_lr: float | None = None, mm_vision_tower_lr: float | None = None
) -> dict[str, float]:
    """Part → peak learning rate."""
    return {
        "vision_tower": learning_rate if mm_vision_tower_lr is None else mm_vision_tower_lr,
        "projector": learning_rate if mm_projector_lr is None else mm_projector_lr,
        "language_model": learning_rate,
    }


def parameter_groups(model: nn.Module, rates: dict[str, float], weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's groups: one per part and kind; biases, norms and other vectors carry no decay."""
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((part_of(name), parameter.ndim >= 2), []).append(parameter)
    return [
        {"name": part, "params": members, "lr": rates[part], "weight_decay": weight_decay if decays else 0.0}
        for (part, decays), members in groups.items()
    ]
