"""The captioner of a CLIPS encoder: it reads image and web caption, as in the paper, and no prompt."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torch import Tensor

from clips import CLIPS, BrokenSample, decode_image
from clips.common.errors import UserError
from clips.common.tensors import hash_weights
from mllm.chat.limits import KEPT_PIXELS
from mllm.recaption.asking import RETRY_TEMPERATURE, temperature_of
from mllm.recaption.captioner import Pair, Written


class ClipsCaptioner:
    """`clips:RUN`, a run or native export whose captioner writes word by word (model.captioner.inputs = "tokens").

    Raises UserError for other models. The paper's captioner guesses all words at once: a good task to learn from, and
    no text.
    """

    def __init__(self, path: str, *, device: str, batch_size: int) -> None:
        self.model = CLIPS.from_pretrained(path, device=device)
        if self.model.caption_inputs != "tokens":
            found = "guesses all words at once" if self.model.caption_inputs else "is missing"
            raise UserError(
                f"clips:{path}: its captioner {found}, and captions need one that writes word by word: train with "
                "--set model.captioner.inputs=tokens"
            )
        self.batch_size = batch_size
        self._weights = hash_weights(self.model.model.state_dict()).hexdigest()
        self._readers = ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="pictures")

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "clips",
            "weights": self._weights,
            "batch_size": self.batch_size,  # rounding depends on a row's neighbours
            "retry_temperature": RETRY_TEMPERATURE,
        }

    def write(self, pairs: Sequence[Pair], attempt: int) -> list[Written | Exception]:
        written: list[Written | Exception] = list(self._readers.map(self._pixels, pairs))  # type: ignore[arg-type]
        good = [i for i, read in enumerate(written) if isinstance(read, Tensor)]
        captions = self.model.write_captions(
            [written[i] for i in good],  # type: ignore[misc]
            [pairs[i].web for i in good],
            temperature=temperature_of(attempt),
            seed=attempt,
        )
        for i, caption in zip(good, captions, strict=True):
            written[i] = Written(caption.text, caption.finished, caption.tokens)
        return written

    def _pixels(self, pair: Pair) -> Tensor | BrokenSample:
        try:
            return self.model.preprocess(decode_image(pair.image, pair.key, reduce_to=KEPT_PIXELS))
        except BrokenSample as broken:
            return broken

    def close(self) -> None:
        self._readers.shutdown(wait=False, cancel_futures=True)
