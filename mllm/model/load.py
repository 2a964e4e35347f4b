"""A trained LLaVA-style model by directory or hub id, and the newest one trained here."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoConfig,
    AutoProcessor,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionForConditionalGeneration,
)

from clips.common.errors import UserError
from clips.common.files import read_json
from clips.common.hub import resolve
from clips.common.opening import NO_CODE, REPORTED, check_complete, check_size, loading
from clips.common.rundir import take_newest
from mllm.model.original import refuse_original
from mllm.model.tiles import Llava, LlavaProcessors

FACTS = "clips_mllm.json"
"""Beside a model's stock files, what those do not say of it, for programs; nothing is needed for loading."""
CLASSES = {
    "llava": LlavaForConditionalGeneration,
    "llava_next": LlavaNextForConditionalGeneration,
    "llava_onevision": LlavaOnevisionForConditionalGeneration,
}
"""`model_type` → its class."""
_FORWARD = inspect.signature(LlavaForConditionalGeneration.forward).parameters
CACHE = "cache" if "cache" in _FORWARD else "past_key_values"
"""The argument that takes a model's keys and values; transformers renamed it."""


def load_llava(
    name: str, device: torch.device, dtype: torch.dtype | Literal["auto"] | None = None
) -> tuple[Llava, LlavaProcessors]:
    """A stock LLaVA model by directory or hub id, in eval mode; UserError for what cannot be loaded.

    `dtype` "auto" is that of the files; None is bf16 on a GPU and fp32 on a CPU.
    """
    directory = resolve(find_model(name), "model")
    refuse_original(directory, "model")
    kind = read_json(Path(directory) / "config.json").get("model_type")
    cls: Any = CLASSES.get(kind or "")
    if cls is None:
        raise UserError(f"model: {directory} has model_type {kind}, not {', '.join(CLASSES)}: train_llava.sh --vision")
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    # Fused attention in bf16 is slow on CPUs at the length of a question, see mllm/training/prepare.py.
    slow = device.type == "cpu" and dtype == torch.bfloat16
    with loading("model", directory):
        config: Any = AutoConfig.from_pretrained(directory, **NO_CODE)
        check_size("model", directory, lambda: cls(config))
        processor = AutoProcessor.from_pretrained(directory, **NO_CODE)
        # With its loading info it returns a pair, which its annotation does not say.
        loaded: Any = cls.from_pretrained(
            directory, dtype=dtype, attn_implementation="eager" if slow else None, **REPORTED
        )
        model, info = loaded
    check_complete(info, "model", directory)
    return model.to(device).eval(), processor


def data_of(directory: str | Path) -> list[str]:
    """The data that a model trained here learned: "demo", or names of files; empty if the model has no record."""
    learned = read_json(Path(find_model(str(directory))) / FACTS).get("trained_on") or {}
    return list(dict.fromkeys(map(str, learned.values())))


def model_name(directory: str) -> str:
    """A model's name: its run's name for a run's `model` directory, else its own."""
    path = Path(directory)
    return path.resolve().parent.name if path.name == "model" else path.name


def find_model(name: str) -> str:
    """Return `name`, or the model in it if it is a run of train_llava.sh, whose config.json has no `model_type`."""
    run = Path(name).expanduser()
    holds_model = (run / "model" / "config.json").is_file()
    return str(run / "model") if holds_model and "model_type" not in read_json(run / "config.json") else name


def newest_model(runs: Path = Path("runs")) -> Path:
    """The model directory written last under `runs`; UserError if there is none."""
    dated = [(path.stat().st_mtime, path.parent) for path in runs.glob("*/model/config.json")]
    if not dated:
        raise UserError(f"no trained model under {runs}/: run bash scripts/train_llava.sh, or name one by --model")
    return take_newest("model", dated)
