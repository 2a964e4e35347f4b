"""One talk about pictures, behind terminal, web page and server: its turns and its next answer.

Prompts come from `ConversationEncoder.prompt` alone, so chat sees the same tokens as training. `generate` of
transformers makes the answer's tokens. `PrefixCache` knows the part of a prompt that the model has read already, and
`AnswerStreamer` the text that may be shown.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Sequence
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteriaList

from clips.common.errors import UserError
from mllm.chat.model import GREEDY, ChatModel, Sampling, Stats
from mllm.chat.prefix_cache import PrefixCache
from mllm.chat.stream import AnswerStreamer, StopWhenDone
from mllm.chat.transcript import Picture, Turn, count_images, decoded, save_transcript, turn_text
from mllm.data.conversation import Images
from mllm.evaluation.batches import COLDEST, pixel_inputs, seen
from mllm.model.load import CACHE


class ContextError(UserError):
    """A talk is longer than the model's context."""


class ChatSession:
    """One talk: turns, pictures, and the cache of what the model has read of it.

    Attributes:
        turns: the questions and answers so far, without the system text.
        images: their pictures in the order of the placeholders.
        system: replaces the format's own system text, if set.
        last: statistics of the last answer; None before the first answer.
    """

    def __init__(self, model: ChatModel, *, system: str | None = None) -> None:
        self.model = model
        self.turns: list[Turn] = []
        self.images: list[Picture] = []
        self.last: Stats | None = None
        self.set_system(system)
        self._prefix = PrefixCache(model.encoder.placeholder_ids)

    @classmethod
    def from_turns(
        cls, model: ChatModel, turns: Sequence[Turn], images: Sequence[Picture], system: str | None = None
    ) -> ChatSession:
        """A talk from elsewhere; `answer` continues it if the last turn is the human's."""
        session = cls(model, system=system)
        session.turns, session.images = list(turns), list(images)
        return session

    def set_system(self, text: str | None) -> None:
        """Set the system text; None or "" is the format's own. Raises UserError if the format has no place for it."""
        if text and self.model.encoder.format.system is None:
            raise UserError(f"format {self.model.encoder.format.name} has no place for a system text")
        self.system = text or None

    def prompt_ids(self, turns: Sequence[Turn], images: Images) -> list[int]:
        """Token ids of the system text and `turns`, up to the start of the next answer."""
        system = [{"from": "system", "value": [{"type": "text", "text": self.system}]}] if self.system else []
        return self.model.encoder.prompt([*system, *turns], images, "this talk")

    def ask(
        self,
        text: str,
        images: Sequence[Picture] = (),
        sampling: Sampling = GREEDY,
        cancel: threading.Event | None = None,
    ) -> Generator[str, None, None]:
        """Stream the answer to a new question in pieces.

        Question and answer join `turns` when the stream ends or is closed; a cancelled answer stays as it is. Raises
        UserError at once for an empty question or a full context; the talk then stays as it was.
        """
        if not text.strip() and not images:
            raise UserError("the question is empty")
        question = {"from": "human", "value": [*({"type": "image"} for _ in images), {"type": "text", "text": text}]}
        return self._answer([*self.turns, question], [*self.images, *images], sampling, cancel)

    def answer(self, sampling: Sampling = GREEDY, cancel: threading.Event | None = None) -> Generator[str, None, None]:
        """Stream the answer to the last turn, which must be the human's."""
        return self._answer(self.turns, self.images, sampling, cancel)

    def retry(self, sampling: Sampling = GREEDY, cancel: threading.Event | None = None) -> Generator[str, None, None]:
        """Stream another answer to the last question; it replaces the old answer."""
        if not self.turns:
            raise UserError("there is no question yet")
        turns = self.turns[:-1] if self.turns[-1]["from"] == "gpt" else self.turns
        return self._answer(turns, self.images, sampling, cancel)

    def undo(self) -> str:
        """Remove the last question with its pictures and answer; returns the question's text."""
        if not self.turns:
            raise UserError("there is nothing to take back")
        if self.turns[-1]["from"] == "gpt":
            self.turns = self.turns[:-1]
        *self.turns, question = self.turns
        self.images = self.images[: len(self.images) - count_images(question)]
        return turn_text(question)

    def reset(self) -> None:
        """Start a new talk; the system text stays."""
        self.turns, self.images, self.last = [], [], None
        self._prefix.forget()

    def save(self, path: Path | str) -> list[Path]:
        """Write the talk to `path` (.json) and its pictures beside it, see `save_transcript`."""
        return save_transcript(path, self.turns, self.images, system=self.system, model=self.model.name)

    def _answer(
        self, turns: list[Turn], images: list[Picture], sampling: Sampling, cancel: threading.Event | None
    ) -> Generator[str, None, None]:
        """Check the prompt at once, then return the stream."""
        start = time.perf_counter()
        tokens = self.model.image_tokens(images)
        ids = self.prompt_ids(turns, tokens)
        context = self.model.context_length
        if context is not None and len(ids) >= context:
            raise ContextError(
                f"the talk takes {len(ids):,} tokens with this question, and the model reads {context:,} at most "
                f"({self.model.layout} for each picture): ask shorter, take turns back or start anew"
            )
        streamer = AnswerStreamer(self.model.processor.tokenizer, sampling.stop, cancel or threading.Event())
        return self._stream(turns, images, tokens, ids, sampling, streamer, start)

    def _stream(
        self,
        turns: list[Turn],
        images: list[Picture],
        tokens: list[int],
        ids: list[int],
        sampling: Sampling,
        streamer: AnswerStreamer,
        start: float,
    ) -> Generator[str, None, None]:
        said: list[str] = []
        heard_all = False
        future = self.model.worker.submit(self._generate, ids, images, tokens, sampling, streamer)
        future.add_done_callback(lambda _: streamer.pieces.put(None))
        try:
            for piece in iter(streamer.pieces.get, None):  # waits in the reader's thread
                said.append(piece)
                yield piece
            heard_all = True
        finally:  # also when the reader closes the stream or presses Ctrl-C
            streamer.cancelled |= not heard_all
            wait([future])  # the worker stops after its next token; until then it writes to this talk's cache
            if future.exception() is None:
                answer = {"from": "gpt", "value": [{"type": "text", "text": "".join(said)}]}
                self.turns, self.images = [*turns, answer], images
                self.last = streamer.stats(len(ids), future.result(), start, self.model.encoder.stop_ids)
        future.result()  # raises what the worker raised

    @torch.inference_mode()
    def _generate(
        self, ids: list[int], images: list[Picture], tokens: list[int], sampling: Sampling, streamer: AnswerStreamer
    ) -> int:
        """Feed the streamer, in the worker's thread; returns the number of prompt tokens from the cache."""
        if streamer.is_cancelled():
            return 0
        model: Any = self.model.model
        shared, known = self._prefix.reuse(ids, images, tokens)
        read = torch.tensor([ids], device=model.device)
        inputs = {"input_ids": read, "attention_mask": torch.ones_like(read)}
        if known < len(images):
            pictures = []
            for image in images[known:]:  # one after the other: only the encoder's view of each is kept
                if streamer.is_cancelled():
                    return 0
                pictures.append(seen(self.model.processor, decoded(image, self.model.layout.frames)))
            inputs |= pixel_inputs(pictures, model)
        cache = self._prefix.take(model.config.get_text_config())
        # The random state is restored: the seed of one talk must not repeat the answers of another talk.
        devices = [model.device] if model.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices, enabled=sampling.seed is not None):
                if sampling.seed is not None:
                    torch.manual_seed(sampling.seed)
                output = model.generate(
                    **inputs,  # sizes of pictures in tiles stay on the host, which reads them
                    **{CACHE: cache},
                    generation_config=self._settings(sampling, len(ids)),
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList([StopWhenDone(streamer)]),
                )
        except torch.OutOfMemoryError:
            raise UserError(
                f"the device has too little memory for a prompt of {len(ids):,} tokens: ask shorter or start anew"
            ) from None
        self._prefix.keep(cache, ids, output[0, len(ids) :].tolist(), images, tokens)
        return shared

    def _settings(self, sampling: Sampling, prompt_tokens: int) -> GenerationConfig:
        """Set every field that the model's own generation config could set."""
        encoder, context = self.model.encoder, self.model.context_length
        room = sampling.max_new_tokens if context is None else context - prompt_tokens
        pad = self.model.processor.tokenizer.pad_token_id
        greedy = sampling.temperature < COLDEST
        drawn = {} if greedy else {"temperature": float(sampling.temperature), "top_p": sampling.top_p, "top_k": 0}
        return GenerationConfig(
            do_sample=not greedy,
            max_new_tokens=min(sampling.max_new_tokens, room),
            repetition_penalty=1.0,
            num_beams=1,
            eos_token_id=encoder.stop_ids,
            pad_token_id=encoder.stop_ids[0] if pad is None else pad,
            **drawn,
        )
