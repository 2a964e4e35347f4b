"""Directories of transformers and timm as weights under this project's names.

Pictures here are always normalised with ImageNet's mean and deviation. The mean and deviation that a model was trained
with go into its patch convolution. open_clip's directories are read in clips/weights/open_clip.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clips.common.errors import UserError
from clips.common.files import read_json
from clips.common.tensors import read_model, read_safetensors
from clips.config import Activation, ImagePool, TextConfig, VisionConfig
from clips.data.images import IMAGENET_MEAN, IMAGENET_STD
from clips.weights.layouts import ACTIVATIONS, CLIP_TEXT, VISION_LAYOUTS
from clips.weights.plain_vit import NotPlain, Parts, Source, mlp_ratio, positions_with_bias, require, side, timm_parts

PAIR = {
    "visual.proj.weight": ("visual_projection.weight",),
    "text.proj.weight": ("text_projection.weight",),
    "logit_scale": ("logit_scale",),
}
"""The tensors of a whole CLIP outside its towers."""
LEFT_OVER = {
    "siglip": {"text_model.": "SigLIP's text tower: other tokenizer, pooling", "logit_": "SigLIP's sigmoid loss"},
    "clip_vision_model": {"visual_projection.": "projection into CLIP's space"},
}
"""`model_type` → first letters of names outside the towers that have no place here → what they are."""
Normalisation = tuple[Sequence[float], Sequence[float]]
"""Mean and deviation of red, green and blue, of pictures from 0 to 1."""
POOLS: tuple[ImagePool, ...] = ("mean", "cls")
EMBEDDING = "embedding.safetensors"
"""The projection beside an image tower that this project exported."""
HALF = (0.5, 0.5, 0.5)
NORMALISED: dict[str, Normalisation] = {
    "vit": (HALF, HALF),
    "dinov2": (IMAGENET_MEAN, IMAGENET_STD),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "siglip": (HALF, HALF),
}
"""Normalisation of the published models of a kind, for directories without an image processor."""


@dataclass(frozen=True, kw_only=True)
class Foreign:
    """The parts of a foreign model that this project has; tensors are fp32 and under the names of `CLIPSModel`."""

    kind: str
    vision: VisionConfig
    text: TextConfig | None = None
    embed_dim: int | None = None
    """None: the file has no projections into a space of two towers."""
    tensors: dict[str, Tensor]
    left_over: dict[str, list[str]]
    """What it is → names in the file."""
    notes: list[str]
    """Changes of the weights on the way, for people."""


# ------------------------------------------------------------------------------------------------------- the readers
def kind_of(directory: Path) -> str | None:
    """ "transformers" or "timm", by the config.json in `directory`; None if it is neither."""
    config = read_json(directory / "config.json")
    # This project's own configuration has neither; timm's has no model_type.
    return "transformers" if "model_type" in config else "timm" if "architecture" in config else None


def read_transformers(directory: Path) -> Foreign:
    """The image tower of a ViT, DINOv2, CLIP or SigLIP; both towers and the temperature of a whole CLIP.

    An image tower that this project exported brings its projection. Raises UserError for other kinds, for settings
    that no tower here has, and for weights that are missing or unknown.
    """
    from transformers import AutoConfig

    from clips.common.opening import NO_CODE, loading

    kind = read_json(directory / "config.json")["model_type"]
    if kind not in VISION_LAYOUTS:
        raise UserError(
            f"{directory} holds a transformers model of kind {kind!r}, which maps onto no tower here; those that do: "
            f"{', '.join(VISION_LAYOUTS)}"
        )
    with loading("config.json", directory):
        whole: Any = AutoConfig.from_pretrained(directory, **NO_CODE)
    try:
        vision = _vision_config(getattr(whole, "vision_config", whole), kind)
        text = _text_config(whole.text_config) if kind == "clip" else None
    except NotPlain as reason:
        raise UserError(f"{directory}: {reason}, which no tower here has") from None
    source = Source(read_model(directory), directory)
    layouts = [VISION_LAYOUTS[kind]]
    unbiased = () if getattr(whole, "qkv_bias", True) else ("attn.qkv",)
    tensors, notes = _image_tower(source, Parts(vision, layouts[0], unbiased), _normalised(directory, kind))
    embed_dim = None
    if text is not None:
        layouts.append(CLIP_TEXT)
        taken = source.take(CLIP_TEXT.names(text.layers), CLIP_TEXT.prefix)
        tensors |= {f"text.{name}": tensor for name, tensor in taken.items()} | source.take(PAIR)
        tensors["logit_scale"] = tensors["logit_scale"].reshape(1)
        embed_dim = whole.projection_dim
    if (directory / EMBEDDING).is_file():
        tensors["visual.proj.weight"], pool = read_embedding(directory)
        vision, embed_dim = replace(vision, pool=pool), len(tensors["visual.proj.weight"])
    return Foreign(
        kind=f"transformers, {kind}",
        vision=vision,
        text=text,
        embed_dim=embed_dim,
        tensors=tensors,
        left_over=source.left_over(layouts, LEFT_OVER.get(kind, {})),
        notes=notes,
    )


def read_embedding(directory: Path) -> tuple[Tensor, ImagePool]:
    """The projection [E, D] of `directory`, and what is pooled before it; UserError for an unknown pool."""
    path = directory / EMBEDDING
    tensors, metadata = read_safetensors(path)
    for pool in POOLS:
        if pool == metadata.get("pool"):
            return tensors["proj.weight"], pool
    raise UserError(f"{path}: pool is {metadata.get('pool')!r}, not one of: {', '.join(POOLS)}")


def read_timm(directory: Path) -> Foreign:
    """The image tower of a plain `VisionTransformer`, from a directory as timm saves it or as it is on the hub.

    Raises UserError as `read_transformers` does.
    """
    import timm

    from clips.common.opening import loading

    with loading("timm", directory), torch.device("meta"):  # its shapes and settings; the weights are read here
        stock: Any = timm.create_model(f"local-dir:{directory}", pretrained=False)
    try:
        parts = timm_parts(stock)
        require("norm" in parts.layout.modules, "it has no LayerNorm after its blocks")
    except NotPlain as reason:
        raise UserError(f"{directory}: {reason}, which no tower here has") from None
    source = Source(read_model(directory), directory)
    tensors, notes = _image_tower(source, parts, (stock.pretrained_cfg["mean"], stock.pretrained_cfg["std"]))
    left_over = source.left_over([parts.layout], {})
    return Foreign(kind="timm", vision=parts.config, tensors=tensors, left_over=left_over, notes=notes)


def _image_tower(source: Source, parts: Parts, there: Normalisation) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of `CLIPSModel.visual`, all but its projection, and notes on what was done to them."""
    tensors, notes = source.image_tower(parts)
    if fold_normalisation(tensors, parts.config, there):
        mean = ", ".join(f"{value:.3g}" for value in there[0])
        notes.append(f"pictures' mean ({mean}) and deviation folded into the patch convolution")
    return {f"visual.{name}": tensor for name, tensor in tensors.items()}, notes


