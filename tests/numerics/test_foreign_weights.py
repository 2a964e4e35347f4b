"""Towers of transformers and timm, random and tiny, against the stock libraries: the features of every layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from torch import Tensor

from clips.common.errors import UserError
from clips.config import ModelConfig, TextConfig, VisionConfig
from clips.data.images import IMAGENET_MEAN, IMAGENET_STD
from clips.model.clips import CLIPSModel
from clips.weights.foreign import NORMALISED, kind_of
from clips.weights.initial import InitialWeights, initialise, read_initial

SIZE, PATCH, LAYERS = 32, 8, 3
TOLERANCE = 1e-5
"""Relative to the largest value of a layer."""
TOWER = {"hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "intermediate_size": 80}
IMAGE = {**TOWER, "image_size": SIZE, "patch_size": PATCH}
TEXT = {**TOWER, "vocab_size": 49_408, "max_position_embeddings": 20, "hidden_act": "quick_gelu", "hidden_size": 24}
DINOV2 = {key: value for key, value in IMAGE.items() if key != "intermediate_size"}


def clip() -> transformers.CLIPModel:
    vision = {**IMAGE, "hidden_act": "quick_gelu"}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=TEXT, vision_config=vision, projection_dim=20))


STOCK = {
    "vit": lambda: transformers.ViTModel(transformers.ViTConfig(**IMAGE)),
    "vit_no_qkv_bias": lambda: transformers.ViTModel(transformers.ViTConfig(**IMAGE, qkv_bias=False)),
    "vit_classifier": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**IMAGE)),
    "dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**DINOV2)),
    "dinov2_classifier": lambda: transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**DINOV2)),
    "clip_vision": lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**IMAGE)),
    "clip_projected": lambda: transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**IMAGE)),
    "siglip_vision": lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**IMAGE)),
    "siglip": lambda: transformers.SiglipModel(transformers.SiglipConfig(text_config=TEXT, vision_config=IMAGE)),
    "clip": clip,
}
VIT = {"img_size": SIZE, "patch_size": PATCH, "embed_dim": 32, "depth": LAYERS, "num_heads": 2}
TIMM: dict[str, dict[str, Any]] = {
    "vit_base_patch16_224": {},
    "vit_base_patch14_dinov2": {"init_values": 0.5},
    "vit_base_patch16_clip_224": {},
    "vit_base_patch16_clip_quickgelu_224": {},
    "vit_base_patch16_siglip_224": {},
    "vit_base_patch32_224": {"global_pool": "avg"},
    "vit_small_patch16_224": {"no_embed_class": True, "qkv_bias": False},
}


@torch.no_grad()
def shaken(model: torch.nn.Module) -> Any:
    """In eval mode, no parameter at the value that it starts with."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter += 0.2 * torch.randn_like(parameter)
    return model.eval()


def ours(initial: InitialWeights) -> CLIPSModel:
    """A model of the architecture that the weights bring, what they lack tiny."""
    parts = initial.architecture
    tiny = {"width": 24, "layers": 1, "heads": 2, "context_length": 8, "vocab_size": 64}
    config = ModelConfig(
        vision=VisionConfig(**parts["model.vision"]),
        text=TextConfig(**parts.get("model.text", tiny)),
        captioner=None,
        embed_dim=parts.get("model.embed_dim", 20),
    )
    model = CLIPSModel(config, initial.tokenizer.pad_id if initial.tokenizer else 0).eval()
    initialise(model, initial)
    return model


