"""The text of an answer while it is generated: whole characters only, ended by stop texts or by request."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from mllm.chat.model import Stats


class AnswerStreamer(BaseStreamer):
    """Turns tokens into final pieces of text: whole characters, no part of a stop text, no outer spaces.

    It puts them into `pieces`. The caller puts None there when the worker ends.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: tuple[str, ...], cancel: threading.Event) -> None:
        self.pieces: SimpleQueue[str | None] = SimpleQueue()
        self.cancelled = False
        self.stopped = False
        self._tokenizer: Any = tokenizer  # mypy confuses `decode` for one text and for many
        self._stop, self._cancel = stop, cancel
        self._ids: list[int] | None = None  # None until the prompt has gone by
        self._begin = self._end = 0  # ids[begin:end] are the context of the next id; their text is out
        self._pending = ""
        self._started = False
        self._times: list[float] = []

    def is_cancelled(self) -> bool:
        self.cancelled |= self._cancel.is_set()
        return self.cancelled

    def put(self, value: Tensor) -> None:
        if self._ids is None:
            self._ids = []
            return
        self._times = [*self._times[:1], time.perf_counter()]
        self._ids += value.flatten().tolist()
        # The text of a token depends on the tokens before it (a space, the bytes of one character), so a few tokens
        # are decoded again with it. Decoding the whole answer would take ever longer.
        text, known = self._decode(self._begin), len(self._decode(self._begin, self._end))
        if len(text) > known and not text.endswith("\ufffd"):  # else the last character is not whole yet
            self._begin, self._end = self._end, len(self._ids)
            self._emit(text[known:])

    def end(self) -> None:
        self._emit(self._decode(self._begin)[len(self._decode(self._begin, self._end)) :], last=True)

    def _decode(self, begin: int, end: int | None = None) -> str:
        ids = (self._ids or [])[begin:end]
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _emit(self, text: str, last: bool = False) -> None:
        if self.stopped:
            return
        text = self._pending + text
        found = [text.index(stop) for stop in self._stop if stop in text]
        if found:
            text, self.stopped = text[: min(found)], True
        ready = text if last or found else text[: len(text) - self._possible_stop(text)]
        ready = ready.rstrip()  # spaces wait for the next text: at the end of an answer they are cut
        self._pending = text[len(ready) :]
        if not self._started:
            ready = ready.lstrip()
        if ready:
            self._started = True
            self.pieces.put(ready)

    def _possible_stop(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop text."""
        ends = ((stop, n) for stop in self._stop for n in range(1, min(len(stop), len(text) + 1)))
        lengths = (n for stop, n in ends if text.endswith(stop[:n]))
        return max(lengths, default=0)

    def stats(self, prompt_tokens: int, cached_tokens: int, start: float, stop_ids: Sequence[int]) -> Stats:
        ids, times = self._ids or [], self._times
        ended = self.stopped or (bool(ids) and ids[-1] in stop_ids)
        seconds = times[-1] - times[0] if len(times) > 1 else 0.0
        return Stats(
            prompt_tokens=prompt_tokens,
            cached_tokens=cached_tokens,
            new_tokens=len(ids),
            first_token_s=times[0] - start if times else 0.0,
            tokens_per_s=(len(ids) - 1) / seconds if seconds else 0.0,
            finish_reason="stop" if ended else "cancelled" if self.cancelled else "length",
        )


class StopWhenDone(StoppingCriteria):
    """Ends generation at a stop text, and when the answer is cancelled."""

    def __init__(self, streamer: AnswerStreamer) -> None:
        self._streamer = streamer

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        done = self._streamer.stopped or self._streamer.is_cancelled()
        return torch.full((len(input_ids),), done, dtype=torch.bool, device=input_ids.device)
