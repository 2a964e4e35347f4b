"""Towers of transformers and timm under this project's names: one visible table a format, nothing else taken.

What the tables cannot say is done here, exactly: separate query, key and value matrices are joined; LayerScale, a
factor for each channel at the end of a branch, goes into `attn.proj` and `mlp.fc2`; the mean and deviation that a
model's pictures are normalised with go into its patch convolution, since pictures here are always normalised with
ImageNet's. open_clip's formats are in clips/weights/open_clip.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clips.common.errors import UserError
from clips.common.tensors import read_metadata, read_weights
from clips.config import Activation, ImagePool, TextConfig, VisionConfig
from clips.data.images import IMAGENET_MEAN, IMAGENET_STD

QKV = ("attn.q", "attn.k", "attn.v")
VIT_BLOCK = {
    "norm1": "layernorm_before",
    "attn.q": "attention.attention.query",
    "attn.k": "attention.attention.key",
    "attn.v": "attention.attention.value",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
CLIP_VISION_BLOCK = {
    "norm1": "layer_norm1",
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.proj": "self_attn.out_proj",
    "norm2": "layer_norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
DINOV2_BLOCK = {
    "norm1": "norm1",
    "attn.q": "attention.attention.query",
    "attn.k": "attention.attention.key",
    "attn.v": "attention.attention.value",
    "attn.proj": "attention.output.dense",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
TIMM_BLOCK = {name: name for name in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where a format keeps a tower: our name → its name, of modules (weight and bias) and of single tensors."""

    prefix: str = ""
    """What stands before every name in files of models that have more than this tower."""
    tensors: Mapping[str, str]
    modules: Mapping[str, str]
    blocks: str
    """Of the list of blocks."""
    block: Mapping[str, str]
    scales: Mapping[str, str] = field(default_factory=dict)
    """LayerScale: the module here that it is folded into → its name inside a block."""
    left_over: Mapping[str, str] = field(default_factory=dict)
    """First letters of names that have no place here → what they are."""

    def names(self, layers: int) -> dict[str, tuple[str, ...]]:
        """Our tensor → those of the file that it is made of, one after the other."""
        found: dict[str, tuple[str, ...]] = {ours: (theirs,) for ours, theirs in self.tensors.items()}
        modules: dict[str, tuple[str, ...]] = {ours: (theirs,) for ours, theirs in self.modules.items()}
        for i in range(layers):
            for ours, theirs in self.block.items():
                name = f"blocks.{i}." + ("attn.qkv" if ours in QKV else ours)
                modules[name] = (*modules.get(name, ()), f"{self.blocks}.{i}.{theirs}")
        for ours, parts in modules.items():
            for kind in ("weight", "bias"):
                found[f"{ours}.{kind}"] = tuple(f"{part}.{kind}" for part in parts)
        return found


