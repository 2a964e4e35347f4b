"""Images in tiles: layout and ids as LLaVA-NeXT's own code and transformers', and every part that must know tiles."""

import copy
import io
import json
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_chat
import torch
from PIL import Image
from tiny_mllm import write_siglip
from torch import Tensor
from transformers import LlavaNextForConditionalGeneration, LlavaNextProcessor

from clips.common.errors import UserError
from clips.common.tensors import read_weights
from clips.data.images import MAX_PIXELS, decode_image, decoded_size
from mllm.chat.model import ChatModel
from mllm.data.dataset import ImageTokens, LlavaDataset
from mllm.data.images import ImageStore, pixel_loader
from mllm.encoders.load import load_vision
from mllm.encoders.registry import GRIDS, grid_pinpoints, image_pixels
from mllm.model.convert import convert_llava
from mllm.model.tiles import TokenLayout, placeholder_ids
from mllm.training.build import apply_freeze
from mllm.training.features import FeatureCache
from mllm.training.recipes import STAGES, freeze_table
from mllm.training.trainer import Collator, TrainingModel


def facts(text: str) -> list[tuple[tuple[int, ...], int, int]]:
    words = iter(text.split())
    rows = zip(words, words, words, strict=True)
    return [(tuple(map(int, size.split("x"))), int(tokens), int(crc)) for size, tokens, crc in rows]


# From the code of LLaVA-VL/LLaVA-NeXT at df17966, run on 2026-11-28: `get_anyres_image_grid_shape` of mm_utils.py, and
# `unpad_image` with the lines of `prepare_inputs_labels_for_multimodal` around it (llava_arch.py), on numbered cells
# with a newline of -1. Each entry: height x width of the image, tokens, CRC-32 of the cells' numbers as int64.
OF_LLAVA_NEXT = facts(
    """
    336x336 1176 1444864220  335x337 1176 234357399  100x100 1176 1444864220  672x672 2928 788625709
    673x671 2928 788625709  480x640 2340 1767701650  640x480 2352 3733332293  1080x1920 1948 3930419758
    1920x1080 1968 3488561806  2160x3840 1948 3930419758  768x1024 2340 1767701650  1x1 1176 1444864220
    1x20000 576 2665816141  20000x1 624 1423204840  2x3000 576 2665816141  3000x2 624 1423204840  7x1000 576 2665816141
    336x1008 2328 2945082420  1008x336 2376 920344349  337x1009 2328 2945082420  336x672 1752 989749611
    672x336 1776 1342022121  200x600 1360 250474374  600x200 1392 2519047514  256x256 1176 1444864220
    500x333 1476 1912970522  333x500 1464 1443932980  427x640 2144 3669865459  640x427 2160 2555452961
    1365x2048 2144 3669865459  570x2351 1890 2532183556  278x1064 1890 2532183556  502x2049 1890 2532183556
    1861x1954 2830 2956408120  1574x879 1872 3303155860  404x2018 1598 1301756614  136x1616 1014 3250477688
    1792x28 792 1373199648  1844x1110 1968 3488561806  957x2441 2088 824490179  438x1320 2328 2945082420
    145x111 1376 362691782  124x2237 868 1157600779  57x1581 722 1837703816  907x1748 1752 3111887319
    138x2181 868 1157600779  928x1813 1752 3111887319  2050x2284 2732 1672284777  974x1435 2144 3669865459
    965x916 2832 4246849805
    """
)
"""Squares of 336 px and patches of 14, LLaVA-NeXT's own grids."""
OF_NINE_CANVASES = facts(
    """
    24x40 44 2761064071  40x24 46 3756050649  36x40 88 1965500994  64x64 88 1965500994  95x97 172 3880882385
    300x20 28 1914854620  20x300 16 2537420579  96x32 76 3277896193  1000x999 172 3880882385  33x64 52 3857740425
    """
)
"""Squares of 32 px and patches of 8, grids "(1x1),...,(3x3)"."""
SIZES = [(24, 40), (40, 24), (64, 64), (1, 2000), (2000, 1), (97, 31), (33, 200)]


