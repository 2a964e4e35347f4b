"""DeepSpeed in a LLaVA stage: the engine's settings, their check before a step, and whole parameters after it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from clips.common.errors import UserError
from clips.common.files import from_json, read_bytes
from clips.common.paths import DS_CONFIGS
from clips.common.runtime import import_deepspeed
from mllm.training.arguments import TrainArguments


def deepspeed_config(arguments: TrainArguments, world_size: int) -> dict[str, Any] | None:
    """The engine's settings: the named file, or the stage's own file for several ranks; None without DeepSpeed.

    Raises UserError for an unreadable file, for an optimizer or schedule in it, and for quantised weights under
    ZeRO-3, which cannot split them.
    """
    name = arguments.deepspeed
    if name == "none" or (name is None and world_size == 1):
        return None
    quantized = arguments.bits < 16
    path = Path(name) if name else DS_CONFIGS / f"llava_zero{2 if quantized else arguments.description.zero}.json"
    try:
        config = from_json(read_bytes(path))
    except (OSError, ValueError) as error:
        raise UserError(f"--deepspeed {path} is not a readable JSON file: {error}") from None
    _leave_to_flags(config, path)
    if quantized and zero_stage(config) == 3:
        raise UserError(
            f"--bits {arguments.bits} does not go with ZeRO-3: give --deepspeed ds_configs/llava_zero2.json"
        )
    return config


def _leave_to_flags(config: dict[str, Any], path: Path) -> None:
    """Drop `optimizer` and `scheduler` if all their values are "auto"; UserError for other values: flags decide."""
    for section, kind in {"optimizer": "AdamW", "scheduler": None}.items():
        given = config.pop(section, {"type": kind})
        if kind not in (None, given.get("type")) or any(v != "auto" for v in given.get("params", {}).values()):
            raise UserError(f"--deepspeed {path}: {section} is decided by the flags: remove that section")


def fitted(config: dict[str, Any] | None, hidden_size: int, device: torch.device) -> dict[str, Any] | None:
    """`config` for this device, with the "auto" sizes that depend on the language model's width.

    transformers fills in these sizes from the config of the wrapped model, and `TrainingModel` has no config.
    """
    if config is None:
        return None
    zero = config.get("zero_optimization", {})
    sizes = {
        "reduce_bucket_size": hidden_size**2,
        "stage3_prefetch_bucket_size": int(0.9 * hidden_size**2),
        "stage3_param_persistence_threshold": 10 * hidden_size,
    }
    filled = {name: sizes[name] if value == "auto" and name in sizes else value for name, value in zero.items()}
    # On a CPU an offloaded optimizer stays in place, and DeepSpeed's CPU optimizer would have to be compiled.
    force = {} if device.type == "cuda" else {"zero_force_ds_cpu_optimizer": False}
    return force | config | {"zero_optimization": filled}


def checkpoint_classes() -> list[type]:
    """The classes in DeepSpeed's checkpoints besides tensors and plain values; loading them runs no code."""
    library = import_deepspeed()
    return [
        library.runtime.zero.config.ZeroStageEnum,
        library.runtime.fp16.loss_scaler.LossScaler,
        library.utils.fragment_address,
    ]


def zero_stage(config: dict[str, Any] | None) -> int:
    return (config or {}).get("zero_optimization", {}).get("stage", 0)


def whole(model: nn.Module, zero: int) -> AbstractContextManager[Any]:
    """Inside, every rank holds every whole parameter (ZeRO-3 gathers them). Collective."""
    return import_deepspeed().zero.GatheredParameters(list(model.parameters())) if zero == 3 else nullcontext()
