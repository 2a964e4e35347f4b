"""The samples that a source returns, how their cells are named, and the error of a broken sample."""

import itertools
import math
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from clips.common.paths import without_secrets


def mend_broken(share: float) -> str:
    """Say what to do with data of which `share` is broken; the limit in the message is above that share."""
    if share > 0.9:
        return "No accident: name the right columns with --fields, or the folder of the images with --image-root"
    limit = min(1.0, math.floor(100 * share + 2) / 100)
    return f"Take them out of the data, or train with more of them: --set data.max_broken_share={limit:g}"


@dataclass(frozen=True)
class Texts:
    """The captions of one image by field. A field that holds a list gives several."""

    web: tuple[str, ...]
    long: tuple[str, ...] = ()
    others: bool = False
    """True if the long caption is made of the web captions that are not drawn (`Fields.long` = "others")."""

    def pair(self, number: int = 0) -> tuple[str, str | None]:
        """Return web caption `number` with its long caption. Several long ones are joined, without the web caption."""
        web = self.web[number]
        if self.others or len(self.long) > 1:
            return web, joined(self.web if self.others else self.long, without=web) or None
        return web, next(iter(self.long), None)

    def draw(self, rng: random.Random) -> tuple[str, str | None]:
        """Draw the pair of one step. Only several web captions take numbers from `rng`.

        With `others`, `DRAWN` of the other captions are joined, because all of them would repeat the same things.
        """
        if self.others:
            web, *others = rng.sample(self.web, len(self.web))
            return web, joined(others, without=web, most=DRAWN) or None
        return self.pair(int(rng.random() * len(self.web)) if len(self.web) > 1 else 0)

    def draw_one(self, rng: random.Random, synthetic_share: float) -> str:
        """Draw the only caption that CLIP reads in a step: one of all, if there are several of a kind.

        Of a single pair it is the long caption in `synthetic_share` of the steps (paper, section 4.1).
        """
        captions = self.web + self.long
        if self.others or len(self.web) > 1 or len(self.long) > 1:
            return captions[int(rng.random() * len(captions))]
        use_long = rng.random() < synthetic_share
        return self.long[0] if use_long and self.long else self.web[0]


MAX_CAPTION = 20_000
"""Characters of a field's captions that are kept, ten times the length of a long caption."""
DRAWN = 2
"""Number of other captions that make the long caption of a step."""
STOPS = (".", "!", "?", "。", "！", "？")


def joined(captions: Iterable[str], without: str, most: int | None = None) -> str:
    """Join at most `most` captions as sentences of one text: each ends with a stop, none repeats one or `without`."""
    sentences = {_plain(caption): caption for caption in captions}
    sentences.pop(_plain(without), None)
    texts = list(sentences.values())[:most]
    return " ".join(text if text.endswith(STOPS) else f"{text}." for text in texts)


def _plain(caption: str) -> str:
    return " ".join(caption.casefold().split()).rstrip(" .!")


@dataclass(frozen=True)
class RawSample:
    """One image with its texts, nothing decoded yet."""

    key: str
    """The sample's name in messages: shard and key, or table and row with the image's path."""
    image: bytes
    texts: Texts
    extra: dict[str, Any] = field(default_factory=dict)
    """The rest of the sample's JSON member or table row (label, captions, …)."""

    @property
    def web(self) -> str:
        """The first web caption."""
        return self.texts.web[0]

    @property
    def long(self) -> str | None:
        """The long caption, which accompanies the first web caption."""
        return self.texts.pair()[1]


class BrokenSample(Exception):
    """One sample cannot be used; training counts it and takes a substitute."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(key, reason)
        self.key = without_secrets(key)
        self.reason = without_secrets(reason)

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}"


def flat(cells: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the names and values of cells. The key b of an object in cell a is `a.b`, but an image is one cell."""
    for name, value in cells.items():
        if isinstance(value, dict) and not {"bytes", "path"} & value.keys():
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def cell_of(cells: Mapping[str, Any], name: str) -> Any:
    """Return the cell that `flat` calls `name`, or None if there is none."""
    first, is_nested, rest = name.partition(".")
    if name in cells or not is_nested:
        return cells.get(name)
    inner = cells.get(first)
    return cell_of(inner, rest) if isinstance(inner, dict) else None


def image_in(cell: Any) -> Any:
    """Return the bytes or the path in an image's cell; in the datasets library it is {"bytes": …, "path": …}."""
    if isinstance(cell, dict):
        data = cell.get("bytes")
        return data if data and isinstance(data, bytes) else cell.get("path")
    return cell


def texts_in(key: str, name: str, cells: Iterable[Any]) -> list[str]:
    """Return the captions in cells, texts or lists of texts; skip empty ones and what exceeds MAX_CAPTION.

    Raises BrokenSample for a cell of another type.
    """
    captions = []
    room = MAX_CAPTION
    for text in itertools.chain.from_iterable(cell if isinstance(cell, list) else [cell] for cell in cells):
        if text is not None and not isinstance(text, str):
            raise BrokenSample(key, f"{name} caption is {type(text).__name__}, not text")
        if text and text.strip() and room > 0:
            captions.append(text[:room].strip())
            room -= len(text)
    return captions
