"""Decoding and preprocessing of images; the only file of the project that opens an image file.

Images are untrusted input, so the limits below bound memory and time before a decoder spends them. Every error of a
decoder becomes a `BrokenSample`; training skips and counts it.

Shapes: H, W of an image, or of what it is resized to · B batch.
"""

from __future__ import annotations

import io
import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageEnhance, ImageFile, ImageOps, PngImagePlugin, UnidentifiedImageError

from clips.config import AugmentConfig
from clips.data.sample import BrokenSample

MAX_BYTES = 64 * 2**20
"""Largest encoded image, in bytes."""
MAX_PIXELS = 64_000_000
"""Largest decoded image in pixels: 256 MB, since Pillow takes four bytes for a pixel of RGB."""
MAX_SCANNED = 16 * MAX_PIXELS
"""Largest product of a JPEG's pixels and scans. A scan takes a dozen bytes, and a decoder goes over the full image
for each scan (1 s for 10⁹ pixels). Progressive images have about 10 scans."""
LEAST_SCANNED = 10_000
"""A scan counts as at least this many pixels."""
STRIP_PIXELS = 2**20
"""Pixels that are converted at once if the conversion takes several times their memory."""
KEPT = 2
"""A JPEG is decoded at 1/2, 1/4 or 1/8 of its size if both sides of the crop keep at least this many times the pixels
of the final sides: squashing averages the lost detail away."""
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Raster formats that Pillow decodes by itself. EPS is excluded, because it runs Ghostscript."""
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm")
"""Endings, in lower case, by which a file of a folder counts as an image of FORMATS."""
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CROP_ASPECT = (3 / 4, 4 / 3)
# A PNG's compressed text and profile chunks inflate before any pixel.
PngImagePlugin.MAX_TEXT_CHUNK = 2**20
PngImagePlugin.MAX_TEXT_MEMORY = 4 * 2**20
_JPEG = ("JPEG", "MPO")
_ON_ITS_SIDE, _FROM_RIGHT, _FROM_BELOW = (5, 6, 7, 8), (2, 3, 6, 7), (3, 4, 7, 8)
"""Orientations of EXIF that swap width and height, and that store the upright image's left or top edge last."""
_OPAQUE_MODES = ("RGB", "L", "1", "CMYK", "YCbCr")
# A JPEG marker that begins a segment or ends the image; stuffed bytes, padding and markers without length excluded.
_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])")
_SCAN, _END = b"\xda", b"\xd9"
_ALPHA_MODES = ("RGBA", "RGBa", "LA", "La", "PA")


def decode_image(
    data: bytes, key: str = "image", max_pixels: int = MAX_PIXELS, reduce_to: int | None = None
) -> Image.Image:
    """Decode an image to upright RGB (`to_rgb`), and reduce it by an integer factor to at most `reduce_to` pixels.

    Raises BrokenSample(key, reason) unless `data` is a complete image within the limits.
    """
    with _decoding(key):
        opened = _open(data, max_pixels)
        image = to_rgb(_loaded(opened, _factor(opened.size, reduce_to)))
        factor = _factor(image.size, reduce_to)
        return image if factor == 1 else image.reduce(factor)


def decoded_size(
    data: bytes, key: str = "image", max_pixels: int = MAX_PIXELS, reduce_to: int | None = None
) -> tuple[int, int]:
    """Return (height, width) of what `decode_image` returns, from the header only. Raises as it does."""
    with _decoding(key):
        opened = _open(data, max_pixels)
        if opened.format == "TIFF" or (opened.format == "PNG" and b"eXIf" in data):
            opened.load()  # which turns a TIFF, and finds tags of a PNG behind its pixels
        width, height = _scaled(opened, _factor(opened.size, reduce_to)).size
        if _orientation(opened) in _ON_ITS_SIDE:
            width, height = height, width
        factor = _factor((width, height), reduce_to)
        return math.ceil(height / factor), math.ceil(width / factor)


