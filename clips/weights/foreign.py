"""Towers of transformers, timm and open_clip as configurations and tensors under this project's names.

LayerScale, a factor for each channel at the end of a branch, goes into `attn.proj` and `mlp.fc2`. A bias that a model
lacks is zero here. The mean and deviation that a model was trained with go into its patch convolution, since pictures
here are always normalised with ImageNet's. A tower that computes anything else is refused.
open_clip's directories are read in clips/weights/open_clip.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clips.common.errors import UserError
from clips.common.files import read_json
from clips.common.tensors import listed, read_model, read_safetensors
from clips.config import Activation, ImagePool, TextConfig, VisionConfig
from clips.data.images import IMAGENET_MEAN, IMAGENET_STD
from clips.model.vision import VisionTower
from clips.weights.layouts import ACTIVATIONS, CLIP_TEXT, LINEARS, OPEN_CLIP_VISION, TIMM, VISION_LAYOUTS, Layout

PAIR = {
    "visual.proj.weight": ("visual_projection.weight",),
    "text.proj.weight": ("text_projection.weight",),
    "logit_scale": ("logit_scale",),
}
"""The tensors of a whole CLIP outside its towers."""
Normalisation = tuple[Sequence[float], Sequence[float]]
"""Mean and deviation of red, green and blue, of pictures from 0 to 1."""
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


class NotPlain(Exception):
    """A model has a part that no tower here has."""


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


@dataclass(frozen=True, kw_only=True)
class PlainViT:
    """Shapes: D width · P patch size · N patches · C = 1 with a CLS token, else 0."""

    config: VisionConfig
    tensors: Mapping[str, Tensor]
    """As those of `VisionTower`, with `pos_embed` [C + N, D] always; `norm` may be missing: the identity."""
    last_block: nn.Module
    """The model's own last block."""


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
        config: Any = AutoConfig.from_pretrained(directory, **NO_CODE)
    try:
        vision = _vision_config(getattr(config, "vision_config", config), kind)
        text = None
        if kind == "clip":
            stock = config.text_config
            slots = stock.max_position_embeddings
            text = TextConfig(
                **_same_fields(stock), context_length=slots, vocab_size=stock.vocab_size, causal=True, pool="eos"
            )
    except NotPlain as reason:
        raise UserError(f"{directory}: {reason}, which no tower here has") from None

    source = Source(read_model(directory), directory)
    layout = VISION_LAYOUTS[kind]
    if not getattr(config, "qkv_bias", True):
        layout = replace(layout, unbiased=("attn.qkv",))
    tensors, notes = _folded_tower(source, vision, layout, _normalisation(directory, kind))
    embed_dim = None
    if text is not None:
        text_tensors = source.take(CLIP_TEXT.names(text.layers), CLIP_TEXT.prefix)
        tensors |= {f"text.{name}": tensor for name, tensor in text_tensors.items()}
        tensors |= source.take(PAIR)
        tensors["logit_scale"] = tensors["logit_scale"].reshape(1)
        embed_dim = config.projection_dim
    if (directory / EMBEDDING).is_file():
        tensors["visual.proj.weight"], pool = read_embedding(directory)
        vision = replace(vision, pool=pool)
        embed_dim = len(tensors["visual.proj.weight"])

    return Foreign(
        kind=f"transformers, {kind}",
        vision=vision,
        text=text,
        embed_dim=embed_dim,
        tensors=tensors,
        left_over=source.left_over(layout),
        notes=notes,
    )


def read_timm(directory: Path) -> Foreign:
    """The image tower of a plain `VisionTransformer`, from a directory as timm saves it or as it is on the hub.

    Raises UserError as `read_transformers` does.
    """
    import timm

    from clips.common.opening import loading

    with loading("timm", directory), torch.device("meta"):  # its shapes and settings; the weights are read here
        stock: Any = timm.create_model(f"local-dir:{directory}", pretrained=False)
    try:
        vision, layout = _timm_tower(stock)
        require("norm" in layout.modules, "it has no LayerNorm after its blocks")
    except NotPlain as reason:
        raise UserError(f"{directory}: {reason}, which no tower here has") from None

    source = Source(read_model(directory), directory)
    normalisation = (stock.pretrained_cfg["mean"], stock.pretrained_cfg["std"])
    tensors, notes = _folded_tower(source, vision, layout, normalisation)
    return Foreign(kind="timm", vision=vision, tensors=tensors, left_over=source.left_over(layout), notes=notes)


