"""A talk as a list of turns, and the pictures and videos that its turns show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from PIL.Image import Image

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
    """A video that is decoded when the model reads it; raises UserError if it cannot be."""

    decode: Callable[[int], list[Image]]
    """The number of frames → the frames."""


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


def count_images(turn: Turn) -> int:
    return sum(part["type"] == "image" for part in turn["value"])
