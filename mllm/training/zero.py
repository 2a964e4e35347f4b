"""DeepSpeed in a LLaVA stage: the engine's settings, their check before a step, and whole parameters after it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from torch import nn

from clips.common.errors import UserError
from clips.common.files import from_json, read_bytes
from clips.common.paths import DS_CONFIGS
from clips.common.runtime import import_deepspeed
from mllm.training.arguments import TrainArguments

OF_THE_FLAGS = (
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
)
"""Settings that the flags decide, besides the sections of the optimizer, the schedule and the precision."""


def deepspeed_config(arguments: TrainArguments, world_size: int) -> dict[str, Any]:
    """Return the engine's settings: the named file, the stage's own file for several ranks, else ZeRO 0.

    Raises UserError for an unreadable file, for settings in it that the flags decide, and for quantised weights under
    ZeRO-3, which cannot split them.
    """
    name = arguments.deepspeed
    if name == "none" or (name is None and world_size == 1):
        return {"zero_optimization": {"stage": 0}}
    quantized = arguments.bits < 16
    path = Path(name) if name else DS_CONFIGS / f"llava_zero{2 if quantized else arguments.description.zero}.json"
    try:
        config = from_json(read_bytes(path))
    except (OSError, ValueError) as error:
        raise UserError(f"--deepspeed {path} is not a readable JSON file: {error}") from None
    _leave_to_flags(config, path, bf16=arguments.bf16)
    if quantized and zero_stage(config) == 3:
        raise UserError(
            f"--bits {arguments.bits} does not go with ZeRO-3: give --deepspeed ds_configs/llava_zero2.json"
        )
    return config


def _leave_to_flags(config: dict[str, Any], path: Path, *, bf16: bool) -> None:
    """Drop from LLaVA's files what is "auto" there. Raises UserError for other values: the flags decide."""
    given = {name: config.pop(name, "auto") for name in OF_THE_FLAGS}
    sections = {name: config.pop(name, {}) for name in ("optimizer", "scheduler", "bf16", "fp16")}
    given |= {f"{name}.{key}": v for name in ("optimizer", "scheduler") for key, v in _params(sections[name]).items()}
    given["optimizer.type"] = "auto" if sections["optimizer"].get("type", "AdamW") == "AdamW" else "another"
    for name, value in {"bf16": bf16, "fp16": False}.items():
        given[f"{name}.enabled"] = "auto" if sections[name].get("enabled", "auto") in ("auto", value) else "another"
    for name, value in given.items():
        if value != "auto":
            raise UserError(f"--deepspeed {path}: {name} is decided by the flags: remove it there, or make it auto")


def _params(section: Mapping[str, Any]) -> Mapping[str, Any]:
    return section.get("params", {})


def fitted(config: dict[str, Any], hidden_size: int) -> dict[str, Any]:
    """Return `config` with the "auto" sizes that depend on the language model's width."""
    zero = config.get("zero_optimization", {})
    sizes = {
        "reduce_bucket_size": hidden_size**2,
        "stage3_prefetch_bucket_size": int(0.9 * hidden_size**2),
        "stage3_param_persistence_threshold": 10 * hidden_size,
    }
    filled = {name: sizes[name] if value == "auto" and name in sizes else value for name, value in zero.items()}
    return config | {"zero_optimization": filled}


def zero_stage(config: Mapping[str, Any]) -> int:
    return config.get("zero_optimization", {}).get("stage", 0)


def whole(model: nn.Module, zero: int) -> AbstractContextManager[Any]:
    """Inside, every rank holds every whole parameter (ZeRO-3 gathers them). Collective."""
    return import_deepspeed().zero.GatheredParameters(list(model.parameters())) if zero == 3 else nullcontext()
