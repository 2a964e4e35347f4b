"""The flags of chat.py and serve.py, and decoding of images and videos within limits. It imports nothing heavy."""

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
"""Larger images are reduced to so many pixels, which is more than any encoder reads."""
MOST_VALUES = 10_000
"""Most commas and brackets of a body outside of texts. Each JSON value has one, and may take 500 bytes of memory."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The limits of a server. Each field is the flag `--max-FIELD` of serve.py. Raises UserError if one is too low."""

    body_bytes: int = option(32 * 2**20, "bytes of one request, including its images")
    image_bytes: int = option(10 * 2**20, "bytes of one encoded image")
    image_pixels: int = option(32_000_000, "pixels of one image (at most clips.data.images.MAX_PIXELS)")
    images: int = option(20, "images in one request")
    crops: int = option(100, "image crops that the encoder reads for one request: tiles of images, frames of videos")
    prompt_chars: int = option(100_000, "characters of all texts in one request")
    new_tokens: int = option(1024, "tokens of one answer")
    waiting: int = option(16, "requests that may wait while another one is answered; more are refused")
    body_seconds: float = option(30.0, "seconds that a request's body may take to arrive")
    seconds: float = option(120.0, "seconds that one answer may take before it is cut off")

    def __post_init__(self) -> None:
        for field in fields(self):
            least = 0 if field.name == "waiting" else 1
            if not getattr(self, field.name) >= least:
                raise UserError(f"--max-{field.name.replace('_', '-')} must be at least {least}")


def check_values(body: bytes, limits: Limits) -> None:
    """Raise UserError if a JSON body has too many values."""
    if sum(map(body.count, (b",", b"[", b"{"))) > limits.prompt_chars + MOST_VALUES:
        raise UserError("the body has too many JSON values")


def read_image(data: bytes, limits: Limits) -> Image.Image:
    """Decode an image to upright RGB of at most KEPT_PIXELS. Raises UserError if it is broken or too large."""
    from clips import decode_image

    return _read(decode_image, data, limits)


def image_size(data: bytes, limits: Limits) -> tuple[int, int]:
    """Read (height, width) of the image that `read_image` would return from its header, with the same errors."""
    from clips import decoded_size

    return _read(decoded_size, data, limits)


def _read(reader: Callable[..., T], data: bytes, limits: Limits) -> T:
    from clips import MAX_PIXELS, BrokenSample

    if len(data) > limits.image_bytes:
        raise UserError(f"the image has {len(data):,} bytes, the limit is {limits.image_bytes:,}: send a smaller one")
    try:
        return reader(data, max_pixels=min(limits.image_pixels, MAX_PIXELS), reduce_to=KEPT_PIXELS)
    except BrokenSample as broken:
        reason = re.sub(r" <_io.*?>", "", broken.reason.removeprefix("image: "))  # Pillow shows its buffer
        raise UserError(f"the image cannot be read: {reason}") from None


def read_video(data: bytes, frames: int) -> list[Image.Image]:
    """Decode `frames` frames of a video. Raises UserError if it is broken or too large."""
    from clips import BrokenSample
    from mllm.data.video import decode_video

    try:
        return decode_video(data, frames)
    except BrokenSample as broken:
        raise UserError(f"the video cannot be read: {broken.reason.removeprefix('video: ')}") from None


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Add --model and the flags that `mllm.chat.model.model_options` reads."""
    add = parser.add_argument
    add("--model", metavar="DIR_OR_HUB_ID", help="model to chat with (default: the newest runs/*/model)")
    add("--conv-mode", default="auto", help="conversation format: auto (as trained), v1, chatml, llama_3 or plain")
    bits = parser.add_mutually_exclusive_group()
    bits.add_argument("--load-4bit", action="store_true", help="load the language model in 4 bits (bitsandbytes)")
    bits.add_argument("--load-8bit", action="store_true", help="load the language model in 8 bits (bitsandbytes)")
    add(
        "--dtype",
        choices=["auto", "float32", "bfloat16"],
        default="auto",
        help="auto is bfloat16 if the device supports it",
    )
    add("--device", default="auto", help="auto, cpu or cuda")
