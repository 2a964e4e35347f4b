"""A conversation as a list of turns, and the images and videos that its turns show."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from PIL.Image import Image

from mllm.chat.limits import Limits, image_size, read_image, read_video
from mllm.data.video import VIDEO, Size, is_video

Turn = dict[str, Any]
"""`{"from": "human" | "gpt", "value": [{"type": "image"}, …, {"type": "text", "text": …}]}`"""


@dataclass(frozen=True, eq=False)
class LazyImage:
    """An image that is decoded only when the model reads it. Both functions raise UserError if the image is broken."""

    decode: Callable[[], Image]
    measure: Callable[[], Size]
    """Returns (height, width) without decoding the image."""

    @cached_property
    def size(self) -> Size:
        """The result of `measure`, which is called only once."""
        return self.measure()


@dataclass(frozen=True, eq=False)
class Video:
    """A video that is decoded only when the model reads it."""

    decode: Callable[[int], list[Image]]
    """Takes the number of frames and returns the frames. Raises UserError if the video is broken."""


Visual = Image | LazyImage | Video
"""What a turn can show. A video counts as an image too."""


def open_visual(data: bytes, name: str, limits: Limits) -> LazyImage | Video:
    """Return the image in `data` or, by its file name, the video. Raises UserError if it cannot be decoded.

    It is decoded again when the model reads it, because keeping decoded images would take far more memory.
    """
    if is_video(name):
        read_video(data, 1)
        return Video(partial(read_video, data))
    read_image(data, limits)
    return LazyImage(partial(read_image, data, limits), partial(image_size, data, limits))


def decoded(image: Visual, frames: int) -> Image | list[Image]:
    """Decode an image, or `frames` frames of a video. Raises UserError if that fails."""
    if isinstance(image, Video):
        return image.decode(frames)
    return image if isinstance(image, Image) else image.decode()


def size_of(image: Visual) -> Size:
    """Return (height, width), or VIDEO for a video. Raises UserError if the header of an image is broken."""
    if isinstance(image, Video):
        return VIDEO
    return (image.height, image.width) if isinstance(image, Image) else image.size
