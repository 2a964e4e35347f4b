"""What the web page offers to talk with: the models, a line about each, and example questions."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from clips.common.errors import UserError
from clips.common.escape import LONGEST, for_markdown
from clips.common.hub import resolve
from mllm.chat.model import ChatModel
from mllm.data.demo import IMAGES, QUESTIONS
from mllm.data.questions import read_questions
from mllm.model.load import FACTS, model_name, newest_model, vision_facts

EXAMPLES = 6
"""Example questions on the page."""


class ModelPool:
    """The models by the names they were given by; each is loaded when it is first asked, and shared by all visitors."""

    def __init__(self, names: Sequence[str], load: Callable[[str], ChatModel]) -> None:
        self.names = list(names)
        self.lines = {name: about(name) for name in names}
        self._load, self._lock = load, threading.Lock()
        self._loaded: dict[str, ChatModel] = {}

    def get(self, name: str) -> ChatModel:
        if name not in self.names:  # what the browser sends is not trusted
            raise UserError(f"there is no model {name!r} here")
        with self._lock:
            if name not in self._loaded:
                self._loaded[name] = self._load(name)
            return self._loaded[name]

    def choices(self) -> list[tuple[str, str]]:
        """(label, name): the short name where it is clear."""
        short = list(map(model_name, self.names))
        return [(s if short.count(s) == 1 else name, name) for s, name in zip(short, self.names, strict=True)]


def about(name: str) -> str:
    """A line of Markdown: which model, which encoder, how many tokens an image takes. From files, nothing is loaded.

    The encoder is named where the model was saved here; of others it is what config.json says.
    """
    directory = resolve(name, "model")
    try:
        config = json.loads((directory / "config.json").read_text())
        llm, vision = config["text_config"]["model_type"], config["vision_config"]["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"model {name}: its config.json is not that of a LLaVA model ({error!r})") from None
    try:
        facts = vision_facts(directory)
        encoder = f"{vision}, {config.get('image_seq_length', '?')} tokens" if facts is None else _encoder(facts)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"model {name}: its {FACTS} is damaged ({error!r}); the model loads without it") from None
    return for_markdown(f"{model_name(name)} · language model {llm} · encoder {encoder}", LONGEST)


def _encoder(facts: dict[str, Any]) -> str:
    size, tokens, width = (int(facts[name]) for name in ("image_size", "num_tokens", "width"))
    padded = ", padded to a square" if facts["padded"] else ""
    return f"{facts['kind']} {facts['weights']}".strip() + f", {size} px{padded}, {tokens} tokens × {width}"


def example_questions(data: Path) -> list[tuple[str, str]]:
    """(picture, question) of demo test scenes, one of each kind of question first; none where `data` is not there."""
    if not (data / QUESTIONS).is_file():
        return []
    kinds: dict[str, list[tuple[str, str]]] = {}
    for question in read_questions(data / QUESTIONS):
        if question.image and (data / IMAGES / question.image).is_file():
            kinds.setdefault(question.kind, []).append((str(data / IMAGES / question.image), question.text))
    # One of each kind, then the second of each, …
    turns = zip(*(_padded(found, EXAMPLES) for found in kinds.values()), strict=True)
    return [example for turn in turns for example in turn if example][:EXAMPLES]


def _padded(items: list[Any], length: int) -> list[Any]:
    return [*items[:length], *[None] * (length - len(items))]


def trained_models(runs: Path) -> list[str]:
    """Directories of the models under `runs`, newest first; UserError where there is none."""
    newest = newest_model(runs)  # says what to do where there is none
    found = sorted(runs.glob("*/model/config.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    return list(dict.fromkeys(map(str, [newest, *(path.parent for path in found)])))
