"""Load a trained LLaVA-style model by directory or hub id, and find the newest one that was trained here."""

import inspect
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoConfig,
    AutoProcessor,
    FastVlmForConditionalGeneration,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionForConditionalGeneration,
)

from clips.common.errors import UserError
from clips.common.files import read_json
from clips.common.hub import resolve
from clips.common.opening import NO_CODE, check_size, load_weights, loading
from clips.common.rundir import take_newest
from clips.common.runtime import LANGUAGE_MODEL_KEYS, attends_plainly, has_bf16
from mllm.model.original import refuse_original
from mllm.model.tiles import Llava, LlavaProcessors

FACTS = "clips_mllm.json"
"""A file beside a model's stock files that says what it was trained on. It is not needed for loading."""
QUESTION_TOKENS = 128
"""Length of a usual question with its image, on which the attention kernel of answers depends."""
CLASSES = {
    "llava": LlavaForConditionalGeneration,
    "fast_vlm": FastVlmForConditionalGeneration,
    "llava_next": LlavaNextForConditionalGeneration,
    "llava_onevision": LlavaOnevisionForConditionalGeneration,
}
"""The stock class for each `model_type`."""
_FORWARD = inspect.signature(LlavaForConditionalGeneration.forward).parameters
CACHE = "cache" if "cache" in _FORWARD else "past_key_values"
"""The name of the argument for the key-value cache, which transformers renamed."""


def answer_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype called `name`; "auto" is bfloat16 if the device computes in bfloat16, and float32 if not.

    Chat, server and evaluation all use it, so that one chats with the model that was evaluated.
    """
    if name == "auto":
        return torch.bfloat16 if has_bf16(device) else torch.float32
    return getattr(torch, name)


def load_llava(
    name: str, device: torch.device, dtype: torch.dtype | Literal["stored"] | None = None
) -> tuple[Llava, LlavaProcessors]:
    """Load a stock LLaVA model by directory or hub id, in eval mode. Raises UserError if it cannot be loaded.

    `dtype` "stored" means the precision of the files, and None means `answer_dtype` "auto".

    >>> model, processor = load_llava("runs/llava-clips/model", torch.device("cpu"))
    """
    directory = resolve(find_model(name), "model")
    refuse_original(directory, "model")
    model_type = read_json(Path(directory) / "config.json").get("model_type")
    cls: Any = CLASSES.get(model_type or "")
    if cls is None:
        raise UserError(
            f"model: {directory} has model_type {model_type}, not {', '.join(CLASSES)}: train_llava.sh --vision"
        )
    if dtype is None:
        dtype = answer_dtype("auto", device)
    with loading("model", directory):
        config: Any = AutoConfig.from_pretrained(directory, **NO_CODE)
        check_size("model", directory, lambda: cls(config))
        processor = AutoProcessor.from_pretrained(directory, **NO_CODE)
        kind: Any = "auto" if dtype == "stored" else dtype  # as transformers calls it
        plain = dtype != "stored" and attends_plainly(device, dtype, QUESTION_TOKENS, LANGUAGE_MODEL_KEYS)
        model, _ = load_weights(cls, "model", directory, dtype=kind, attn_implementation="eager" if plain else None)
    return model.to(device).eval(), processor


def data_of(directory: str | Path) -> list[str]:
    """Return the data that a model was trained on here, "demo" or file names. The list is empty without a record."""
    learned = read_json(Path(find_model(str(directory))) / FACTS).get("trained_on") or {}
    return list(dict.fromkeys(map(str, learned.values())))


def model_name(directory: str) -> str:
    """Return a model's name: the name of its directory, or that of the run if the directory is a run's `model`."""
    path = Path(directory)
    return path.resolve().parent.name if path.name == "model" else path.name


def find_model(name: str) -> str:
    """Return `name`, or its model directory if it is a run of train_llava.sh (its config.json has no `model_type`)."""
    run = Path(name).expanduser()
    holds_model = (run / "model" / "config.json").is_file()
    return str(run / "model") if holds_model and "model_type" not in read_json(run / "config.json") else name


def newest_model(runs: Path = Path("runs")) -> Path:
    """Return the model directory under `runs` that was written last. Raises UserError if there is none."""
    dated = [(path.stat().st_mtime, path.parent) for path in runs.glob("*/model/config.json")]
    if not dated:
        raise UserError(f"no trained model under {runs}/: run bash scripts/train_llava.sh, or give one with --model")
    return take_newest("model", dated)
