"""Feature cache against fresh features, and the training forward against the stock one."""

import contextlib
import fcntl
import os
import shutil
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from tiny_mllm import make_images, write_llm, write_run

from clips.common.errors import UserError
from mllm.data.images import ImageStore
from mllm.encoders.load import load_vision
from mllm.model.forward import causal_lm_loss, embed_inputs
from mllm.model.llava import build_model
from mllm.model.llm import load_llm
from mllm.training import features as features_module
from mllm.training.features import FeatureCache
from mllm.training.trainer import Collator


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Encoder, model (all parameters trainable) and processor."""
    folder = tmp_path_factory.mktemp("parts")
    write_run(folder / "run")
    encoder = load_vision(f"clips:{folder / 'run'}")
    model, processor = build_model(encoder, load_llm(str(write_llm(folder / "llm"))))
    return encoder, model.requires_grad_(True), processor


@pytest.fixture
def store(tmp_path):
    names = make_images(tmp_path / "images", 11)
    return ImageStore(tmp_path / "images"), names


def fresh(encoder, store, names):
    images = [store.load(name) for name in names]
    return encoder.features(encoder.image_processor(images=images, return_tensors="pt")["pixel_values"])


def assert_close(cached, expected):
    assert cached.dtype == torch.float32
    assert cached.shape == expected.shape
    limit = 2**-11 * expected.abs() + 1e-5 * expected.abs().max()  # float16, and another batch size
    assert ((cached - expected).abs() <= limit).all()


def test_cache_equals_fresh_features(parts, store, tmp_path, monkeypatch):
    encoder, (store, names) = parts[0], store
    monkeypatch.setattr(features_module, "FILE_BYTES", 1)  # one batch a file
    cache = FeatureCache(encoder, store, tmp_path / "cache")
    assert cache.fill(names, batch_size=4) == 11
    assert len(list(cache.directory.glob("*.npy"))) == 3
    order = [names[i] for i in (7, 0, 10, 0, 3)]
    assert_close(cache.get(order), fresh(encoder, store, order))
    assert cache.get([]).shape == (0, 16, 32)
    collator = Collator(pad_id=0, image_ids=(99,), load_images=cache.get, image_key="image_features")
    batch = collator([{"key": "0", "input_ids": [1, 2], "labels": [1, 2], "images": order[:2]}])
    assert torch.equal(batch["image_features"], cache.get(order[:2]))


def test_cache_is_shared_and_a_changed_image_encoder_or_padding_is_encoded_again(parts, store, tmp_path):
    encoder, (store, names) = parts[0], store
    FeatureCache(encoder, store, tmp_path / "cache").fill(names[:6])
    shutil.copytree(store.location, tmp_path / "moved")
    (tmp_path / "moved" / names[2]).rename(tmp_path / "moved" / "other.png")
    moved = FeatureCache(encoder, ImageStore(tmp_path / "moved"), tmp_path / "cache")
    assert moved.fill(["other.png", names[0], names[0], names[7]]) == 1
    assert_close(moved.get(["other.png"]), fresh(encoder, store, [names[2]]))
    FeatureCache(encoder, store, tmp_path / "cache").fill(names)
    shutil.copy(store.location / names[1], store.location / names[0])
    assert FeatureCache(encoder, store, tmp_path / "cache").fill(names) == 0  # the same image twice
    make_images(store.location, 1, seed=9)
    again = FeatureCache(encoder, store, tmp_path / "cache")
    assert again.fill(names) == 1
    assert_close(again.get(names[:1]), fresh(encoder, store, names[:1]))
    write_run(tmp_path / "other", seed=8)
    for options in ({}, {"image_aspect_ratio": "pad"}):
        other = load_vision(f"clips:{tmp_path / 'other'}", **options)
        cache = FeatureCache(other, store, tmp_path / "cache")
        assert cache.fill(names) == 11
        assert_close(cache.get(names), fresh(other, store, names))


def test_interrupted_write_leaves_nothing_that_counts_and_values_beyond_float16_are_kept(
    parts, store, tmp_path, monkeypatch
):
    encoder, (store, names) = parts[0], store
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            FeatureCache(encoder, store, tmp_path / "cache").fill(names)
    cache = FeatureCache(encoder, store, tmp_path / "cache")
    with pytest.raises(KeyError):
        cache.get(names[:1])
    huge = np.full((1, 16, 32), 1e6, dtype=np.float32)
    cache._write([cache._key(names[0])], huge)
    assert cache.fill(names) == 10
    assert torch.equal(cache.get(names[:1]), torch.from_numpy(huge))


@pytest.mark.parametrize("suffix", [".npy", ".json"])
@pytest.mark.parametrize("left", [0, 40, 200])
def test_a_cut_file_is_encoded_anew(parts, store, tmp_path, capsys, suffix, left):
    """It ended every later training with a traceback that does not name it."""
    encoder, (store, names) = parts[0], store
    cache = FeatureCache(encoder, store, tmp_path / "cache")
    cache.fill(names[:6])
    (cut,) = cache.directory.glob(f"*{suffix}")
    cut.write_bytes(cut.read_bytes()[:left])
    cache.fill(names[6:])
    again = FeatureCache(encoder, store, tmp_path / "cache")
    assert f"{cut.with_suffix('.npy')} or its .json is damaged" in capsys.readouterr().err.replace("\n", "")
    assert again.fill(names) == 6
    assert_close(again.get(names), fresh(encoder, store, names))
    FeatureCache(encoder, store, tmp_path / "cache")
    assert not capsys.readouterr().err


def test_features_used_least_recently_make_room_and_those_in_use_stay(parts, store, tmp_path, capsys):
    """11 images of 16 tokens x 32 take 11,264 bytes. What does not fit is refused before an image is encoded."""
    encoder, (store, names) = parts[0], store
    root = tmp_path / "cache"
    assert features_module.feature_bytes(encoder, 11) == 11_264
    folders = [root / name for name in ("newer", "older", "used")]
    for age, folder in enumerate(folders):
        folder.mkdir(parents=True)
        (folder / "x.npy").write_bytes(bytes(20_000))
        (folder / "ENCODER.txt").write_text("an encoder")
        os.utime(folder / "ENCODER.txt", (1e9 - age, 1e9 - age))
    with (folders[2] / "ENCODER.txt").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        cache = FeatureCache(encoder, store, root, gb=60e-6)
        cache.make_room(names)
        assert [folder.exists() for folder in folders] == [True, False, True]
        assert f"{folders[1]} was used least recently" in capsys.readouterr().err.replace("\n", "")
        small = FeatureCache(encoder, store, root, gb=15e-6)
        with pytest.raises(UserError, match=r"features of 11 images .* --feature_cache False"):
            small.make_room(names)
        assert folders[2].exists(), "in use"
        assert cache.fill(names) == 11
        small.refresh()
        small.make_room(names)  # nothing is missing


def test_without_a_bound_the_cache_takes_half_of_the_disk(parts, store, tmp_path, monkeypatch):
    encoder, (store, names) = parts[0], store
    cache = FeatureCache(encoder, store, tmp_path / "cache")
    for free, fits in ((24_000, True), (20_000, False)):
        monkeypatch.setattr("shutil.disk_usage", Mock(return_value=Mock(free=free)))
        with contextlib.nullcontext() if fits else pytest.raises(UserError, match="50% of the disk"):
            cache.make_room(names)


def test_other_ranks_trust_the_keys_of_rank_0(parts, store, tmp_path, monkeypatch):
    """Each of them hashed every image of the data."""
    encoder, (store, names) = parts[0], store
    first, second = (FeatureCache(encoder, store, tmp_path / "cache") for _ in range(2))
    second.trust(names, first.keys(names))
    first.fill(names)
    monkeypatch.setattr(store, "read", Mock(side_effect=AssertionError("is read")))
    assert second.fill(names) == 0
    assert torch.equal(second.get(names), first.get(names))


def test_broken_image(parts, store, tmp_path):
    encoder, (store, _names) = parts[0], store
    cache = FeatureCache(encoder, store, tmp_path / "cache")
    (store.location / "bad.png").write_bytes(b"\x89PNG nonsense")
    for name in ("bad.png", "gone.png"):
        with pytest.raises(UserError, match=f"^image {name} .*repair it or remove"):
            cache.fill([name])


def batch_of(processor, names, folder):
    """Two samples with one and two images, right-padded, and labels on some positions."""
    from PIL import Image

    texts = ["<image>What is it? A red cat.", "And <image> or <image>? Two dogs in the image"]
    images = [Image.open(folder / name).convert("RGB") for name in names[:3]]
    processor.tokenizer.padding_side = "right"
    batch = processor(images=[[images[0]], images[1:]], text=texts, padding=True, return_tensors="pt")
    labels = batch["input_ids"].clone()
    labels[labels == processor.image_token_id] = -100
    labels[batch["attention_mask"] == 0] = -100
    labels[:, :3] = -100
    return batch, labels


def test_embeddings_loss_and_gradients_equal_the_stock_forward(parts, store):
    encoder, model, processor = parts
    store, names = store
    batch, labels = batch_of(processor, names, store.location)
    stock = model(**batch, labels=labels)
    stock.loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert sum("multi_modal_projector" in name for name in expected) == 4
    features = encoder.features(batch["pixel_values"]).detach()
    for given in ({"image_features": features}, {"pixel_values": batch["pixel_values"]}):
        model.zero_grad()
        embeds = embed_inputs(model, batch["input_ids"], **given)
        logits = model(inputs_embeds=embeds, attention_mask=batch["attention_mask"]).logits
        assert torch.allclose(logits, stock.logits, atol=1e-5)
        loss = causal_lm_loss(model, embeds, batch["attention_mask"], labels)
        assert loss.item() == pytest.approx(stock.loss.item(), abs=1e-5)
        loss.backward()
        for name, parameter in model.named_parameters():
            if name in expected and not ("vision_tower" in name and "image_features" in given):
                assert torch.allclose(parameter.grad, expected[name], atol=1e-4 * expected[name].abs().max()), name


def test_logits_exist_only_for_labelled_positions(parts, store):
    _, model, processor = parts
    store, names = store
    batch, labels = batch_of(processor, names, store.location)
    embeds = embed_inputs(model, batch["input_ids"], pixel_values=batch["pixel_values"])
    rows = []
    hook = model.lm_head.register_forward_hook(lambda module, args, output: rows.append(args[0].shape[0]))
    loss = causal_lm_loss(model, embeds, batch["attention_mask"], labels)
    hook.remove()
    count = int((labels[:, 1:] != -100).sum())
    assert rows == [count]
    scaled = causal_lm_loss(model, embeds, batch["attention_mask"], labels, num_items=4 * count)
    assert scaled.item() == pytest.approx(loss.item() / 4, rel=1e-5)


EMPTY = [{"image_features": torch.zeros(0, 16, 32)}, {"pixel_values": torch.zeros(0, 3, 32, 32)}, {}]


@pytest.mark.parametrize("empty", EMPTY, ids=["features", "pixels", "neither"])
def test_batch_without_images_runs_every_module_at_weight_zero(parts, empty):
    _, model, processor = parts
    ids = processor.tokenizer(["Two dogs in an image"], return_tensors="pt")["input_ids"]
    ran = []
    modules = [model.model.multi_modal_projector] + [model.model.vision_tower] * ("pixel_values" in empty)
    hooks = [module.register_forward_hook(lambda module, args, output: ran.append(module)) for module in modules]
    model.zero_grad()
    loss = causal_lm_loss(model, embed_inputs(model, ids, **empty), torch.ones_like(ids), ids)
    for hook in hooks:
        hook.remove()
    assert len(ran) == len(modules)
    assert loss.item() == pytest.approx(model(input_ids=ids, labels=ids).loss.item(), abs=1e-5)
    loss.backward()
    for parameter in model.model.multi_modal_projector.parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()


def test_batch_without_labels_and_wrong_counts(parts):
    _, model, processor = parts
    ids = processor.tokenizer(["Two dogs"], return_tensors="pt")["input_ids"]
    model.zero_grad()
    loss = causal_lm_loss(model, embed_inputs(model, ids), torch.ones_like(ids), torch.full_like(ids, -100))
    loss.backward()
    assert loss.item() == 0
    assert model.lm_head.weight.grad is not None
    with pytest.raises(ValueError, match="0 image placeholders, but 16 image tokens"):
        embed_inputs(model, ids, image_features=torch.zeros(1, 16, 32))
    with pytest.raises(ValueError, match="1 image placeholders, but 0"):
        embed_inputs(model, torch.tensor([[5, model.config.image_token_id]]))
