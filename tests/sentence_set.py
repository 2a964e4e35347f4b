"""Captions whose sentences are known, drawn from the templates of data/sentences.json.

Every kind has templates that the rules of clips/data/sentences.py may be tuned on, and others, with other
abbreviations, that are held out: they were written before the rules and are looked at as figures only.

In a template `¶` ends a sentence (a space or a line end follows), `↵` ends it by a line end, `‖` by nothing; `{pool}`
draws from POOLS.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Part = Literal["tuned", "held_out"]
DATA = json.loads((Path(__file__).parent / "data" / "sentences.json").read_text(encoding="utf-8"))
POOLS: dict[str, str] = DATA["pools"]
TEMPLATES: dict[str, dict[Part, list[str]]] = DATA["templates"]
LOWER_CASE: dict[Part, list[str]] = DATA["lower_case"]
"""Whole captions without capitals, as some captioners and much alt text have them."""
PLAIN_SHARE, LOWER_SHARE = 0.4, 0.06
"""Of passages that are plain prose, and of captions without capitals."""


@dataclass(frozen=True)
class Known:
    """One caption, its sentences, and the kinds of the passages that it was put together from."""

    text: str
    sentences: list[str]
    kinds: tuple[str, ...]


def captions(count: int, part: Part, seed: int = 0) -> list[Known]:
    """`count` captions of 1 to 6 passages; the same for the same arguments."""
    rng = random.Random(f"{part}/{seed}")
    return [_caption(rng, part) for _ in range(count)]


def _caption(rng: random.Random, part: Part) -> Known:
    if rng.random() < LOWER_SHARE:
        kinds = ["lower case"] * rng.randint(2, 4)
        passages = [rng.choice(LOWER_CASE[part]) for _ in kinds]
    else:
        hard = [kind for kind in TEMPLATES if kind != "plain"]
        kinds = ["plain" if rng.random() < PLAIN_SHARE else rng.choice(hard) for _ in range(rng.randint(1, 6))]
        passages = [rng.choice(TEMPLATES[kind][part]) for kind in kinds]
    marked = ""
    for kind, passage in zip(kinds, passages, strict=True):
        # A passage that may end without a stop is followed by a line end, as it would be in print.
        marked += (
            "" if not marked else "↵" if kind in ("lists", "lines") or marked[-1] not in _CLOSED else "¶"
        ) + passage
    if kinds != ["lower case"] * len(kinds) and rng.random() < 0.1:
        marked = marked.rstrip(".")
    marked = re.sub(r"\{(\w+)\}", lambda m: rng.choice(POOLS[m[1]].split("|")), marked)
    spaces = re.sub("[¶↵‖]", lambda m: "\x00" + _gap(m[0], rng), marked)
    return Known(spaces.replace("\x00", ""), [s.strip() for s in spaces.split("\x00")], tuple(kinds))


_CLOSED = ".!?…。！？।؟”\"'’»)]*_"


def _gap(mark: str, rng: random.Random) -> str:
    if mark == "‖":
        return ""
    if mark == "↵":
        return "\n"
    return rng.choices((" ", "  ", "\n", "\n\n"), (88, 4, 6, 2))[0]


def boundaries(text: str, sentences: list[str]) -> set[int]:
    """Where a sentence other than the first begins in `text`, counted in characters that are not white space: how a
    splitter treats white space, and what it drops at a sentence's end, does not matter."""
    squeezed = "".join(text.split())
    found, position = set(), 0
    for sentence in sentences:
        piece = "".join(sentence.split())
        position = squeezed.index(piece, position)
        found.add(position)
        position += len(piece)
    return found - {0}


def score(split: Callable[[str], list[str]], known: Sequence[Known]) -> tuple[float, float]:
    """Precision and recall in % of the boundaries that `split` finds, over all captions together."""
    right = found = there = 0
    for caption in known:
        ours, theirs = boundaries(caption.text, split(caption.text)), boundaries(caption.text, caption.sentences)
        right, found, there = right + len(ours & theirs), found + len(ours), there + len(theirs)
    return 100 * right / found, 100 * right / there
