"""A model in this process as a captioner: threads decode pictures, and batches hold pairs of about equal size.

A batch costs as much as its largest row. So one call takes several batches (`GROUP`) and sorts their pairs.
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
from clips.common.hub import model_digest
from mllm.chat.limits import KEPT_PIXELS
from mllm.evaluation.batches import seeded
from mllm.recaption.asking import RETRY_TEMPERATURE, Prompt, hint_of, temperature_of
from mllm.recaption.captioner import Pair, Written

GROUP = 4
"""Batches of `generate` in one call of `write`."""
ItemT = TypeVar("ItemT")


class BatchedCaptioner(ABC, Generic[ItemT]):
    """The common part of captioners in this process; an `ItemT` is a pair in the model's own form.

    Args:
        directory: the model's files, whose hash the manifest keeps.
        batch_size: pairs of one `generate`.
    """

    kind: str

    def __init__(
        self, directory: Path, prompt: Prompt, device: torch.device, *, batch_size: int, max_new_tokens: int
    ) -> None:
        self.prompt, self.device, self.max_new_tokens = prompt, device, max_new_tokens
        self.batch_size, self._rows = GROUP * batch_size, batch_size
        self._weights = model_digest(directory, whole=True)
        self._readers = ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="pictures")

    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The model's arithmetic."""

    @abstractmethod
    def pixels(self, image: Image.Image) -> Any:
        """A decoded picture in the model's form; called in several threads."""

    @abstractmethod
    def item(self, pixels: Any, hint: str) -> tuple[int, ItemT]:
        """(size, pair in the model's form); batches are sorted by size. An exception refuses this pair."""

    @abstractmethod
    def generate(self, items: list[ItemT], temperature: float) -> list[Written | Exception]:
        """The result for each of at most `batch_size` items; it draws torch's random numbers."""

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
        order = sorted(items, key=lambda i: (-items[i][0], i))  # the largest first: a full GPU shows at once
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