# --------------------------------------------------------------------------------------------------------- settings
def _vision_config(stock: Any, kind: str) -> VisionConfig:
    """transformers' configuration of an image tower → ours; raises NotPlain."""
    is_clip, is_siglip = kind.startswith("clip"), kind.startswith("siglip")
    require(not getattr(stock, "use_swiglu_ffn", False), "its MLPs are gated (SwiGLU)")
    require(stock.num_channels == 3, f"it takes pictures of {stock.num_channels} channels")
    hidden = getattr(stock, "intermediate_size", None) or int(stock.hidden_size * stock.mlp_ratio)
    return VisionConfig(
        width=stock.hidden_size,
        layers=stock.num_hidden_layers,
        heads=stock.num_attention_heads,
        image_size=side(stock.image_size),
        patch_size=side(stock.patch_size),
        mlp_ratio=mlp_ratio(hidden, stock.hidden_size),
        pre_norm=is_clip,
        pos_embed="learned",
        patch_bias=not is_clip,
        cls=not is_siglip,
        activation=_activation(stock.hidden_act),
        pool="mean" if is_siglip else "cls",
        norm_eps=stock.layer_norm_eps,
    )


def _text_config(stock: Any) -> TextConfig:
    """transformers' configuration of CLIP's text tower → ours; raises NotPlain."""
    return TextConfig(
        width=stock.hidden_size,
        layers=stock.num_hidden_layers,
        heads=stock.num_attention_heads,
        context_length=stock.max_position_embeddings,
        vocab_size=stock.vocab_size,
        mlp_ratio=mlp_ratio(stock.intermediate_size, stock.hidden_size),
        activation=_activation(stock.hidden_act),
        causal=True,
        pool="eos",
        norm_eps=stock.layer_norm_eps,
    )


def _activation(name: str) -> Activation:
    require(name in ACTIVATIONS, f"its activation is {name}")
    return ACTIVATIONS[name]


# --------------------------------------------------------------------------------------------------- normalisation
def _normalised(directory: Path, kind: str) -> Normalisation:
    """How a transformers model's pictures are normalised: as its image processor says, else as is usual."""
    processor = read_json(directory / "preprocessor_config.json")
    processor = processor or read_json(directory / "processor_config.json").get("image_processor", {})
    mean, std = NORMALISED[next(name for name in NORMALISED if kind.startswith(name))]
    return processor.get("image_mean") or mean, processor.get("image_std") or std


def fold_normalisation(tensors: dict[str, Tensor], vision: VisionConfig, there: Normalisation) -> bool:
    """Change a patch convolution for pictures normalised as `there` into one for ImageNet's mean and deviation.

    w·(x - m₁)/s₁ is, in terms of y = (x - m₂)/s₂, (w s₂/s₁)·y + w·(m₂ - m₁)/s₁. The constant goes into the bias. If
    there is no bias, it goes into the patches' positions, which is the same sum. Returns whether the two differ.
    """
    (mean, std), (our_mean, our_std) = (
        tuple(torch.tensor(values, dtype=torch.float64) for values in pair)
        for pair in (there, (IMAGENET_MEAN, IMAGENET_STD))
    )
    if torch.equal(mean, our_mean) and torch.equal(std, our_std):
        return False
    weight = tensors["patch_embed.weight"].double()
    constant = weight.sum(dim=(2, 3)) @ ((our_mean - mean) / std)
    tensors["patch_embed.weight"] = (weight * (our_std / std)[:, None, None]).float()
    if vision.patch_bias:
        tensors["patch_embed.bias"] = (tensors["patch_embed.bias"].double() + constant).float()
    else:
        tensors["pos_embed"] = positions_with_bias(tensors["pos_embed"], constant, vision.prefix_tokens)
    return True