def plain_vit(module: Any) -> PlainViT:
    """An image tower of this project, open_clip or timm; raises NotPlain if it is more than a plain ViT."""
    if isinstance(module, VisionTower):
        tensors = module.state_dict() | {"pos_embed": module.positions()}
        config = replace(module.config, image_size=module.image_size)
        return PlainViT(config=config, tensors=tensors, last_block=module.blocks[-1])
    if type(module).__name__ == "TimmModel":  # open_clip's
        return plain_vit(module.trunk)

    if type(module).__module__.startswith("open_clip."):
        config, layout = _open_clip_tower(module)
        last_block = module.transformer.resblocks[-1]
    else:
        config, layout = _timm_tower(module)
        last_block = module.blocks[-1]
    tensors, _ = Source(module.state_dict(), type(module).__name__).image_tower(config, layout)
    return PlainViT(config=config, tensors=tensors, last_block=last_block)


def read_embedding(directory: Path) -> tuple[Tensor, ImagePool]:
    """The projection [E, D] of `directory`, and what is pooled before it."""
    tensors, metadata = read_safetensors(directory / EMBEDDING)
    pool: Any = metadata["pool"]
    return tensors["proj.weight"], pool


class Source:
    """Weights under a format's names, and which of them were taken; `place` is for error messages."""

    def __init__(self, weights: Mapping[str, Tensor], place: Any) -> None:
        self.weights = weights
        self.place = place
        self.taken: set[str] = set()

    def take(self, names: Mapping[str, tuple[str, ...]], prefix: str = "") -> dict[str, Tensor]:
        """Copies in fp32 under the names here; UserError lists the names that are missing."""
        if not any(name.startswith(prefix) for name in self.weights):
            prefix = ""
        required = {prefix + name for parts in names.values() for name in parts}
        if missing := sorted(required - self.weights.keys()):
            raise UserError(f"the weights in {self.place} lack {listed(missing)}")
        self.taken |= required
        tensors: dict[str, Tensor] = {}
        for ours, parts in names.items():
            copies = [self.weights[prefix + name].detach().to(torch.float32, copy=True) for name in parts]
            tensors[ours] = copies[0] if len(copies) == 1 else torch.cat(copies)
        return tensors

    def image_tower(self, vision: VisionConfig, layout: Layout) -> tuple[dict[str, Tensor], list[str]]:
        """The tensors of `VisionTower`, all but its projection, and notes on what was done to them."""
        has = {"cls_token": vision.cls, "pre_norm": vision.pre_norm, "patch_embed.bias": vision.patch_bias}
        absent = tuple(name for name, is_there in has.items() if not is_there)
        names = {n: theirs for n, theirs in layout.names(vision.layers).items() if not n.startswith(absent)}
        tensors = self.take(names, layout.prefix)
        notes = []

        for module in layout.unbiased:
            for i in range(vision.layers):
                name = f"blocks.{i}.{module}"
                tensors[f"{name}.bias"] = torch.zeros(len(tensors[f"{name}.weight"]))
        if "attn.qkv" in layout.unbiased:
            notes.append("queries, keys and values have no bias there: here it begins at zero")

        scales = {
            f"blocks.{i}.{ours}": (f"{layout.blocks}.{i}.{theirs}",)
            for i in range(vision.layers)
            for ours, theirs in layout.scales.items()
        }
        if any(name.endswith(scale) for name in self.weights for (scale,) in scales.values()):
            for module, scale in self.take(scales, layout.prefix).items():
                tensors[f"{module}.weight"] *= scale[:, None]
                tensors[f"{module}.bias"] *= scale
            notes.append("LayerScale folded into attn.proj and mlp.fc2")

        for name in ("cls_token", "pos_embed"):  # timm and transformers keep them with axes of length 1 in front
            if name in tensors:
                tensors[name] = tensors[name].reshape(-1, vision.width).squeeze(0)
        patches = (vision.image_size // vision.patch_size) ** 2
        if vision.cls and len(tensors["pos_embed"]) == patches:  # the CLS token has no position there
            tensors["pos_embed"] = torch.cat([torch.zeros(1, vision.width), tensors["pos_embed"]])
        return tensors, notes

    def left_over(self, layout: Layout) -> dict[str, list[str]]:
        """The names that were not taken, by what they are; UserError lists names that no rule explains."""
        groups: dict[str, list[str]] = {}
        for name in sorted(self.weights.keys() - self.taken):
            inner = name.removeprefix(layout.prefix)
            what = next((what for start, what in layout.left_over.items() if inner.startswith(start)), "")
            groups.setdefault(what, []).append(name)
        if unknown := groups.get(""):
            shapes = [f"{name} {tuple(self.weights[name].shape)}" for name in unknown]
            raise UserError(f"the weights in {self.place} hold what has no place here: {listed(shapes)}")
        return groups


def _folded_tower(
    source: Source, vision: VisionConfig, layout: Layout, normalisation: Normalisation
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of `CLIPSModel.visual`, all but its projection, and notes on what was done to them."""
    tensors, notes = source.image_tower(vision, layout)
    if fold_normalisation(tensors, vision, normalisation):
        mean = ", ".join(f"{value:.3g}" for value in normalisation[0])
        notes.append(f"pictures' mean ({mean}) and deviation folded into the patch convolution")
    return {f"visual.{name}": tensor for name, tensor in tensors.items()}, notes


def fold_normalisation(tensors: dict[str, Tensor], vision: VisionConfig, normalisation: Normalisation) -> bool:
    """Change a patch convolution for pictures of this `normalisation` into one for ImageNet's mean and deviation.

    w·(x - m₁)/s₁ is, in terms of y = (x - m₂)/s₂, (w s₂/s₁)·y + w·(m₂ - m₁)/s₁. The constant goes into the bias. If
    there is no bias, it goes into the patches' positions, which is the same sum. Returns whether the two differ.
    """
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in normalisation)
    our_mean, our_std = (torch.tensor(values, dtype=torch.float64) for values in (IMAGENET_MEAN, IMAGENET_STD))
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


def positions_with_bias(positions: Tensor, bias: Tensor | None, prefix_tokens: int) -> Tensor:
    """`positions` [C + N, D] with the patch convolution's `bias` [D], if there is one, added to the patches' rows.

    For classes whose patch convolution has no bias: it is the same sum.
    """
    table = positions.detach().clone()
    if bias is not None:
        table[prefix_tokens:] += bias.detach()
    return table


def _vision_config(stock: Any, kind: str) -> VisionConfig:
    """transformers' configuration of an image tower → ours; raises NotPlain."""
    is_clip = kind.startswith("clip")
    is_siglip = kind.startswith("siglip")
    require(not getattr(stock, "use_swiglu_ffn", False), "its MLPs are gated (SwiGLU)")
    require(stock.num_channels == 3, f"it takes pictures of {stock.num_channels} channels")
    return VisionConfig(
        **_same_fields(stock),
        image_size=_side(stock.image_size),
        patch_size=_side(stock.patch_size),
        pre_norm=is_clip,
        pos_embed="learned",
        patch_bias=not is_clip,
        cls=not is_siglip,
        pool="mean" if is_siglip else "cls",
    )


def _same_fields(stock: Any) -> dict[str, Any]:
    """The fields of both towers in a configuration of transformers → ours; raises NotPlain."""
    require(stock.hidden_act in ACTIVATIONS, f"its activation is {stock.hidden_act}")
    hidden = getattr(stock, "intermediate_size", None) or int(stock.hidden_size * stock.mlp_ratio)
    return {
        "width": stock.hidden_size,
        "layers": stock.num_hidden_layers,
        "heads": stock.num_attention_heads,
        "mlp_ratio": _mlp_ratio(hidden, stock.hidden_size),
        "activation": ACTIVATIONS[stock.hidden_act],
        "norm_eps": stock.layer_norm_eps,
    }


def _normalisation(directory: Path, kind: str) -> Normalisation:
    """How a transformers model's pictures are normalised: as its image processor says, else as is usual."""
    processor = read_json(directory / "preprocessor_config.json")
    processor = processor or read_json(directory / "processor_config.json").get("image_processor", {})
    mean, std = NORMALISED[next(name for name in NORMALISED if kind.startswith(name))]
    return processor.get("image_mean") or mean, processor.get("image_std") or std


def _timm_tower(model: Any) -> tuple[VisionConfig, Layout]:
    """The settings and names of timm's `VisionTransformer`; raises NotPlain if it is more than a plain ViT.

    The settings are read off the modules, so a model on the "meta" device will do.
    """
    kind = type(model).__name__
    require(kind == "VisionTransformer", f"it is a {kind}, not a plain VisionTransformer")
    require(model.reg_token is None, "it has register tokens")
    require(model.pos_embed is not None, "it has no absolute position embedding")
    require(isinstance(model.patch_drop, nn.Identity), "it drops patches")
    require(isinstance(model.patch_embed.norm, nn.Identity), "it has a LayerNorm in its patch embedding")
    for block in model.blocks:
        parts = [type(part).__name__ for part in (block, block.attn, block.mlp)]
        require(parts == ["Block", "Attention", "Mlp"], f"its blocks are made of {', '.join(parts)}")
        extra = [block.attn.q_norm, block.attn.k_norm, block.attn.norm, block.mlp.norm]
        require(all(isinstance(part, nn.Identity) for part in extra), "it normalises inside attention or MLP")
        require(getattr(block.attn, "gate", None) is None, "its attention is gated")

    first = model.blocks[0]
    has_cls = model.cls_token is not None
    config = VisionConfig(
        width=model.embed_dim,
        layers=len(model.blocks),
        heads=first.attn.num_heads,
        image_size=_side(model.patch_embed.img_size),
        patch_size=_side(model.patch_embed.patch_size),
        mlp_ratio=_mlp_ratio(first.mlp.fc1.out_features, model.embed_dim),
        pre_norm=not isinstance(model.norm_pre, nn.Identity),
        pos_embed="learned",
        patch_bias=model.patch_embed.proj.bias is not None,
        cls=has_cls,
        activation=_activation(first.mlp.act),
        pool="cls" if has_cls and model.global_pool == "token" else "mean",
        norm_eps=first.norm1.eps,
    )

    modules = {ours: theirs for ours, theirs in TIMM.modules.items() if ours != "norm"}
    for name in ("fc_norm", "norm"):
        if isinstance(getattr(model, name), nn.LayerNorm):
            modules["norm"] = name
    unbiased = tuple(name for name in LINEARS if first.get_submodule(name).bias is None)
    return config, replace(TIMM, modules=modules, unbiased=unbiased)


def _open_clip_tower(visual: Any) -> tuple[VisionConfig, Layout]:
    """The settings and names of open_clip's own image tower; raises NotPlain if it is more than a plain ViT."""
    require(type(visual).__name__ == "VisionTransformer", f"its image tower is a {type(visual).__name__}, not a ViT")
    require(isinstance(visual.patch_dropout, nn.Identity), "it drops patches")
    blocks = visual.transformer.resblocks
    for block in blocks:
        require(type(block).__name__ == "ResidualAttentionBlock", f"its blocks are {type(block).__name__}")

    first = blocks[0]
    width = visual.conv1.weight.shape[0]
    config = VisionConfig(
        width=width,
        layers=len(blocks),
        heads=first.attn.num_heads,
        image_size=_side(visual.image_size),
        patch_size=_side(visual.conv1.kernel_size),
        mlp_ratio=_mlp_ratio(first.mlp.c_fc.out_features, width),
        pre_norm=not isinstance(visual.ln_pre, nn.Identity),
        pos_embed="learned",
        patch_bias=False,
        activation=_activation(first.mlp.gelu),
        norm_eps=first.ln_1.eps,
    )
    modules = dict(OPEN_CLIP_VISION.modules)
    if len(visual.ln_post.weight) != width:  # the norm of an attention pooling
        del modules["norm"]
    return config, replace(OPEN_CLIP_VISION, modules=modules)


def _activation(module: nn.Module) -> Activation:
    name = type(module).__name__
    if name in ("GELU", "GELUTanh"):
        is_tanh = name == "GELUTanh" or getattr(module, "approximate", "none") == "tanh"
        return "gelu_tanh" if is_tanh else "gelu"
    require(name == "QuickGELU", f"its activation is {name}")
    return "quick_gelu"


def _side(size: int | Sequence[int]) -> int:
    """The side of a square in pixels; raises NotPlain for other shapes."""
    height, width = (size, size) if isinstance(size, int) else size
    require(height == width, f"its pictures or patches are {height} × {width} pixels, which is not square")
    return int(height)


def _mlp_ratio(hidden: int, width: int) -> float:
    """The ratio whose product with `width`, cut to an integer as the blocks cut it, is `hidden`."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def require(condition: bool, reason: str) -> None:
    """Raise NotPlain with `reason` unless `condition` holds."""
    if not condition:
        raise NotPlain(reason)