def make_images(mean: Any, std: Any) -> Tensor:
    """The same three random images, normalised [3, 3, S, S]."""
    raw = torch.rand(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    return (raw - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def states_after(blocks: Any, forward: Any) -> list[Tensor]:
    """What each block gives during `forward()`."""
    states: list[Tensor] = []
    hooks = [
        block.register_forward_hook(lambda m, i, out: states.append(out if torch.is_tensor(out) else out[0]))
        for block in blocks
    ]
    with torch.no_grad():
        forward()
    for hook in hooks:
        hook.remove()
    return states


def assert_same(mine: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(mine) == len(theirs) == LAYERS
    for a, b in zip(mine, theirs, strict=True):
        assert (a - b).abs().max() <= TOLERANCE * b.abs().max()


@pytest.mark.parametrize(
    ("name", "says_mean"), [*((name, False) for name in STOCK), ("vit", True), ("clip_vision", True)]
)
def test_transformers_towers_give_the_same_features_in_every_layer(name: str, says_mean: bool, tmp_path: Path) -> None:
    stock = shaken(STOCK[name]())
    stock.save_pretrained(tmp_path)
    mean, std = NORMALISED[name.partition("_")[0]]
    if says_mean:
        mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
        processor = transformers.CLIPImageProcessor(image_mean=list(mean), image_std=list(std))
        processor.save_pretrained(tmp_path)
    assert kind_of(tmp_path) == "transformers"
    initial = read_initial(str(tmp_path))
    model = ours(initial)
    tower = getattr(stock, "vision_model", getattr(stock, "base_model", stock))
    with torch.no_grad():
        theirs = tower(make_images(mean, std), output_hidden_states=True).hidden_states[1:]
    images = make_images(IMAGENET_MEAN, IMAGENET_STD)
    assert_same(states_after(model.visual.blocks, lambda: model.visual(images)), list(theirs))


def test_a_tower_of_plain_pixels_gives_the_same_features(tmp_path: Path) -> None:
    """Its image processor only scales to 0 … 1: do_normalize is false, whatever mean stands beside it."""
    stock = shaken(STOCK["vit"]())
    stock.save_pretrained(tmp_path)
    transformers.ViTImageProcessor(do_normalize=False).save_pretrained(tmp_path)
    model = ours(read_initial(str(tmp_path)))
    with torch.no_grad():
        theirs = stock(make_images([0.0] * 3, [1.0] * 3), output_hidden_states=True).hidden_states[1:]
    images = make_images(IMAGENET_MEAN, IMAGENET_STD)
    assert_same(states_after(model.visual.blocks, lambda: model.visual(images)), list(theirs))


def test_a_whole_clip_gives_the_same_image_and_text_features(tmp_path: Path) -> None:
    stock = shaken(clip())
    stock.save_pretrained(tmp_path)
    initial = read_initial(str(tmp_path))
    model = ours(initial)
    ids = initial.tokenizer.for_tower(["a red dog", "", "two cats " * 30], model.config.text)
    with torch.no_grad():
        theirs = stock(input_ids=ids, pixel_values=make_images(*NORMALISED["clip"]))
        images, texts = model.encode_image(make_images(IMAGENET_MEAN, IMAGENET_STD)), model.encode_text(ids)
    torch.testing.assert_close(images, theirs.image_embeds, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(texts, theirs.text_embeds, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(model.logit_scale[0], stock.logit_scale)


@pytest.mark.parametrize("name", TIMM)
def test_timm_towers_give_the_same_features_in_every_layer(name: str, tmp_path: Path) -> None:
    arguments = {**VIT, **TIMM[name]}
    stock = shaken(timm.create_model(name, **arguments))
    save_for_hf(stock, tmp_path, model_args=arguments)
    initial = read_initial(f"timm:{tmp_path}")
    assert read_initial(str(tmp_path)).sha256 == initial.sha256
    assert any("LayerScale" in note for note in initial.notes) == hasattr(stock.blocks[0].ls1, "gamma")
    model = ours(initial)
    mean, std = stock.pretrained_cfg["mean"], stock.pretrained_cfg["std"]
    theirs = states_after(stock.blocks, lambda: stock(make_images(mean, std)))
    images = make_images(IMAGENET_MEAN, IMAGENET_STD)
    assert_same(states_after(model.visual.blocks, lambda: model.visual(images)), theirs)


def test_what_is_left_over_is_told_by_what_it_is(tmp_path: Path) -> None:
    left_over = {}
    for name in ("vit_classifier", "dinov2", "siglip_vision", "siglip", "clip_projected"):
        STOCK[name]().save_pretrained(tmp_path / name)
        left_over[name] = {what: len(names) for what, names in read_initial(str(tmp_path / name)).left_over.items()}
    assert left_over["vit_classifier"] == {"classifier": 2}
    assert left_over["dinov2"] == {"mask token": 1}
    assert left_over["siglip_vision"] == {"SigLIP's pooling head": 11}
    assert left_over["siglip"]["SigLIP's sigmoid loss"] == 2
    assert left_over["clip_projected"] == {"projection into CLIP's space": 1}


def test_a_missing_and_an_unexplained_weight_are_named(tmp_path: Path) -> None:
    STOCK["vit"]().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    save_file({**weights, "adapter.weight": torch.ones(2, 3)}, file)
    with pytest.raises(UserError, match=r"hold tensors that no tower here has: adapter.weight \(2, 3\)"):
        read_initial(str(tmp_path))
    del weights["encoder.layer.1.output.dense.bias"]
    save_file(weights, file)
    with pytest.raises(UserError, match=r"lack encoder\.layer\.1\.output\.dense\.bias"):
        read_initial(str(tmp_path))


def test_what_no_tower_here_has_is_refused(tmp_path: Path) -> None:
    for place, reason in ((tmp_path, "no trained model"), (tmp_path / "nothing", "no directory")):
        with pytest.raises(UserError, match=reason):
            read_initial(str(place))
    for config, reason in [
        (transformers.Dinov2Config(**DINOV2, use_swiglu_ffn=True), "SwiGLU"),
        (transformers.Dinov2WithRegistersConfig(**DINOV2), "'dinov2_with_registers' cannot be read"),
        (transformers.ViTConfig(**IMAGE, hidden_act="relu"), "activation is relu"),
        (transformers.BertConfig(), "'bert'"),
    ]:
        config.save_pretrained(tmp_path)
        with pytest.raises(UserError, match=reason):
            read_initial(str(tmp_path))