CLIP_VISION = Layout(
    prefix="vision_model.",
    tensors={"cls_token": "embeddings.class_embedding", "pos_embed": "embeddings.position_embedding.weight"},
    modules={"patch_embed": "embeddings.patch_embedding", "pre_norm": "pre_layrnorm", "norm": "post_layernorm"},
    blocks="encoder.layers",
    block=CLIP_VISION_BLOCK,
    left_over={"embeddings.position_ids": "the numbers 0, 1, 2, …"},
)
SIGLIP_VISION = replace(
    CLIP_VISION,
    tensors={"pos_embed": "embeddings.position_embedding.weight"},
    modules={"patch_embed": "embeddings.patch_embedding", "norm": "post_layernorm"},
    left_over={**CLIP_VISION.left_over, "head.": "SigLIP's pooling head"},
)
CLIP_TEXT = Layout(
    prefix="text_model.",
    tensors={
        "token_embed.weight": "embeddings.token_embedding.weight",
        "pos_embed": "embeddings.position_embedding.weight",
    },
    modules={"norm": "final_layer_norm"},
    blocks="encoder.layers",
    block=CLIP_VISION_BLOCK,
    left_over={"embeddings.position_ids": "the numbers 0, 1, 2, …"},
)
VIT = Layout(
    prefix="vit.",
    tensors={"cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings"},
    modules={"patch_embed": "embeddings.patch_embeddings.projection", "norm": "layernorm"},
    blocks="encoder.layer",
    block=VIT_BLOCK,
    left_over={
        "pooler.": "ViT's pooler",
        "classifier.": "classifier",
        "embeddings.mask_token": "mask token",
        "decoder.": "decoder of masked images",
    },
)
DINOV2 = replace(
    VIT,
    prefix="dinov2.",
    block=DINOV2_BLOCK,
    scales={"attn.proj": "layer_scale1.lambda1", "mlp.fc2": "layer_scale2.lambda1"},
)
TIMM = Layout(
    tensors={"cls_token": "cls_token", "pos_embed": "pos_embed"},
    modules={"patch_embed": "patch_embed.proj", "pre_norm": "norm_pre", "norm": "norm"},
    blocks="blocks",
    block=TIMM_BLOCK,
    scales={"attn.proj": "ls1.gamma", "mlp.fc2": "ls2.gamma"},
    left_over={"head.": "classifier", "attn_pool.": "attention pooling"},
)
VISION_LAYOUTS = {
    "vit": VIT,
    "dinov2": DINOV2,
    "clip_vision_model": CLIP_VISION,
    "clip": CLIP_VISION,
    "siglip_vision_model": SIGLIP_VISION,
    "siglip": SIGLIP_VISION,
}
"""transformers' `model_type` → where the image tower is."""
PAIR = {
    "visual.proj.weight": "visual_projection.weight",
    "text.proj.weight": "text_projection.weight",
    "logit_scale": "logit_scale",
}
"""What a whole CLIP has beside its towers."""
LEFT_OVER = {
    "siglip": {"text_model.": "SigLIP's text tower: other tokenizer, pooling", "logit_": "SigLIP's sigmoid loss"},
    "clip_vision_model": {"visual_projection.": "projection into CLIP's space"},
}
"""`model_type` → first letters of names outside the towers that have no place here → what they are."""
ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "quick_gelu": "quick_gelu",
}
"""transformers' `hidden_act` → ours."""
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
"""What the published models of a kind were trained with, for directories that do not say."""
SHOWN = 8
"""Names listed in an error message before "and N more"."""


class NotPlain(Exception):
    """What a model has that no tower here has."""


@dataclass(frozen=True, kw_only=True)
class Foreign:
    """What is taken of a foreign model; tensors are fp32 and under the names of `CLIPSModel`."""

    kind: str
    vision: VisionConfig
    text: TextConfig | None = None
    embed_dim: int | None = None
    """None: the file has no projections into a space of two towers."""
    tensors: dict[str, Tensor]
    left_over: dict[str, list[str]]
    """What it is → names in the file."""
    notes: list[str]
    """What was done to weights on the way, for people."""


# ------------------------------------------------------------------------------------------------------- the readers
def kind_of(directory: Path) -> str | None:
    """ "transformers" or "timm", by the config.json in `directory`; None where it is neither."""
    config = _json(directory / "config.json")
    # This project's own configuration has neither; timm's has no model_type.
    return "transformers" if "model_type" in config else "timm" if "architecture" in config else None


def read_transformers(directory: Path) -> Foreign:
    """The image tower of a ViT, DINOv2, CLIP or SigLIP, with its projection where it is an export of this project; of a
    whole CLIP both towers and the temperature.

    Raises UserError for other kinds, for settings that no tower here has, and for weights that are missing or that no
    table explains.
    """
    from transformers import AutoConfig

    from clips.common.stock import NO_CODE, loading

    kind = _json(directory / "config.json")["model_type"]
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
    file = _File(directory)
    has_bias = getattr(whole, "qkv_bias", True)
    tensors, notes = file.image_tower(VISION_LAYOUTS[kind], vision, _normalised(directory, kind), qkv_bias=has_bias)
    if text is not None:
        tensors |= file.take("text.", CLIP_TEXT.names(text.layers), CLIP_TEXT.prefix)
        tensors |= file.take("", {ours: (theirs,) for ours, theirs in PAIR.items()})
        tensors["logit_scale"] = tensors["logit_scale"].reshape(1)
    embed_dim = whole.projection_dim if text is not None else None
    if (directory / EMBEDDING).is_file():
        tensors["visual.proj.weight"], pool = read_embedding(directory)
        vision, embed_dim = replace(vision, pool=pool), len(tensors["visual.proj.weight"])
    layouts = [VISION_LAYOUTS[kind], CLIP_TEXT] if text is not None else [VISION_LAYOUTS[kind]]
    return Foreign(
        kind=f"transformers, {kind}",
        vision=vision,
        text=text,
        embed_dim=embed_dim,
        tensors=tensors,
        left_over=file.left_over(layouts, LEFT_OVER.get(kind, {})),
        notes=notes,
    )


