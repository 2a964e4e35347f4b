"""A talk as a list of turns, and as a file: LLaVA's JSON, which is training data, with pictures beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL.Image import Image

from clips.common.errors import UserError, reason
from mllm.data.formats import IMAGE_TOKEN

Turn = dict[str, Any]
"""`{"from": "human" | "gpt", "value": [{"type": "image"}, …, {"type": "text", "text": …}]}`"""


@dataclass(frozen=True, eq=False)
class LazyPicture:
    """A picture that is decoded when the model reads it; both functions raise UserError if they cannot."""

    decode: Callable[[], Image]
    measure: Callable[[], tuple[int, int]]
    """Its (height, width), for which nothing is decoded."""


Picture = Image | LazyPicture


def decoded(picture: Picture) -> Image:
    """Raises UserError if the picture cannot be decoded."""
    return picture if isinstance(picture, Image) else picture.decode()


def size_of(picture: Picture) -> tuple[int, int]:
    """(height, width). Raises UserError if the picture has no header."""
    return (picture.height, picture.width) if isinstance(picture, Image) else picture.measure()


def turn_text(turn: Turn) -> str:
    """The text of a turn, without its pictures."""
    return "".join(part["text"] for part in turn["value"] if part["type"] == "text").strip()


def count_images(turn: Turn) -> int:
    return sum(part["type"] == "image" for part in turn["value"])


def save_transcript(
    path: Path | str, turns: Sequence[Turn], images: Sequence[Picture], *, system: str | None, model: str
) -> list[Path]:
    """Write the talk as LLaVA's JSON, and its pictures as PNGs beside it; returns the files.

    A text with a typed `<image>` is written as a list of parts, so it stays text. Raises UserError if `path` does not
    end in .json or cannot be written.
    """
    path = Path(path)
    if path.suffix != ".json":
        raise UserError(f"{path}: name it .json (LLaVA's format)")
    names = [f"{path.stem}_{number}.png" for number in range(len(images))]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_llava(turns, names, path.stem, system, model), encoding="utf-8")
        for name, image in zip(names, images, strict=True):
            decoded(image).save(path.with_name(name))
    except OSError as error:
        raise UserError(f"{path} cannot be written: {reason(error)}") from None
    return [path, *(path.with_name(name) for name in names)]


def _llava(turns: Sequence[Turn], names: list[str], title: str, system: str | None, model: str) -> str:
    said = [{"from": "system", "value": system}] if system else []
    for turn in turns:
        text, value = turn_text(turn), turn["value"]
        if turn["from"] == "gpt" or IMAGE_TOKEN not in text:
            value = "\n".join([*[IMAGE_TOKEN] * count_images(turn), text])
        said.append({"from": turn["from"], "value": value})
    record = {"id": title, "image": names, "conversations": said, "model": model}
    return json.dumps([record], indent=2, ensure_ascii=False) + "\n"