@pytest.fixture(scope="module")
def place(made_once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    return made_once("tiny-tiles", partial(tiny_chat.write_place, image_aspect_ratio="anyres"))


@pytest.fixture(scope="module")
def chat(place: Path) -> ChatModel:
    return ChatModel.load(str(place / "runs" / "llava" / "model"), device="cpu", dtype="float32")


def layout_of(side: int, patch: int, text: str | None = None) -> TokenLayout:
    grids = tuple((height, width) for height, width in grid_pinpoints(text, side))
    return TokenLayout((side // patch) ** 2, side, grids)


def test_tokens_and_order_are_llava_next_s() -> None:
    for layout, known in [(layout_of(336, 14), OF_LLAVA_NEXT), (layout_of(32, 8, "(1x1),...,(3x3)"), OF_NINE_CANVASES)]:
        for size, tokens, crc in known:
            assert layout.tokens(size) == tokens, size
            assert zlib.crc32(layout.order(size).tobytes()) == crc, size
            assert layout.tokens(size) <= layout.most
            assert layout.crops(size) <= layout.most_crops
    assert len(OF_LLAVA_NEXT) + len(OF_NINE_CANVASES) >= 40
    assert (layout_of(336, 14).most, layout_of(336, 14).most_crops) == (2928, 5)


def test_order_is_that_of_transformers(chat: ChatModel) -> None:
    """The stock model's packing and the stock processor's count agree on random sizes, extreme ones among them."""
    model, processor = chat.model, chat.processor
    assert isinstance(model, LlavaNextForConditionalGeneration)
    assert isinstance(processor, LlavaNextProcessor)
    layout, random = chat.layout, np.random.default_rng(0)
    newline = model.model.image_newline.detach()
    sizes = SIZES + [(int(h), int(w)) for h, w in random.integers(1, 300, (60, 2))]
    assert layout == TokenLayout.of(model.config) == layout_of(32, 8)
    for size in sizes:
        assert processor._get_num_multimodal_tokens([size])["num_image_tokens"] == [layout.tokens(size)]
    cells = torch.randn(sum(map(layout.crops, sizes)), layout.tokens_per_crop, len(newline))
    parts = list(cells.split([layout.crops(size) for size in sizes]))
    stock, counts = model.model.pack_image_features(parts, torch.tensor(sizes), "default", newline)
    assert counts.tolist() == [layout.tokens(size) for size in sizes]
    assert torch.equal(layout.arranged(cells, newline, sizes), torch.cat(stock))
    with pytest.raises(ValueError, match="crops, but images"):
        layout.arranged(cells[1:], newline, sizes)


def test_canvases_are_read_as_llava_s_and_bounded() -> None:
    """LLaVA names (width, height), transformers (height, width); the order decides between equal grids."""
    assert grid_pinpoints(None, 336) == [[336 * h, 336 * w] for w, h in GRIDS]
    assert grid_pinpoints("[(336, 672), [672, 336]]", 336) == [[672, 336], [336, 672]]
    assert grid_pinpoints("(1x2),...,(2x3)", 32) == [[64, 32], [96, 32], [64, 64], [96, 64]]
    for text in ("[(336, 340)]", "(1x1),...,(99999x99999)", "open('x')", "[" * 9999, str([(336, 336)] * 65)):
        with pytest.raises(UserError, match="--image_grid_pinpoints"):
            grid_pinpoints(text, 336)


def test_encoders_whose_tokens_form_no_grid_are_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="anyres needs a square of one token"):
        load_vision("clips", runs=place / "runs", image_aspect_ratio="anyres", select_feature="full")
    siglip = load_vision(write_siglip(tmp_path / "siglip"), image_aspect_ratio="anyres")  # has no CLS token
    assert siglip.most_tiles == 4
    assert "32 px, whole and up to 4 tiles, 16 tokens × 32" in siglip.describe()
    layout = layout_of(32, 8)
    for height, width in SIZES:
        crops = image_pixels(siglip.image_processor, Image.new("RGB", (width, height)))
        assert crops.shape == (layout.crops((height, width)), 3, 32, 32)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_the_header_s_size_is_the_decoded_image_s(kind: str) -> None:
    """For every orientation, and where the image is decoded smaller."""
    for orientation in (None, *range(1, 9)):
        file, exif = io.BytesIO(), Image.Exif()
        if orientation:
            exif[0x0112] = orientation
        Image.new("RGB", (203, 301)).save(file, kind, exif=exif)
        for most in (None, 203 * 301, 9000, 500, 7):
            image = decode_image(file.getvalue(), reduce_to=most)
            assert decoded_size(file.getvalue(), reduce_to=most) == (image.height, image.width), (orientation, most)
    with pytest.raises(Exception, match=r"image: .* above the limit"):
        decoded_size(file.getvalue(), max_pixels=100)
    assert MAX_PIXELS > 203 * 301


def batch_of(chat: ChatModel, place: Path, load: Any, key: str = "pixel_values") -> dict[str, Any]:
    """Samples with one image, two images and none."""
    store = ImageStore(place / "images")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat and two dogs."}]
    two = [{"from": "human", "value": "<image> and <image>?"}, {"from": "gpt", "value": "Red."}]
    none = [{"from": "human", "value": "Say it"}, {"from": "gpt", "value": "the image"}]
    records = [
        {"image": "0.png", "conversations": turns},
        {"image": ["4.png", "1.png"], "conversations": two},
        {"conversations": none},
    ]
    path = place / "tiles.json"
    path.write_text(json.dumps(records))
    dataset = LlavaDataset(path, chat.encoder, store, tokens=ImageTokens(chat.layout.most, chat.layout.tokens))
    assert dataset.modality_lengths[1] >= 2 * chat.layout.most
    samples = [dataset[i] for i in range(3)]
    return Collator(chat.processor.tokenizer.pad_token_id, placeholder_ids(chat.model.config), load, key)(samples)


def gradients(model: Any, batch: dict[str, Any], **options: bool) -> tuple[float, dict[str, Tensor]]:
    training = TrainingModel(copy.deepcopy(model), **options)
    apply_freeze(training.model, freeze_table(STAGES[2]))
    loss = training(batch)[0]
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in training.trained().items() if p.grad is not None}


def test_packed_rows_cached_features_and_the_newline(chat: ChatModel, place: Path, tmp_path: Path) -> None:
    """Packing changes nothing, the cache only rounds to fp16, and a batch without images reaches the newline too."""
    store = ImageStore(place / "images")
    batch = batch_of(chat, place, pixel_loader(store, partial(image_pixels, chat.processor.image_processor)))
    assert batch["image_sizes"] == [store.size(name) for name in ("0.png", "4.png", "1.png")]
    assert len(batch["pixel_values"]) == sum(map(chat.layout.crops, batch["image_sizes"]))
    loss, actual = gradients(chat.model, batch, features=False, packed=False)
    packed, others = gradients(chat.model, batch, features=False, packed=True)
    assert packed == pytest.approx(loss, rel=1e-5)
    assert actual["image_newline"].norm() > 1e-4
    for name, gradient in actual.items():
        assert torch.allclose(others[name], gradient, atol=1e-3 * float(gradient.abs().max())), name
    vision = load_vision("clips", runs=place / "runs", image_aspect_ratio="anyres")
    cache = FeatureCache(vision, store, tmp_path)
    assert cache.fill(["0.png", "4.png", "1.png", "0.png"]) == 3
    again = FeatureCache(vision, store, tmp_path)
    assert again.fill(["1.png", "4.png"]) == 0
    cached = batch_of(chat, place, again.get, "image_features")
    assert len(cached["image_features"]) == len(batch["pixel_values"])
    assert gradients(chat.model, cached, features=True)[0] == pytest.approx(loss, rel=2e-3)
    text = {name: batch[name][2:] for name in ("input_ids", "labels", "attention_mask")}
    _, without = gradients(chat.model, text, features=True)
    assert torch.equal(without["image_newline"], torch.zeros_like(without["image_newline"]))


def test_the_saved_model_keeps_its_newline_and_is_refused_elsewhere(chat, place, tmp_path):
    directory = place / "runs" / "llava" / "model"
    newline = read_weights(directory / "mm_projector.bin")["model.image_newline"]
    assert torch.equal(newline, chat.model.model.image_newline)
    assert json.loads((directory / "config.json").read_text())["image_grid_pinpoints"] == grid_pinpoints(None, 32)
    assert "up to 88 tokens per image" in (directory / "README.md").read_text()
    with pytest.raises(UserError, match="only models of one square are converted"):
        convert_llava(str(directory), tmp_path / "llava-model", "llava")