@contextmanager
def _decoding(key: str) -> Iterator[None]:
    """Turn every error of a decoder into a BrokenSample."""
    try:
        yield
    except UnidentifiedImageError:  # its message ends with the address of an object
        raise BrokenSample(key, f"image: cannot identify image file: none of {', '.join(FORMATS)}") from None
    except Exception as error:  # Pillow's plugins raise nearly every built-in exception on hostile bytes
        raise BrokenSample(key, f"image: {error or type(error).__name__}") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Return upright 8-bit RGB: first frame, EXIF rotation, transparency on white; ValueError for other modes."""
    # Looking for tags in an image without tags costs as much as decoding a small image.
    image = ImageOps.exif_transpose(image) if "exif" in image.info or image.format == "TIFF" else image
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        return _by_strips(image, _sixteen_bit)
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        return _by_strips(image, _on_white)
    if image.mode in (*_OPAQUE_MODES, "P"):
        return image.convert("RGB")
    raise ValueError(f"images of mode {image.mode} are not supported: convert it to RGB")


def decode_rgba(data: bytes) -> Image.Image:
    """Decode a rasterised SVG of our own, with its transparency."""
    return _loaded(_open(data)).convert("RGBA")


def _open(data: bytes, max_pixels: int = MAX_PIXELS) -> ImageFile.ImageFile:
    """Open an image, with only its header read. Raises ValueError beyond a limit."""
    if not data:
        raise ValueError("the file is empty")
    if len(data) > MAX_BYTES:
        raise ValueError(f"{len(data)} bytes are above the limit of {MAX_BYTES}")
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    if image.width * image.height > max_pixels:
        raise ValueError(f"{image.width} × {image.height} pixels are above the limit of {max_pixels}")
    if image.format in _JPEG:
        scanned = max(image.width * image.height, LEAST_SCANNED) * _scans(data)
        if scanned > MAX_SCANNED:
            raise ValueError(f"{_scans(data)} scans of {image.width} × {image.height} pixels take too long to decode")
    return image


def _loaded(image: ImageFile.ImageFile, factor: int = 1) -> ImageFile.ImageFile:
    """Decode `image`, a JPEG at the smallest scale of 1, 1/2, 1/4, 1/8 that is not below 1/`factor`."""
    _scaled(image, factor).load()
    return image


def _scaled(image: ImageFile.ImageFile, factor: int) -> ImageFile.ImageFile:
    """Return `image` with the size that it will be decoded at."""
    if image.format in _JPEG:
        image.draft(None, (image.width // factor, image.height // factor))
    return image


def _orientation(image: ImageFile.ImageFile) -> int:
    """Return EXIF's orientation; 1 is upright."""
    has_tags = "exif" in image.info or image.format == "TIFF"
    return image.getexif().get(ExifTags.Base.Orientation, 1) if has_tags else 1


def _factor(size: tuple[int, int], reduce_to: int | None) -> int:
    """Return the integer by which an image's sides are divided to leave at most `reduce_to` pixels."""
    width, height = size
    if reduce_to is None or width * height <= reduce_to:
        return 1
    return math.ceil(math.sqrt(width * height / reduce_to))


def _scans(jpeg: bytes) -> int:
    """Return the number of scans of a JPEG, counted by its markers without decoding."""
    count, place = 0, 2
    while (marker := _MARKER.search(jpeg, place)) and marker[1] != _END:
        count += marker[1] == _SCAN
        # The length counts its own two bytes. A scan's data follow its segment and hold no such marker.
        place = marker.end() + max(int.from_bytes(jpeg[marker.end() : marker.end() + 2], "big"), 2)
    return count


