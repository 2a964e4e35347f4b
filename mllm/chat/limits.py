"""The flags of chat.py and serve.py; pictures and videos from bytes within bounds. Nothing heavy is imported here."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, TypeVar

from clips.common.errors import UserError
from clips.common.flags import option

if TYPE_CHECKING:
    from PIL import Image

T = TypeVar("T")
KEPT_PIXELS = 4_000_000
"""Pixels that a picture keeps; every encoder reads fewer."""
MOST_VALUES = 10_000
"""Commas and brackets of a body beside those in its texts: each JSON value has one and takes up to 500 bytes."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Each field is the flag `--max-FIELD` of serve.py. Raises UserError for a limit that allows nothing."""

    body_bytes: int = option(32 * 2**20, "bytes of one request, pictures included")
    image_bytes: int = option(10 * 2**20, "bytes of one encoded picture")
    image_pixels: int = option(32_000_000, "pixels of one picture (never above clips.data.images.MAX_PIXELS)")
    images: int = option(20, "pictures of one request")
    squares: int = option(100, "squares that the encoder reads for one request: tiles of pictures, frames of videos")
    prompt_chars: int = option(100_000, "characters of all texts of one request")
    new_tokens: int = option(1024, "tokens of one answer")
    waiting: int = option(16, "requests that wait while another one is answered; more are refused")
    body_seconds: float = option(30.0, "seconds that a request's body may take to arrive")
    seconds: float = option(120.0, "seconds that one answer may take before it is cut off")

    def __post_init__(self) -> None:
        for field in fields(self):
            least = 0 if field.name == "waiting" else 1
            if not getattr(self, field.name) >= least:
                raise UserError(f"--max-{field.name.replace('_', '-')} must be at least {least}")


def check_values(body: bytes, limits: Limits) -> None:
    """Raise UserError if a body of JSON has too many values."""
    if sum(map(body.count, (b",", b"[", b"{"))) > limits.prompt_chars + MOST_VALUES:
        raise UserError("the body has too many JSON values")


def read_image(data: bytes, limits: Limits) -> Image.Image:
    """The picture in `data` as upright RGB of at most KEPT_PIXELS. Raises UserError for bad or too large data."""
    from clips import decode_image

    return _read(decode_image, data, limits)


def image_size(data: bytes, limits: Limits) -> tuple[int, int]:
    """(height, width) of `read_image`'s picture from its header. Raises UserError as `read_image`."""
    from clips import decoded_size

    return _read(decoded_size, data, limits)


def _read(reader: Callable[..., T], data: bytes, limits: Limits) -> T:
    from clips import MAX_PIXELS, BrokenSample

    if len(data) > limits.image_bytes:
        raise UserError(f"the picture has {len(data):,} bytes, the limit is {limits.image_bytes:,}")
    try:
        return reader(data, max_pixels=min(limits.image_pixels, MAX_PIXELS), reduce_to=KEPT_PIXELS)
    except BrokenSample as broken:
        reason = re.sub(r" <_io.*?>", "", broken.reason.removeprefix("image: "))  # Pillow names its buffer
        raise UserError(f"the picture cannot be read: {reason}") from None


def read_video(data: bytes, frames: int) -> list[Image.Image]:
    """`frames` frames of the video in `data`. Raises UserError for bad or too large data."""
    from clips import BrokenSample
    from mllm.data.video import decode_video

    try:
        return decode_video(data, frames)
    except BrokenSample as broken:
        raise UserError(f"the video cannot be read: {broken.reason.removeprefix('video: ')}") from None


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `mllm.chat.model.model_options`, and --model."""
    add = parser.add_argument
    add("--model", metavar="DIR_OR_HUB_ID", help="model to talk with (default: the newest runs/*/model)")
    add("--conv-mode", default="auto", help="conversation format: auto (as trained), v1, chatml, llama_3 or plain")
    bits = parser.add_mutually_exclusive_group()
    bits.add_argument("--load-4bit", action="store_true", help="load the language model in 4 bits (bitsandbytes)")
    bits.add_argument("--load-8bit", action="store_true", help="load the language model in 8 bits (bitsandbytes)")
    add("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="arithmetic of the model")
    add("--device", default="auto", help="auto, cpu or cuda")
