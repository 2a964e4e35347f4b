"""A model in this process as a captioner: pictures decoded side by side, batches of about equal size.

What is handed in at once is several batches of `generate` (`GROUP`), so that there is something to sort: a batch costs
what its largest row costs.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from PIL import Image

from clips import BrokenSample, decode_image
from clips.common.errors import UserError
from clips.common.files import digest_of
from clips.common.hub import CONFIG_FILES, WEIGHT_FILES
from mllm.chat.limits import KEPT_PIXELS
from mllm.evaluation.batches import seeded
from mllm.recaption.asking import RETRY_TEMPERATURE, Prompt, hint_of, temperature_of
from mllm.recaption.captioner import Pair, Written

GROUP = 4
"""Batches of `generate` that one call of `write` is asked for."""
ItemT = TypeVar("ItemT")


class BatchedCaptioner(ABC, Generic[ItemT]):
    """What the kinds of models share; an `ItemT` is a pair as one of them reads it.

    Args:
        directory: the model's files, which the manifest knows it by.
        batch_size: pairs of one `generate`.
    """

    kind: str

    def __init__(
        self, directory: Path, prompt: Prompt, device: torch.device, *, batch_size: int, max_new_tokens: int
    ) -> None:
        self.prompt, self.device, self.max_new_tokens = prompt, device, max_new_tokens
        self.batch_size, self._rows = GROUP * batch_size, batch_size
        self._weights = fingerprint(directory)
        self._readers = ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="pictures")

    @abstractmethod
    def dtype(self) -> torch.dtype:
        """What the model computes in."""

    @abstractmethod
    def pixels(self, image: Image.Image) -> Any:
        """What the model keeps of a decoded picture; called in several threads."""

    @abstractmethod
    def item(self, pixels: Any, hint: str) -> tuple[int, ItemT]:
        """A pair as the model reads it, and its size, by which batches are made; an exception refuses this pair."""

    @abstractmethod
    def generate(self, items: list[ItemT], temperature: float) -> list[Written | Exception]:
        """One for each of at most `batch_size` items, drawn with torch's random numbers as they are."""

    def describe(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "weights": self._weights,
            "prompt": self.prompt.digest,
            "dtype": str(self.dtype()).removeprefix("torch."),
            "batch_size": self._rows,  # rounding depends on a row's neighbours
            "max_new_tokens": self.max_new_tokens,
            "retry_temperature": RETRY_TEMPERATURE,
        }

    @torch.inference_mode()
    def write(self, pairs: Sequence[Pair], attempt: int) -> list[Written | Exception]:
        written: dict[int, Written | Exception] = {}
        items: dict[int, tuple[int, ItemT]] = {}
        for i, (pair, read) in enumerate(zip(pairs, self._readers.map(self._read, pairs), strict=True)):
            try:
                if isinstance(read, BrokenSample):
                    raise read
                items[i] = self.item(read, hint_of(pair.web))
            except (BrokenSample, ValueError, UserError) as refused:
                written[i] = refused
        order = sorted(items, key=lambda i: (-items[i][0], i))  # the largest first: what does not fit is known at once
        for start in range(0, len(order), self._rows):
            chosen = order[start : start + self._rows]
            with seeded(self.device, attempt):
                found = self.generate([items[i][1] for i in chosen], temperature_of(attempt))
            written |= zip(chosen, found, strict=True)
        return [written[i] for i in range(len(pairs))]

    def _read(self, pair: Pair) -> Any:
        try:
            return self.pixels(decode_image(pair.image, pair.key, reduce_to=KEPT_PIXELS))
        except BrokenSample as broken:
            return broken

    def close(self) -> None:
        self._readers.shutdown(wait=False, cancel_futures=True)


def fingerprint(directory: Path) -> str:
    """A hash of every file that says what a model computes: weights, configuration, tokenizer, templates."""
    return digest_of(path for pattern in (*CONFIG_FILES, *WEIGHT_FILES) for path in directory.glob(pattern))