def read_embedding(directory: Path) -> tuple[Tensor, ImagePool]:
    """The projection [E, D] of `directory` and what it is applied to; exports of before have the mean of the patches.

    Raises UserError where there is none.
    """
    path = directory / EMBEDDING
    weight = read_weights(path)["proj.weight"]
    said = read_metadata(path).get("pool", "mean")
    pool = next((pool for pool in POOLS if pool == said), None)
    if pool is None:
        raise UserError(f"{path}: pool is {said!r}, not one of: {', '.join(POOLS)}")
    return weight, pool


def read_timm(directory: Path) -> Foreign:
    """The image tower of a plain `VisionTransformer`; a directory as timm saves it and as it stands on the hub.

    Raises UserError as `read_transformers` does.
    """
    import timm

    from clips.common.stock import loading

    with loading("timm", directory), torch.device("meta"):  # its shapes and settings; the weights are read here
        stock: Any = timm.create_model(f"local-dir:{directory}", pretrained=False)
    try:
        vision = timm_vision_config(stock)
        _require(stock.blocks[0].attn.proj.bias is not None, "it has linear layers without bias")
        _require(not isinstance(stock.norm, nn.Identity) or not isinstance(stock.fc_norm, nn.Identity), NO_NORM)
    except NotPlain as reason:
        raise UserError(f"{directory}: {reason}, which no tower here has") from None
    absent = {"cls_token"} if not vision.cls else set()
    modules = {**TIMM.modules, "norm": "fc_norm" if isinstance(stock.norm, nn.Identity) else "norm"}
    if not vision.pre_norm:
        del modules["pre_norm"]
    tensors = {ours: theirs for ours, theirs in TIMM.tensors.items() if ours not in absent}
    layout = replace(TIMM, tensors=tensors, modules=modules)
    file = _File(directory)
    if stock.no_embed_class and vision.cls and (table := file.weights.get("pos_embed")) is not None:
        file.weights["pos_embed"] = torch.cat([torch.zeros_like(table[:, :1]), table], dim=1)
    normalisation = stock.pretrained_cfg["mean"], stock.pretrained_cfg["std"]
    has_bias = stock.blocks[0].attn.qkv.bias is not None
    found, notes = file.image_tower(layout, vision, normalisation, qkv_bias=has_bias)
    left_over = file.left_over([layout], {})
    return Foreign(kind="timm", vision=vision, tensors=found, left_over=left_over, notes=notes)


NO_NORM = "it has no LayerNorm after its blocks"


