"""Apply the freeze table to a model: each parameter's part, whether it trains, its rate, and the check."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from mllm.model.projector import trainable_layers
from mllm.model.tiles import Llava
from mllm.training.stages import PARTS, TrainMode

IMAGE_NEWLINE = "image_newline"
"""The embedding at the ends of rows in a model with tiles. It trains with the projector."""


def llava_of(model: nn.Module) -> Llava:
    """Return the LLaVA model in `model`, which is that model itself or wraps it (as a PeftModel does)."""
    return next(module for module in model.modules() if isinstance(module, Llava))


def parts_of(model: nn.Module) -> dict[str, str]:
    """Return the part to which each parameter of a LLaVA model, wrapped or not, belongs, by the parameter's name."""
    llava = llava_of(model)
    words = {id(p) for layer in (llava.get_input_embeddings(), llava.lm_head) for p in layer.parameters()}

    def part(name: str, parameter: nn.Parameter) -> str:
        if "vision_tower." in name:
            return "vision_tower"
        if "multi_modal_projector." in name or name.endswith(IMAGE_NEWLINE):
            return "projector"
        return "word_embeddings" if id(parameter) in words else "language_model"

    return {name: part(name, parameter) for name, parameter in model.named_parameters()}


def wanted(model: nn.Module, freeze: dict[str, TrainMode]) -> Iterator[tuple[str, nn.Parameter, bool]]:
    """Yield (name, parameter, whether `freeze` lets it train) for every parameter of a LLaVA model and its adapters."""
    projector = llava_of(model).model.multi_modal_projector
    # The second layer of a `linear` projector is a fixed identity.
    projector_trains = {id(p) for layer in trainable_layers(projector).values() for p in layer.parameters()}
    parts = parts_of(model)
    for name, parameter in model.named_parameters():
        part = parts[name]
        trains = freeze[part] == "full" or (freeze[part] == "lora" and ".lora_" in name)
        fixed = part == "projector" and id(parameter) not in projector_trains and not name.endswith(IMAGE_NEWLINE)
        yield name, parameter, trains and not fixed


def apply_freeze(model: nn.Module, freeze: dict[str, TrainMode]) -> None:
    """Set `requires_grad` of every parameter by `freeze`."""
    for _, parameter, trains in wanted(model, freeze):
        parameter.requires_grad_(trains)


def assert_freeze(model: nn.Module, freeze: dict[str, TrainMode]) -> None:
    """Raise RuntimeError with the parameters that contradict `freeze`, or the parts that should train and do not."""
    wrong = [name for name, parameter, trains in wanted(model, freeze) if parameter.requires_grad != trains]
    counts = count_parameters(model)
    missing = [part for part in PARTS if freeze[part] != "frozen" and not counts[part][1]]
    if wrong or missing:
        raise RuntimeError(f"the freeze table is not kept: {', '.join(wrong[:5] or missing)}")


def count_parameters(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Count all and trained parameters of each part. Shared tensors count once, 4-bit weights at original size."""
    counts = {part: [0, 0] for part in PARTS}
    parts = parts_of(model)
    for name, parameter in model.named_parameters():
        state = getattr(parameter, "quant_state", None)
        size = state.shape.numel() if state is not None else getattr(parameter, "ds_numel", parameter.numel())
        counts[parts[name]][0] += size
        counts[parts[name]][1] += size * parameter.requires_grad
    return {part: (total, trained) for part, (total, trained) in counts.items()}


def parameter_groups(model: nn.Module, rates: dict[str, float], weight_decay: float) -> list[dict[str, Any]]:
    """Return AdamW's groups, one per part and kind; biases, norms and other vectors have no weight decay."""
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    parts = parts_of(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((parts[name], parameter.ndim >= 2), []).append(parameter)
    return [
        {"name": part, "params": members, "lr": rates[part], "weight_decay": weight_decay if decays else 0.0}
        for (part, decays), members in groups.items()
    ]
