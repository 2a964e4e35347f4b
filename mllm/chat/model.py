"""A loaded chat model, and the settings and statistics of its answers."""

from __future__ import annotations

import argparse
import importlib.util
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import torch

from clips import CONCEPTS
from clips.common.errors import UserError
from clips.common.runtime import choose_device
from mllm.chat.transcript import Visual, size_of
from mllm.data.conversation import ConversationEncoder
from mllm.model.load import answer_dtype, data_of, find_model, load_llava, model_name, newest_model
from mllm.model.quantize import quantize
from mllm.model.tiles import Llava, LlavaProcessors, TokenLayout


def model_options(flags: argparse.Namespace) -> dict[str, Any]:
    """Return the keyword arguments of `ChatModel.load` from the flags of `mllm.chat.limits`."""
    bits = 4 if flags.load_4bit else 8 if flags.load_8bit else 16
    return {"device": flags.device, "dtype": flags.dtype, "bits": bits, "conv_mode": flags.conv_mode}


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How an answer is sampled; temperature 0 is greedy. Raises UserError with the field if a value is out of range."""

    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()
    """Texts that end the answer and are not part of it."""
    seed: int | None = None
    """Makes a sampled answer repeatable."""

    def __post_init__(self) -> None:
        rules = {
            "temperature must be 0 or more": 0 <= self.temperature < math.inf,
            "top_p must be above 0 and at most 1": 0 < self.top_p <= 1,
            "max_new_tokens must be above 0": self.max_new_tokens >= 1,
            "seed must be a whole number of 0 or more": self.seed is None or 0 <= self.seed < 2**63,
            "stop must be texts that are not empty": all(self.stop),
        }
        for rule, holds in rules.items():
            if not holds:
                raise UserError(rule)


GREEDY = Sampling()


@dataclass(frozen=True, kw_only=True)
class Stats:
    """The statistics of one answer."""

    prompt_tokens: int
    cached_tokens: int
    """Number of prompt tokens that were in the key-value cache."""
    new_tokens: int
    """Number of generated tokens, including an end token."""
    finish_reason: Literal["stop", "length", "cancelled"]

    @property
    def cut_off(self) -> str:
        """A remark about an answer that did not end by itself, or ""."""
        return "" if self.finish_reason == "stop" else f"cut off after {self.new_tokens:,} tokens"


class ChatModel:
    """A model with its processor and conversation format, which any number of sessions can share.

    The single thread of `worker` generates the answers of all sessions in the order of the questions. Every other use
    of the model must run in this thread too.

    Args:
        conv_mode: a name in `mllm.data.formats.FORMATS`; "auto" is the format in which the model was trained.
    """

    def __init__(self, model: Llava, processor: LlavaProcessors, directory: str, conv_mode: str = "auto") -> None:
        self.model = model
        self.processor = processor
        self.directory = directory
        self.name = model_name(directory)
        self.layout = TokenLayout.of(model.config)
        self.context_length: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.encoder = ConversationEncoder(processor.tokenizer, conv_mode, self.layout.of_every)
        self.worker = ThreadPoolExecutor(1, thread_name_prefix="generate")

    @property
    def takes_videos(self) -> bool:
        """True if the model takes videos and PyAV is installed to read them."""
        return bool(self.layout.frames) and importlib.util.find_spec("av") is not None

    @property
    def scope(self) -> str:
        """A sentence or two about what the model was trained on and can be asked, or "" if there is no record."""
        data = data_of(self.directory)
        if data == ["demo"]:
            asked = "Ask what is where, how many things there are, or whether a thing is in the image"
            return f" It knows drawings of {len(CONCEPTS)} things and nothing else. {asked}."
        return f" It was trained on {', '.join(data)}, so ask questions like those." if data else ""

    def image_tokens(self, images: Sequence[Visual]) -> list[int]:
        """Return the number of tokens of each image. Raises UserError for a broken header."""
        return [self.layout.tokens(size_of(image)) for image in images]

    def check_crops(self, images: Sequence[Visual], most: int) -> None:
        """Raise UserError if the encoder would read more than `most` crops, on which the cost of images depends."""
        if not self.layout.pinpoints:
            return
        crops = sum(self.layout.crops(size_of(image)) for image in images)
        if crops > most:
            raise UserError(
                f"these {len(images)} images are split into {crops} crops, more than the limit of {most}: "
                "send fewer or smaller images"
            )

    @staticmethod
    def load(
        name: str | None = None, *, device: str = "auto", dtype: str = "auto", bits: int = 16, conv_mode: str = "auto"
    ) -> ChatModel:
        """Load a model by directory or hub id, by default the newest in runs/. Raises UserError if that fails.

        `bits` 4 or 8 quantises the language model. `dtype` is as in `answer_dtype`.

        >>> model = ChatModel.load("runs/llava-clips/model")
        """
        directory = find_model(name) if name else str(newest_model())
        place = choose_device(device)
        kind = answer_dtype(dtype, place)
        model: Any  # transformers declares `to` so that mypy misses its self
        if bits == 16:
            model, processor = load_llava(directory, place, kind)
        else:
            # Layers are quantised one by one on their way to the device, which need not hold the full language model.
            model, processor = load_llava(directory, torch.device("cpu"), kind)
            quantize(model.model.language_model, bits, kind, place)
        return ChatModel(model.to(place), processor, directory, conv_mode)