def _by_strips(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """Apply the pixelwise `convert` to `image` in strips, to save memory."""
    converted = Image.new("RGB", image.size)
    rows = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        converted.paste(convert(strip), (0, top))
    return converted


def _on_white(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _sixteen_bit(image: Image.Image) -> Image.Image:
    """Convert 16-bit grey (modes I;16* and I) to RGB; Pillow's own conversion clips at 255."""
    grey = np.asarray(image).astype(np.int64)
    if grey.min() < 0 or grey.max() > 65535:
        raise ValueError("grey values are outside the 16-bit range")
    return Image.fromarray((grey / 257 + 0.5).astype(np.uint8)).convert("RGB")


class Preprocess:
    """Squashes an image to a square of `image_size` pixels (bilinear with antialias), and augments it if asked to.

    A batch is normalised later. The size changes neither the crop nor the colours that are drawn.
    """

    def __init__(self, image_size: int, augment: AugmentConfig | None = None) -> None:
        self.size = image_size
        self.augment = augment if augment is not None and augment != AugmentConfig() else None

    def pixels(self, image: Image.Image, rng: random.Random | None = None) -> np.ndarray:
        """Return uint8 [H, W, 3]; with augmentation a pure function of the image and the state of `rng`."""
        return self._squashed(image, self._box(*image.size, rng), rng)

    def decoded(self, data: bytes, key: str, rng: random.Random) -> np.ndarray:
        """Return `pixels` of an encoded image; a JPEG is decoded no larger than its crop needs (see KEPT).

        The crop is drawn from the full image's size. Raises BrokenSample(key, reason) like `decode_image`.
        """
        box, factor, orientation = None, 1, 1
        with _decoding(key):
            image = _open(data)
            if image.format in _JPEG:
                orientation = _orientation(image)
                width, height = image.size[::-1] if orientation in _ON_ITS_SIDE else image.size
                box = self._box(width, height, rng)
                factor = self._factor(box)
            upright = to_rgb(_loaded(image, factor))
        if box is None:
            return self.pixels(upright, rng)
        left, top, right, bottom = (side / factor for side in box)
        # The last stored row and column may cover less than `factor` rows and columns of the image.
        x = upright.width - width / factor if orientation in _FROM_RIGHT else 0
        y = upright.height - height / factor if orientation in _FROM_BELOW else 0
        return self._squashed(upright, (x + left, y + top, x + right, y + bottom), rng)

    def _box(self, width: int, height: int, rng: random.Random | None) -> Box:
        """Return the part of an image of this size that is kept: a crop, or all of it."""
        config = self.augment
        if config is None or config.min_crop_area == 1:
            return 0, 0, width, height
        assert rng is not None, "augmentation needs an rng"
        return inception_crop(width, height, config.min_crop_area, rng)

    def _factor(self, box: Box) -> int:
        width, height = box[2] - box[0], box[3] - box[1]
        return next((f for f in (8, 4, 2) if min(width, height) >= f * KEPT * self.size), 1)

    def _squashed(self, image: Image.Image, box: Box, rng: random.Random | None) -> np.ndarray:
        config = self.augment
        image = image.resize((self.size, self.size), Image.Resampling.BILINEAR, box=box)
        if config is None or rng is None:
            return np.asarray(image)
        # A share of 1 draws nothing.
        if (config.jitter or config.hue) and (
            config.jitter_probability == 1 or rng.random() < config.jitter_probability
        ):
            image = colour_jitter(image, config.jitter, config.hue, rng)
        if rng.random() < config.grayscale:
            image = image.convert("L").convert("RGB")
        if config.mirror and rng.random() < config.mirror:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return np.asarray(image)

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Return float32 [3, H, W], normalised with ImageNet's mean and standard deviation."""
        return normalise(stacked([self.pixels(image)]))[0]


def eval_transform(image_size: int) -> Preprocess:
    """Return the preprocessing of every evaluation and export: squash and normalise."""
    return Preprocess(image_size)


def stacked(pixels: Sequence[np.ndarray]) -> torch.Tensor:
    """Stack B arrays uint8 [H, W, 3] to uint8 [B, 3, H, W], in memory still with channels last."""
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)


def normalise(images: torch.Tensor) -> torch.Tensor:
    """Normalise uint8 [B, 3, H, W] to contiguous float32 [B, 3, H, W] on the same device: (x / 255 − mean) / std."""
    mean, std = _statistics(images.device)
    return images.to(torch.float32, memory_format=torch.contiguous_format).sub_(mean).div_(std)


@cache
def _statistics(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ImageNet's mean and deviation of pixels in 0 … 255, [1, 3, 1, 1], on a device."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) * 255 for values in (IMAGENET_MEAN, IMAGENET_STD))
    return mean.to(device), std.to(device)


Box = tuple[float, float, float, float]
"""left, top, right, bottom in pixels"""


def inception_crop(width: int, height: int, min_area: float, rng: random.Random) -> Box:
    """Return a random box with an aspect from 3/4 to 4/3 and at least the share `min_area` of the image's area.

    It is drawn as in the reference, by TensorFlow's `sample_distorted_bounding_box`: the aspect is uniform among the
    possible ones, then the height is uniform. An image too long for any aspect is not cropped.
    """
    full = width / height
    narrowest, widest = max(CROP_ASPECT[0], full * min_area), min(CROP_ASPECT[1], full / min_area)
    if narrowest > widest:
        return 0.0, 0.0, float(width), float(height)
    aspect = rng.uniform(narrowest, widest)
    tallest = min(height, width / aspect)
    h = rng.uniform(min(tallest, math.sqrt(min_area * width * height / aspect)), tallest)
    w = min(float(width), h * aspect)
    left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
    return left, top, left + w, top + h


def colour_jitter(image: Image.Image, strength: float, hue: float, rng: random.Random) -> Image.Image:
    """Change brightness, contrast and saturation by factors from 1 ± `strength`, and the hue, in random order.

    The hue turns by up to ± `hue` of the colour circle. The demo leaves it at 0, because captions name colours.
    """
    changes: list[Any] = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color] if strength else []
    changes += [None] if hue else []
    rng.shuffle(changes)
    for enhancer in changes:
        if enhancer is None:
            image = turn_hue(image, rng.uniform(-hue, hue))
        else:
            image = enhancer(image).enhance(rng.uniform(max(0.0, 1 - strength), 1 + strength))
    return image


def turn_hue(image: Image.Image, share: float) -> Image.Image:
    """Return `image` with its hues turned by `share` of the colour circle, in Pillow's 256 steps."""
    h, s, v = image.convert("HSV").split()
    turned = [(i + round(256 * share)) % 256 for i in range(256)]
    return Image.merge("HSV", (h.point(turned), s, v)).convert("RGB")
