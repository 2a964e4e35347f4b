"""DeepSpeed's part in a LLaVA stage: the engine's settings, and parameters made whole again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from clips.common.errors import UserError
from clips.common.runtime import import_deepspeed
from mllm.training.arguments import ResolvedArguments

DS_CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"


def deepspeed_config(arguments: ResolvedArguments, world_size: int) -> dict[str, Any] | None:
    """The engine's settings: the file that was named, or this stage's own where there are several ranks.

    Raises UserError for an unreadable file, and for quantised weights under ZeRO-3, which cannot take them apart.
    """
    name = arguments.deepspeed
    if name == "none" or (name is None and world_size == 1):
        return None
    quantized = arguments.bits < 16
    path = Path(name) if name else DS_CONFIGS / f"llava_zero{2 if quantized else arguments.description.zero}.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--deepspeed {path} is not a readable JSON file: {error}") from None
    if quantized and zero_stage(config) == 3:
        raise UserError(
            f"--bits {arguments.bits} does not go with ZeRO-3: give --deepspeed ds_configs/llava_zero2.json"
        )
    return config


def zero_stage(config: dict[str, Any] | None) -> int:
    return (config or {}).get("zero_optimization", {}).get("stage", 0)


@contextmanager
def whole(model: nn.Module, zero: int) -> Iterator[None]:
    """Inside, every parameter is whole on every rank (ZeRO-3 gathers them). Collective."""
    if zero < 3:
        yield
        return
    with import_deepspeed().zero.GatheredParameters(list(model.parameters())):
        yield