class _File:
    """The weights of a directory, and which of them were taken."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.weights = read_directory(directory)
        self.taken: set[str] = set()

    def take(self, part: str, names: Mapping[str, tuple[str, ...]], prefix: str = "") -> dict[str, Tensor]:
        """Tensors by our names, with `part` in front; UserError listing what the file lacks."""
        if not any(name.startswith(prefix) for name in self.weights):
            prefix = ""
        wanted = {prefix + name for parts in names.values() for name in parts}
        if missing := sorted(wanted - self.weights.keys()):
            raise UserError(f"the weights in {self.directory} lack {_listed(missing)}")
        self.taken |= wanted
        return {part + ours: _joined([self.weights[prefix + name] for name in parts]) for ours, parts in names.items()}

    def image_tower(
        self, layout: Layout, vision: VisionConfig, normalisation: Normalisation, *, qkv_bias: bool
    ) -> tuple[dict[str, Tensor], list[str]]:
        """The tensors of `CLIPSModel.visual`, all but its projection, and what was done to them."""
        names, notes = layout.names(vision.layers), []
        unbiased = (() if vision.patch_bias else ("patch_embed.bias",)) + (() if qkv_bias else ("attn.qkv.bias",))
        tensors = self.take(
            "", {ours: parts for ours, parts in names.items() if not ours.endswith(unbiased)}, layout.prefix
        )
        if not qkv_bias:
            zeros = {f"blocks.{i}.attn.qkv.bias": torch.zeros(3 * vision.width) for i in range(vision.layers)}
            tensors |= zeros
            notes.append("queries, keys and values have no bias there: here it begins at zero")
        scales = self._scales(layout, vision.layers)
        for module, scale in scales.items():
            tensors[f"{module}.weight"] *= scale[:, None]
            tensors[f"{module}.bias"] *= scale
        if scales:
            notes.append("LayerScale folded into attn.proj and mlp.fc2")
        for name in ("cls_token", "pos_embed"):  # timm and transformers keep them with axes of length 1 in front
            if name in tensors:
                tensors[name] = tensors[name].reshape(-1, vision.width).squeeze(0)
        if fold_normalisation(tensors, vision, normalisation):
            mean = ", ".join(f"{value:.3g}" for value in normalisation[0])
            notes.append(f"pictures' mean ({mean}) and deviation folded into the patch convolution")
        return {f"visual.{name}": tensor for name, tensor in tensors.items()}, notes

    def _scales(self, layout: Layout, layers: int) -> dict[str, Tensor]:
        """Module here → the LayerScale that is folded into it, for those that the file has."""
        names = {
            f"blocks.{i}.{ours}": (f"{layout.blocks}.{i}.{theirs}",)
            for i in range(layers)
            for ours, theirs in layout.scales.items()
        }
        has_scales = any(name.endswith(scale) for name in self.weights for (scale,) in names.values())
        return self.take("", names, layout.prefix) if has_scales else {}

    def left_over(self, layouts: Sequence[Layout], others: Mapping[str, str]) -> dict[str, list[str]]:
        """What was not taken, by what it is; UserError listing what no rule explains."""
        rules = dict(others)
        for layout in layouts:
            rules |= {start + name: what for name, what in layout.left_over.items() for start in ("", layout.prefix)}
        found: dict[str, list[str]] = {}
        for name in sorted(self.weights.keys() - self.taken):
            what = next((what for start, what in rules.items() if name.startswith(start)), "")
            found.setdefault(what, []).append(name)
        if unknown := found.get(""):
            shapes = [f"{name} {tuple(self.weights[name].shape)}" for name in unknown]
            raise UserError(f"the weights in {self.directory} hold what has no place here: {_listed(shapes)}")
        return found


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """A copy in fp32, of several one after the other."""
    return parts[0].to(torch.float32, copy=True) if len(parts) == 1 else torch.cat([part.float() for part in parts])


def read_directory(directory: Path) -> dict[str, Tensor]:
    """All weights of a model's directory, in one file or several: safetensors, else torch files without code."""
    for pattern in ("model*.safetensors", "pytorch_model*.bin"):  # open_clip's may lie beside them
        if files := sorted(directory.glob(pattern)):
            return {name: tensor for path in files for name, tensor in read_weights(path).items()}
    raise UserError(f"{directory} holds no weights (model*.safetensors or pytorch_model*.bin)")


# --------------------------------------------------------------------------------------------------------- settings
def _vision_config(stock: Any, kind: str) -> VisionConfig:
    """transformers' configuration of an image tower → ours; raises NotPlain."""
    is_clip, is_siglip = kind.startswith("clip"), kind.startswith("siglip")
    _require(not getattr(stock, "use_swiglu_ffn", False), "its MLPs are gated (SwiGLU)")
    _require(stock.num_channels == 3, f"it takes pictures of {stock.num_channels} channels")
    size, patch = _side(stock.image_size), _side(stock.patch_size)
    hidden = getattr(stock, "intermediate_size", None) or int(stock.hidden_size * stock.mlp_ratio)
    return VisionConfig(
        width=stock.hidden_size,
        layers=stock.num_hidden_layers,
        heads=stock.num_attention_heads,
        image_size=size,
        patch_size=patch,
        mlp_ratio=_ratio(hidden, stock.hidden_size),
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
        mlp_ratio=_ratio(stock.intermediate_size, stock.hidden_size),
        activation=_activation(stock.hidden_act),
        causal=True,
        pool="eos",
        norm_eps=stock.layer_norm_eps,
    )


