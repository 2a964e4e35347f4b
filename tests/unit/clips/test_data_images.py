"""Every kind of image is decoded to the image that was encoded; hostile bytes break one sample, not the run."""

import math
import random
from functools import cache

import numpy as np
import pytest
import torch
from bad_corpus import encode
from PIL import ExifTags, Image

from clips.config import AugmentConfig
from clips.data import images
from clips.data.images import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Preprocess,
    decode_image,
    eval_transform,
    inception_crop,
    normalise,
    stacked,
    to_rgb,
)


def reference(width: int = 6, height: int = 4) -> np.ndarray:
    """An RGB image without symmetry, so that a rotation or a swapped channel shows."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 40, y * 60, (x + 2 * y) * 10 + 5], -1).astype(np.uint8)


def pixels(data: bytes) -> np.ndarray:
    image = decode_image(data)
    assert image.mode == "RGB"
    return np.asarray(image)


def test_transparency_is_laid_on_white() -> None:
    colour, alpha = reference(), np.linspace(0, 255, 24).reshape(4, 6).round().astype(np.uint8)
    expected = np.round(colour * (alpha[..., None] / 255.0) + 255 * (1 - alpha[..., None] / 255.0))
    array = pixels(encode(Image.fromarray(np.dstack([colour, alpha]), "RGBA")))
    assert np.abs(array - expected).max() <= 1
    grey = np.arange(24, dtype=np.uint8).reshape(4, 6) * 10
    array = pixels(encode(Image.fromarray(np.dstack([grey, alpha]), "LA")))
    assert np.abs(array[..., 0] - np.round(grey * (alpha / 255.0) + 255 * (1 - alpha / 255.0))).max() <= 1


@pytest.mark.parametrize(("kind", "orientation"), [*(("JPEG", turn) for turn in range(1, 9)), ("TIFF", 6)])
def test_exif_rotation(kind: str, orientation: int) -> None:
    upright = np.kron(reference(), np.ones((16, 16, 1), np.uint8))
    # What a camera stores so that a viewer obeying `orientation` shows `upright` (EXIF 2.3, tag 0x0112).
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    data = encode(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif, **options)
    array = pixels(data)
    assert array.shape == upright.shape
    assert np.abs(array.astype(int) - upright).mean() < 3


def test_eval_transform_squashes_and_normalises() -> None:
    image = np.random.default_rng(1).integers(0, 255, (40, 90, 3), np.uint8)
    out = eval_transform(32)(Image.fromarray(image))
    squashed = np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BILINEAR)) / 255.0
    expected = (squashed - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    assert out.shape == (3, 32, 32)
    assert out.dtype == torch.float32
    np.testing.assert_allclose(out.numpy(), expected.transpose(2, 0, 1), atol=1e-5)


def test_normalise_is_the_plain_formula_to_the_bit() -> None:
    """In float32, as it was when workers did it: uint8 [B, 3, S, S] in any order of memory."""
    rows = [np.random.default_rng(i).integers(0, 256, (8, 8, 3), np.uint8) for i in range(3)]
    batch = stacked(rows)
    assert (batch.dtype, batch.shape) == (torch.uint8, (3, 3, 8, 8))
    out = normalise(batch)
    assert out.is_contiguous()
    mean, std = (np.float32(values) * np.float32(255) for values in (IMAGENET_MEAN, IMAGENET_STD))
    for row, one in zip(rows, out, strict=True):
        np.testing.assert_array_equal(one.numpy(), ((row.astype(np.float32) - mean) / std).transpose(2, 0, 1))
    assert torch.equal(normalise(batch.contiguous()), out)
    assert torch.equal(stacked(rows)[1].permute(1, 2, 0), torch.from_numpy(rows[1])), "it works on a copy"


@cache
def photo(width: int, height: int) -> Image.Image:
    """Broad and fine structures, no two parts alike; edges are softer than a pixel, as a lens makes them."""
    y, x = np.mgrid[0:height, 0:width] / height
    waves = [np.sin(7 * x + 3 * np.sin(5 * y)), np.cos(40 * x * y + 3 * x), np.sin(9 * np.hypot(x - 0.4, y - 0.7) ** 2)]
    return Image.fromarray((127.5 + 120 * np.stack(waves, axis=-1)).astype(np.uint8))


AUGMENTED = AugmentConfig(min_crop_area=0.4, grayscale=0.2)


@pytest.mark.parametrize("data", [encode(photo(800, 600)), encode(photo(100, 90), "JPEG")], ids=["a PNG", "too small"])
def test_what_cannot_be_decoded_smaller_is_as_before_to_the_bit(data: bytes) -> None:
    for augment in (None, AUGMENTED, AugmentConfig(min_crop_area=0.5, jitter=0.3)):
        preprocess = Preprocess(64, augment)
        for seed in range(3):
            ours, theirs = random.Random(seed), random.Random(seed)
            expected = preprocess.pixels(decode_image(data), theirs)
            np.testing.assert_array_equal(preprocess.decoded(data, "k", ours), expected)
            assert ours.random() == theirs.random()


@pytest.mark.parametrize(
    ("size", "kept", "orientation"), [*(((601, 403), {1, 2}, turn) for turn in range(1, 9)), ((1600, 1200), {4, 8}, 6)]
)
def test_a_jpeg_is_decoded_no_larger_than_its_crop_needs(monkeypatch, size, kept, orientation):
    """The same crop as from the whole image, wherever it lies and however the image is turned."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = encode(photo(*size), "JPEG", quality=95, exif=exif)
    decoded: list[Image.Image] = []
    monkeypatch.setattr(images, "to_rgb", lambda image: decoded.append(image) or to_rgb(image))
    preprocess, factors = Preprocess(64, AUGMENTED), set()
    for seed in range(6):
        ours, theirs = random.Random(seed), random.Random(seed)
        array = preprocess.decoded(data, "k", ours).astype(int)
        small = decoded[-1].size
        expected = preprocess.pixels(decode_image(data), theirs).astype(int)
        assert ours.random() == theirs.random()
        assert np.abs(array - expected).mean() < 1, "of 255; a crop that is one pixel off is at 3"
        left, top, right, bottom = inception_crop(*decode_image(data).size, 0.4, random.Random(seed))
        factor = math.ceil(size[0] / small[0])
        assert min(right - left, bottom - top) / factor >= 2 * 64
        assert min(right - left, bottom - top) / factor < 4 * 64 or factor == 8
        factors.add(factor)
    assert factors <= kept


