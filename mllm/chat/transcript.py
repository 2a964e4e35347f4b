"""A talk as a list of turns, and as a file: LLaVA's JSON, which is training data, with what it shows beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL.Image import Image

from clips.common.errors import UserError, reason
from mllm.data.formats import IMAGE_TOKEN
from mllm.data.video import VIDEO, Size

Turn = dict[str, Any]
"""`{"from": "human" | "gpt", "value": [{"type": "image"}, …, {"type": "text", "text": …}]}`"""


@dataclass(frozen=True, eq=False)
class LazyPicture:
    """A picture that is decoded when the model reads it; both functions raise UserError if they cannot."""

    decode: Callable[[], Image]
    measure: Callable[[], Size]
    """Its (height, width), for which nothing is decoded."""

    @cached_property
    def size(self) -> Size:
        """What `measure` gives; the header is read once."""
        return self.measure()


@dataclass(frozen=True, eq=False)
class Video:
    """A video that is decoded when the model reads it; both functions raise UserError if they cannot."""

    decode: Callable[[int], list[Image]]
    """The number of frames → the frames."""
    read: Callable[[], bytes]
    """The encoded video."""


Picture = Image | LazyPicture | Video
"""What a turn shows; also a video is one of the talk's pictures."""


def decoded(picture: Picture, frames: int) -> Image | list[Image]:
    """The picture, or `frames` frames of a video. Raises UserError if it cannot be decoded."""
    if isinstance(picture, Video):
        return picture.decode(frames)
    return picture if isinstance(picture, Image) else picture.decode()


def size_of(picture: Picture) -> Size:
    """(height, width), or VIDEO. Raises UserError if the picture has no header."""
    if isinstance(picture, Video):
        return VIDEO
    return (picture.height, picture.width) if isinstance(picture, Image) else picture.size


def turn_text(turn: Turn) -> str:
    """The text of a turn, without its pictures."""
    return "".join(part["text"] for part in turn["value"] if part["type"] == "text").strip()


def count_images(turn: Turn) -> int:
    return sum(part["type"] == "image" for part in turn["value"])


def save_transcript(
    path: Path | str, turns: Sequence[Turn], images: Sequence[Picture], *, system: str | None, model: str
) -> list[Path]:
    """Write the talk as LLaVA's JSON, and its pictures as PNGs and its videos beside it; returns the files.

    A text with a typed `<image>` is written as a list of parts, so it stays text. Raises UserError if `path` does not
    end in .json or cannot be written.
    """
    path = Path(path)
    if path.suffix != ".json":
        raise UserError(f"{path}: name it .json (LLaVA's format)")
    names = [f"{path.stem}_{i}.{'mp4' if isinstance(image, Video) else 'png'}" for i, image in enumerate(images)]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_llava(turns, names, path.stem, system, model), encoding="utf-8")
        for name, image in zip(names, images, strict=True):
            if isinstance(image, Video):  # an .mkv too: programs look at the content
                path.with_name(name).write_bytes(image.read())
            else:
                (image if isinstance(image, Image) else image.decode()).save(path.with_name(name))
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
