"""The offer of the web page: models with a line about each, encoders, and example questions."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, Generic, TypeVar

from clips import CLIPS, CONCEPTS, newest_export
from clips.common.errors import UserError
from clips.common.escape import LONGEST, for_markdown
from clips.common.files import from_json, read_bytes, read_json_records
from clips.common.hub import resolve
from mllm.data.demo import IMAGES, QUESTIONS
from mllm.data.questions import images_of, read_questions
from mllm.model.load import FACTS, data_of, model_name, newest_model, vision_facts

EXAMPLES = 6
"""Example questions on the page."""
T = TypeVar("T")


class Pool(Generic[T]):
    """Models by name. The first use loads a model, and all visitors share it."""

    def __init__(self, loaders: Mapping[str, Callable[[], T]]) -> None:
        self.names = list(loaders)
        self._loaders, self._lock = loaders, threading.Lock()
        self._loaded: dict[str, T] = {}

    def get(self, name: str) -> T:
        """Raises UserError for an unknown name: the browser sends it."""
        if name not in self._loaders:
            raise UserError(f"there is no model {name!r} here")
        with self._lock:
            if name not in self._loaded:
                self._loaded[name] = self._loaders[name]()
            return self._loaded[name]


def choices(names: list[str]) -> list[tuple[str, str]]:
    """(label, name); the label is the short name if no other model has it."""
    short = list(map(model_name, names))
    return [(s if short.count(s) == 1 else name, name) for s, name in zip(short, names, strict=True)]


def about(name: str) -> str:
    """A line of Markdown from the model's files: its name, language model, encoder and tokens of an image.

    Raises UserError if config.json is not that of a LLaVA model. A model saved here knows its encoder's name; for
    other models the line shows the kind of vision tower.
    """
    directory = resolve(name, "model")
    try:
        config = from_json(read_bytes(directory / "config.json"))
        llm, vision = config["text_config"]["model_type"], config["vision_config"]["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"model {name}: its config.json is not that of a LLaVA model ({error!r})") from None
    try:
        facts = vision_facts(directory)
        encoder = f"{vision}, {config.get('image_seq_length', '?')} tokens" if facts is None else _encoder(facts)
    except (UserError, OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"model {name}: its {FACTS} is damaged ({error!r}); the model loads without it") from None
    line = for_markdown(f"{model_name(name)} · language model {llm} · encoder {encoder}", LONGEST)
    data = data_of(directory)
    if "demo" in data:
        return f"**Trained on drawings of {len(CONCEPTS)} things; it knows nothing else.** {line}"
    return f"**Trained on {for_markdown(', '.join(data), LONGEST)}.** {line}" if data else line


@lru_cache
def takes_videos(name: str) -> bool:
    """Whether a model of which `about` has a line takes videos, as `Layout.of` reads its config.

    Kept like that line: the page asks whenever a visitor chooses a model, and a hub id is looked up in the network.
    """
    config = from_json(read_bytes(resolve(name, "model") / "config.json"))
    return bool(config.get("image_grid_pinpoints") and config.get("num_frames"))


def _encoder(facts: dict[str, Any]) -> str:
    size, tokens, width = (int(facts[name]) for name in ("image_size", "num_tokens", "width"))
    padded = ", padded to a square" if facts["padded"] else ""
    padded = f", whole and up to {int(facts['tiles'])} tiles" if facts.get("tiles") else padded
    return f"{facts['kind']} {facts['weights']}".strip() + f", {size} px{padded}, {tokens} tokens × {width}"


def example_questions(data: Path, model: str | Path = "") -> list[tuple[str, str]]:
    """(picture, question) of demo test scenes, one of each kind of question first; none if `data` does not exist.

    If `model` was measured, these are questions that it answered rightly. A model of other data has no examples.
    """
    learned = data_of(model) if model else []
    if not (data / QUESTIONS).is_file() or (learned and "demo" not in learned):
        return []
    answers = Path(model).parent / "evaluation" / "answers.jsonl"
    lines = read_json_records(answers) if answers.is_file() else []
    right = {(images_of(line), line["prompt"]) for line in lines if line.get("correct")}
    kinds: dict[str, list[tuple[str, str]]] = {}
    for question in read_questions(data / QUESTIONS):
        if right and (question.images, question.text) not in right:
            continue
        if len(question.images) == 1 and (path := data / IMAGES / question.images[0]).is_file():
            kinds.setdefault(question.kind, []).append((str(path), question.text))
    turns = zip_longest(*kinds.values())  # one of each kind, then the second of each, …
    return [example for turn in turns for example in turn if example][:EXAMPLES]


def example_things(data: Path, shows: Callable[[Path, str, str], float]) -> list[tuple[str, str]]:
    """(picture, thing in it) of demo test scenes, for the map of patches; none if `data` does not exist.

    Those come first whose map points best at the thing: `shows` is told picture, thing and question. It encodes a
    picture, while the page waits: only EXAMPLES scenes are looked at.
    """
    if not (data / QUESTIONS).is_file():
        return []
    named = [q for q in read_questions(data / QUESTIONS) if q.kind == "identity" and q.images and q.answer]
    chosen = [(data / IMAGES / q.images[0], re.sub("^An? ", "", str(q.answer)), q.text) for q in named[:EXAMPLES]]
    chosen.sort(key=lambda example: -shows(*example))  # stable
    return [(str(path), thing) for path, thing, _ in chosen]


def trained_models(runs: Path) -> list[str]:
    """Directories of the models under `runs`, newest first. Raises UserError if there is no model."""
    newest = newest_model(runs)
    found = sorted(runs.glob("*/model/config.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    return list(dict.fromkeys(map(str, [newest, *(path.parent for path in found)])))


def trained_encoders(runs: Path, device: str) -> Pool[CLIPS]:
    """The newest CLIPS export and the newest CLIP export under `runs`."""
    loaders = {}
    for objective in ("clips", "clip"):
        with contextlib.suppress(UserError):  # no run of this objective
            export = newest_export(runs, objective)
            loaders[f"{objective} · {export.parent.name}"] = partial(CLIPS.from_pretrained, export, device=device)
    return Pool(loaders)
