"""A conversation about images, which terminal, web page and server share: its turns and its next answer.

All prompts come from `ConversationEncoder.prompt`, so chat uses the same tokens as training. transformers' `generate`
generates the tokens of an answer, and `AnswerStreamer` decides which text can be shown.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Sequence
from concurrent.futures import wait
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerBase, StoppingCriteriaList, TextIteratorStreamer

from clips.common.errors import UserError
from mllm.chat.model import GREEDY, ChatModel, Sampling, Stats
from mllm.chat.transcript import Turn, Visual, decoded
from mllm.data.conversation import Images
from mllm.evaluation.batches import answer_settings, pixel_inputs, seeded, seen
from mllm.model.load import CACHE


class ContextError(UserError):
    """A conversation is longer than the model's context."""


class AnswerStreamer(TextIteratorStreamer):
    """Streams the text of an answer in pieces, up to the first stop text and without spaces at its ends."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: tuple[str, ...], cancel: threading.Event) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        self.stop = stop
        self.cancel = cancel
        self.is_stopped = False
        self.last_id: int | None = None
        self.new_tokens = 0
        self._held = ""
        """Text that is not shown yet, because it may begin a stop text, or is space that may end the answer."""
        self._has_begun = False

    def put(self, value: Tensor) -> None:
        """Take new token ids from `generate`, and remember the last one."""
        if not self.next_tokens_are_prompt:
            self.new_tokens += 1
            self.last_id = int(value)
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Queue finished text, but hold back the start of a possible stop text."""
        if not self.is_stopped:
            text = self._held + text
            ends = [text.index(stop) for stop in self.stop if stop in text]
            self.is_stopped = bool(ends)
            longest = 0 if stream_end else max(map(len, self.stop), default=1) - 1
            ready = text[: min(ends) if ends else max(0, len(text) - longest)].rstrip()
            self._held = text[len(ready) :]
            ready = ready if self._has_begun else ready.lstrip()
            if ready:
                self._has_begun = True
                self.text_queue.put(ready)
        if stream_end:
            self.text_queue.put(self.stop_signal)

    def is_done(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Stop `generate` after a stop text or a cancellation; this is a stopping criterion."""
        return torch.tensor([self.is_stopped or self.cancel.is_set()], device=input_ids.device)


@dataclass(frozen=True)
class Prompt:
    """A conversation up to the next answer, which fits into the context."""

    turns: list[Turn]
    images: list[Visual]
    ids: list[int]


class ChatSession:
    """One conversation: its turns, its images, and the key-value cache of the part that the model has read.

    >>> session = ChatSession(ChatModel.load())
    >>> "".join(session.ask("What colour is the star?", [Image.open("star.png")]))
    'Red.'
    >>> "".join(session.ask("And where is it?"))
    'At the top.'

    Attributes:
        turns: the questions and answers so far, without the system text.
        images: their images and videos in the order of the placeholders.
        system: replaces the system text of the format, if set; UserError is raised if the format has none.
        last: statistics of the last answer, or None before the first answer.
    """

    def __init__(self, model: ChatModel, *, system: str | None = None) -> None:
        if system and model.encoder.format.system is None:
            raise UserError(f"format {model.encoder.format.name} has no place for a system text")
        self.model = model
        self.turns: list[Turn] = []
        self.images: list[Visual] = []
        self.system = system or None
        self.last: Stats | None = None
        self._cache: DynamicCache | None = None
        """Keys and values of `_read`, with which the next prompt usually begins."""
        self._read = Prompt([], [], [])

    @classmethod
    def from_turns(cls, model: ChatModel, turns: Sequence[Turn], images: Sequence[Visual]) -> ChatSession:
        """Return a session with existing turns. If the last one is the human's, `answer` continues it."""
        session = cls(model)
        session.turns, session.images = list(turns), list(images)
        return session

    def prompt_ids(self, turns: Sequence[Turn], images: Images) -> list[int]:
        """Return the token ids of the system text and `turns`, up to the start of the next answer."""
        system = [{"from": "system", "value": [{"type": "text", "text": self.system}]}] if self.system else []
        return self.model.encoder.prompt([*system, *turns], images, "this talk")

    def ask(
        self,
        text: str,
        images: Sequence[Visual] = (),
        sampling: Sampling = GREEDY,
        cancel: threading.Event | None = None,
    ) -> Generator[str, None, None]:
        """Stream the answer to a new question in pieces. Raises UserError for an empty question or a full context.

        Question and answer are added to `turns` when the stream ends or is closed, even if the answer was cancelled.
        """
        if not text.strip() and not images:
            raise UserError("the question is empty")
        question = {"from": "human", "value": [*({"type": "image"} for _ in images), {"type": "text", "text": text}]}
        return self._answer([*self.turns, question], [*self.images, *images], sampling, cancel)

    def answer(self, sampling: Sampling = GREEDY, cancel: threading.Event | None = None) -> Generator[str, None, None]:
        """Stream the answer to the last turn, which must be the human's."""
        return self._answer(self.turns, self.images, sampling, cancel)

    def keep(self, answers: int) -> None:
        """Cut the conversation after its first `answers` answers. 0 starts a new one."""
        self.turns = self.turns[: 2 * answers]
        parts = [part for turn in self.turns for part in turn["value"]]
        self.images = self.images[: sum(part["type"] == "image" for part in parts)]

    def _answer(
        self, turns: list[Turn], images: list[Visual], sampling: Sampling, cancel: threading.Event | None
    ) -> Generator[str, None, None]:
        """Check the prompt at once, then return the stream."""
        tokens = self.model.image_tokens(images)
        prompt = Prompt(turns, images, self.prompt_ids(turns, tokens))
        context = self.model.context_length
        if context is not None and len(prompt.ids) >= context:
            limit = f"{context:,} at most ({self.model.layout} for each image)"
            raise ContextError(f"the talk takes {len(prompt.ids):,} tokens, the model reads {limit}: start a new one")
        streamer = AnswerStreamer(self.model.processor.tokenizer, sampling.stop, cancel or threading.Event())
        return self._stream(prompt, sampling, streamer)

    def _stream(self, prompt: Prompt, sampling: Sampling, streamer: AnswerStreamer) -> Generator[str, None, None]:
        pieces: list[str] = []
        is_whole = False
        future = self.model.worker.submit(self._generate, prompt, sampling, streamer)
        future.add_done_callback(lambda _: streamer.text_queue.put(None))  # also after an error
        try:
            for piece in streamer:  # waits in the reader's thread
                pieces.append(piece)
                yield piece
            is_whole = True
        finally:  # also when the reader closes the stream or presses Ctrl-C
            if not is_whole:
                streamer.cancel.set()
            wait([future])  # the worker stops after its next token, and writes to this session's cache until then
            if future.exception() is None:
                answer = {"from": "gpt", "value": [{"type": "text", "text": "".join(pieces)}]}
                self.turns = [*prompt.turns, answer]
                self.images = prompt.images
                self.last = self._stats(streamer, len(prompt.ids), future.result())
        future.result()  # raises what the worker raised

    def _stats(self, streamer: AnswerStreamer, prompt_tokens: int, cached_tokens: int) -> Stats:
        has_ended = streamer.is_stopped or streamer.last_id in self.model.encoder.stop_ids
        return Stats(
            prompt_tokens=prompt_tokens,
            cached_tokens=cached_tokens,
            new_tokens=streamer.new_tokens,
            finish_reason="stop" if has_ended else "cancelled" if streamer.cancel.is_set() else "length",
        )

    @torch.inference_mode()
    def _generate(self, prompt: Prompt, sampling: Sampling, streamer: AnswerStreamer) -> int:
        """Generate into the streamer, in the worker's thread. Return how many prompt tokens came from the cache."""
        if streamer.cancel.is_set():
            return 0
        model: Any = self.model.model
        cache, shared, known = self._take_cache(prompt)
        read = torch.tensor([prompt.ids], device=model.device)
        inputs = {"input_ids": read, "attention_mask": torch.ones_like(read)}
        if known < len(prompt.images):
            images = []
            for image in prompt.images[known:]:  # one by one, because only the preprocessed image is kept
                if streamer.cancel.is_set():
                    return 0
                images.append(seen(self.model.processor, decoded(image, self.model.layout.frames)))
            inputs |= pixel_inputs(images, model)

        context = self.model.context_length
        room = sampling.max_new_tokens if context is None else min(sampling.max_new_tokens, context - len(prompt.ids))
        settings = answer_settings(self.model.encoder, room, sampling.temperature, sampling.top_p)
        # The random state is restored, so that the seed of one session does not affect another session.
        try:
            with nullcontext() if sampling.seed is None else seeded(model.device, sampling.seed):
                model.generate(
                    **inputs,  # image sizes, needed for tiles, stay on the host, which reads them
                    **{CACHE: cache},
                    generation_config=settings,
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList([streamer.is_done]),
                )
        except torch.OutOfMemoryError:
            raise UserError(f"the device has too little memory for a prompt of {len(prompt.ids):,} tokens") from None
        with suppress(RuntimeError, ValueError):  # a full sliding window cannot be cut
            surplus = cache.get_seq_length() - len(prompt.ids)
            if surplus:
                cache.crop(-surplus)
            self._cache = cache
            self._read = prompt
        return shared

    def _take_cache(self, prompt: Prompt) -> tuple[DynamicCache, int, int]:
        """Take the cache for `generate`, and return it with the number of tokens and images of `prompt` in it.

        `generate` changes it in place, so the session gets it back only after a complete answer.
        """
        cache, read = self._cache, self._read
        self._cache = None
        are_same = all(old is new for old, new in zip(read.images, prompt.images, strict=False))
        if cache is None or not are_same or prompt.ids[: len(read.ids)] != read.ids or prompt.ids == read.ids:
            return DynamicCache(config=self.model.model.config.get_text_config()), 0, 0
        return cache, len(read.ids), len(read.images)