@pytest.mark.parametrize(("width", "height"), [(1280, 720), (300, 800), (50, 900)])
def test_the_reference_crop_has_an_aspect_of_its_own(width: int, height: int) -> None:
    """Area and aspect within their bounds wherever an image has room for both; beyond, the whole image."""
    rng = random.Random(0)
    boxes = [inception_crop(width, height, 0.4, rng) for _ in range(2000)]
    aspects = [(right - left) / (bottom - top) for left, top, right, bottom in boxes]
    for left, top, right, bottom in boxes:
        assert 0 <= left < right <= width + 1e-9
        assert 0 <= top < bottom <= height + 1e-9
        assert (right - left) * (bottom - top) >= 0.4 * width * height - 1e-6
    if max(width / height, height / width) > 4 / 3 / 0.4:
        assert set(boxes) == {(0, 0, width, height)}
    else:
        assert 3 / 4 - 1e-9 <= min(aspects) <= max(aspects) <= 4 / 3 + 1e-9
    if (width, height) == (1280, 720):
        assert np.median(aspects) == pytest.approx(1.04, abs=0.02), "uniform from 0.75 to 1.33"


def test_colours_are_jittered_as_often_and_as_far_as_asked() -> None:
    image = Image.new("RGB", (8, 8), (200, 60, 60))

    def seen(augment: AugmentConfig) -> np.ndarray:
        preprocess, rng = Preprocess(8, augment), random.Random(0)
        return np.array([preprocess.pixels(image, rng)[0, 0] for _ in range(2000)])

    jittered = seen(AugmentConfig(jitter=0.32, hue=0.08, jitter_probability=0.8))
    assert np.mean((jittered != (200, 60, 60)).any(axis=1)) == pytest.approx(0.8, abs=0.03)
    hues = np.asarray(Image.fromarray(seen(AugmentConfig(hue=0.08))[None]).convert("HSV"))[0, :, 0].astype(int)
    turns = (hues + 128) % 256 - 128
    assert (min(turns), max(turns)) == pytest.approx((-20, 20), abs=2), "0.08 of 256 steps, and what 8 bits round"
    assert np.mean(np.ptp(seen(AugmentConfig(grayscale=0.2)), axis=-1) == 0) == pytest.approx(0.2, abs=0.03)


@pytest.mark.parametrize(
    ("kind", "size", "kept"),
    [
        ("JPEG", (1000, 800), (250, 200)),  # by two while it is decoded, then by two
        ("PNG", (1000, 800), (334, 267)),
    ],
)
def test_a_image_is_reduced_to_what_is_needed(kind: str, size: tuple[int, int], kept: tuple[int, int]) -> None:
    x = np.linspace(0, 255, size[0]).astype(np.uint8)
    photo = Image.fromarray(np.broadcast_to(x, size[::-1]).copy()).convert("RGB")
    image = decode_image(encode(photo, kind, quality=95) if kind == "JPEG" else encode(photo), reduce_to=120_000)
    assert image.size == kept
    expected = np.asarray(photo.resize(kept, Image.Resampling.BOX)).astype(int)
    assert np.abs(np.asarray(image).astype(int) - expected).max() <= 4
