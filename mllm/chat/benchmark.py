"""What the chat costs beside bare `model.generate`, and what its kept cache saves.

Both sides of a comparison take turns within one run and each pair gives one ratio; the median of the ratios counts,
so a machine that is slower for a while slows both sides of a pair.
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm
from transformers.generation.streamers import BaseStreamer

from clips.common.errors import UserError
from clips.common.escape import for_rich
from clips.common.files import write_json
from mllm.chat.model import ChatModel, Sampling
from mllm.chat.session import ChatSession
from mllm.encoders.registry import image_pixels

QUESTIONS = ("Describe the picture in detail.", "And what is at the left of it?")
TARGETS = {
    "time to first token, chat : bare generate": ("at most", 1.10),
    "tokens/s, chat : bare generate": ("at least", 0.90),
    "second turn's first token, kept cache : encoding all again": ("at most", 1 / 3),
}


def benchmark_chat(
    name: str | None, *, device: str, dtype: str, repeats: int, new_tokens: int, out: str | None
) -> dict[str, Any]:
    """Measure, print a table, write it to `out` as JSON with the machine it ran on; returns what was written.

    Each answer has exactly `new_tokens` tokens, whatever the model says.
    """
    if repeats < 1 or new_tokens < 2:
        raise UserError(f"--repeats {repeats} must be at least 1, --new-tokens {new_tokens} at least 2")
    model = ChatModel.load(name, device=device, dtype=dtype)
    model.encoder.stop_ids = [model.encoder.image_id]  # which no model says: nothing ends an answer early
    sampling, image = Sampling(max_new_tokens=new_tokens), Image.radial_gradient("L").convert("RGB")

    def bare() -> tuple[float, float]:
        return _bare(model, prompt, image, new_tokens)

    def chat() -> tuple[float, float]:
        return _last(ChatSession(model), lambda session: session.ask(QUESTIONS[0], [image], sampling))

    def kept() -> tuple[float, float]:
        session = ChatSession(model)
        list(session.ask(QUESTIONS[0], [image], sampling))
        turns[:] = session.turns
        return _last(session, lambda session: session.ask(QUESTIONS[1], (), sampling))

    def again() -> tuple[float, float]:
        question = {"from": "human", "value": [{"type": "text", "text": QUESTIONS[1]}]}
        session = ChatSession.from_turns(model, [*turns, question], [image])
        return _last(session, lambda session: session.answer(sampling))

    turns: list[Any] = []
    question = {"from": "human", "value": [{"type": "image"}, {"type": "text", "text": QUESTIONS[0]}]}
    prompt = ChatSession(model).prompt_ids([question], 1)
    beside, second = _take_turns(chat, bare, repeats, "chat, bare"), _take_turns(kept, again, repeats, "second turn")
    pairs = [[(a[0], b[0]) for a, b in beside], [(a[1], b[1]) for a, b in beside], [(a[0], b[0]) for a, b in second]]
    rows = [_row(title, measured) for title, measured in zip(TARGETS, pairs, strict=True)]
    on = model.model.device
    result = {
        "model": model.name,
        "prompt_tokens": len(prompt),
        "new_tokens": new_tokens,
        "repeats": repeats,
        "machine": {
            "device": torch.cuda.get_device_name(on) if on.type == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
            "dtype": str(model.model.dtype).removeprefix("torch."),
            "platform": platform.platform(),
            "torch": torch.__version__,
            "load_average": os.getloadavg()[0],
        },
        "rows": rows,
    }
    _print(result)
    if out:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(out), result)
        print(f"wrote {out}\nNext: python scripts/chat.py --stats", file=sys.stderr)
    return result


Measured = tuple[float, float]
"""Seconds to the first token, tokens per second after it."""


def _take_turns(
    first: Callable[[], Measured], second: Callable[[], Measured], repeats: int, title: str
) -> list[tuple[Measured, Measured]]:
    """Pairs of both sides' figures, after one pair to warm up; `first` goes first because `second` may need it."""
    return [(first(), second()) for _ in tqdm(range(repeats + 1), desc=title, unit="pair")][1:]


def _last(session: ChatSession, answer: Callable[[ChatSession], Any]) -> Measured:
    list(answer(session))
    assert session.last is not None  # an answer has come to its end
    return session.last.first_token_s, session.last.tokens_per_s


class _Clock(BaseStreamer):
    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        self.times = self.times[1:]  # the first one is the prompt's


def _bare(model: ChatModel, prompt: list[int], image: Image.Image, new_tokens: int) -> Measured:
    """The stock way, once the prompt's ids are known: preprocess the picture and call `generate`."""
    clock, begin = _Clock(), time.perf_counter()
    pixels = image_pixels(model.processor.image_processor, image)[None]
    ids = torch.tensor([prompt], device=model.model.device)
    model.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=pixels.to(model.model.device, model.model.dtype),
        do_sample=False,
        max_new_tokens=new_tokens,
        eos_token_id=model.encoder.stop_ids,
        pad_token_id=model.encoder.stop_ids[0],
        streamer=clock,
    )
    return clock.times[0] - begin, (len(clock.times) - 1) / (clock.times[-1] - clock.times[0])


def _row(title: str, pairs: list[tuple[float, float]]) -> dict[str, Any]:
    ratio = statistics.median(a / b for a, b in pairs)
    kind, target = TARGETS[title]
    return {
        "figure": title,
        "first": statistics.median(a for a, _ in pairs),
        "second": statistics.median(b for _, b in pairs),
        "ratio": ratio,
        "target": f"{kind} {target:.2f}",
        "met": ratio <= target if kind == "at most" else ratio >= target,
    }


def _print(result: dict[str, Any]) -> None:
    title = f"{result['model']} on {result['machine']['device']}, {result['machine']['dtype']}"
    table = Table("figure", "first", "second", "ratio", "target", "met", title=for_rich(title), title_justify="left")
    for row in result["rows"]:
        figures = (f"{row[key]:.4g}" for key in ("first", "second", "ratio"))
        table.add_row(row["figure"], *figures, row["target"], "yes" if row["met"] else "NO")
    Console(emoji=False, width=None if sys.stdout.isatty() else 140).print(table)