def timm_vision_config(model: Any) -> VisionConfig:
    """What timm's `VisionTransformer` is in this project's terms; raises NotPlain where it is more than a plain ViT.

    Its positions are learned; the settings are read off the modules, so a model on the "meta" device will do.
    """
    kind = type(model).__name__
    _require(kind == "VisionTransformer", f"it is a {kind}, not a plain VisionTransformer")
    _require(model.reg_token is None, "it has register tokens")
    _require(model.pos_embed is not None, "it has no absolute position embedding")
    _require(isinstance(model.patch_drop, nn.Identity), "it drops patches")
    _require(isinstance(model.patch_embed.norm, nn.Identity), "it has a LayerNorm in its patch embedding")
    for block in model.blocks:
        parts = [type(part).__name__ for part in (block, block.attn, block.mlp)]
        _require(parts == ["Block", "Attention", "Mlp"], f"its blocks are made of {', '.join(parts)}")
        extra = [block.attn.q_norm, block.attn.k_norm, block.attn.norm, block.mlp.norm]
        _require(all(isinstance(part, nn.Identity) for part in extra), "it normalises inside attention or MLP")
        _require(getattr(block.attn, "gate", None) is None, "its attention is gated")
    first = model.blocks[0]
    has_cls = model.cls_token is not None
    return VisionConfig(
        width=model.embed_dim,
        layers=len(model.blocks),
        heads=first.attn.num_heads,
        image_size=_side(model.patch_embed.img_size),
        patch_size=_side(model.patch_embed.patch_size),
        mlp_ratio=_ratio(first.mlp.fc1.out_features, model.embed_dim),
        pre_norm=not isinstance(model.norm_pre, nn.Identity),
        pos_embed="learned",
        patch_bias=model.patch_embed.proj.bias is not None,
        cls=has_cls,
        activation=module_activation(first.mlp.act),
        pool="cls" if has_cls and model.global_pool == "token" else "mean",
        norm_eps=first.norm1.eps,
    )


def module_activation(module: nn.Module) -> Activation:
    """Which activation a module of timm or open_clip is; raises NotPlain."""
    name = type(module).__name__
    if name in ("GELU", "GELUTanh"):
        is_tanh = name == "GELUTanh" or getattr(module, "approximate", "none") == "tanh"
        return "gelu_tanh" if is_tanh else "gelu"
    _require(name == "QuickGELU", f"its activation is {name}")
    return "quick_gelu"


def _activation(name: str) -> Activation:
    _require(name in ACTIVATIONS, f"its activation is {name}")
    return ACTIVATIONS[name]


def _side(size: int | Sequence[int]) -> int:
    height, width = (size, size) if isinstance(size, int) else size
    _require(height == width, f"its pictures or patches are {height} × {width} pixels, which is not square")
    return int(height)


def _ratio(hidden: int, width: int) -> float:
    """`mlp_ratio` whose product with `width`, cut to an integer as the blocks cut it, is `hidden`."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise NotPlain(reason)


# --------------------------------------------------------------------------------------------------- normalisation
def _normalised(directory: Path, kind: str) -> Normalisation:
    """How the pictures that a transformers model takes are normalised, by its image processor if it has one."""
    processor = _json(directory / "preprocessor_config.json")
    processor = processor or _json(directory / "processor_config.json").get("image_processor", {})
    mean, std = NORMALISED[next(name for name in NORMALISED if kind.startswith(name))]
    return processor.get("image_mean") or mean, processor.get("image_std") or std


def fold_normalisation(tensors: dict[str, Tensor], vision: VisionConfig, there: Normalisation) -> bool:
    """Make a patch convolution for pictures normalised as `there` one for ImageNet's mean and deviation.

    w·(x - m₁)/s₁ is, in terms of y = (x - m₂)/s₂, (w s₂/s₁)·y + w·(m₂ - m₁)/s₁. The constant goes into the bias, or,
    where there is none, into the patches' positions, which is the same sum. Returns whether the two differ.
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
        table = tensors["pos_embed"].clone()
        table[vision.prefix_tokens :] += constant
        tensors["pos_embed"] = table
    return True


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise UserError(f"{path} is not readable JSON: {error}") from None


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
