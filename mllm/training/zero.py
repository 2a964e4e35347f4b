"""DeepSpeed in a LLaVA stage: the engine's settings, and full parameters after training."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn

from clips.common.errors import UserError
from clips.common.paths import DS_CONFIGS
from clips.common.runtime import import_deepspeed
from clips.engine.engine import read_ds_config
from mllm.training.arguments import TrainArguments


def deepspeed_config(arguments: TrainArguments, world_size: int) -> dict[str, Any]:
    """Return DeepSpeed's settings: those of --deepspeed, by default the stage's own for several ranks, or none for one.

    Raises UserError for a file that cannot be used, and for quantised weights under ZeRO-3, which cannot split them.
    """
    path = arguments.deepspeed
    quantized = arguments.bits < 16
    if path is None and world_size > 1:
        path = str(DS_CONFIGS / f"llava_zero{2 if quantized else arguments.stage_info.zero}.json")
    config = read_ds_config(None if path == "none" else path, "--deepspeed")
    if quantized and zero_stage(config) == 3:
        raise UserError(
            f"--bits {arguments.bits} does not work with ZeRO-3: give --deepspeed ds_configs/llava_zero2.json"
        )
    return config


def with_hidden_size(config: dict[str, Any], hidden_size: int) -> dict[str, Any]:
    """Return `config` with values for the "auto" sizes that depend on the language model's width."""
    zero = config.get("zero_optimization", {})
    sizes = {
        "reduce_bucket_size": hidden_size**2,
        "stage3_prefetch_bucket_size": int(0.9 * hidden_size**2),
        "stage3_param_persistence_threshold": 10 * hidden_size,
    }
    filled = {name: sizes[name] if value == "auto" and name in sizes else value for name, value in zero.items()}
    return config | {"zero_optimization": filled}


def zero_stage(config: Mapping[str, Any]) -> int:
    """Return the ZeRO stage of a DeepSpeed config; 0 without one."""
    return config.get("zero_optimization", {}).get("stage", 0)


def full_parameters(model: nn.Module, zero: int) -> AbstractContextManager[Any]:
    """Return a context in which every rank holds all parameters in full (ZeRO-3 gathers them). Collective."""
    return import_deepspeed().zero.GatheredParameters(list(model.parameters())) if zero == 3 else nullcontext()
