"""Image towers of this project, open_clip and timm taken apart: configuration and tensors under the names here.

LayerScale, a factor for each channel at the end of a branch, goes into `attn.proj` and `mlp.fc2`. A bias that a model
lacks is zero here. A tower that computes anything else is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from clips.common.errors import UserError
from clips.common.tensors import listed
from clips.config import Activation, VisionConfig
from clips.model.vision import VisionTower
from clips.weights.layouts import LINEARS, OPEN_CLIP_VISION, TIMM, Layout


class NotPlain(Exception):
    """A model has a part that no tower here has."""


@dataclass(frozen=True, kw_only=True)
class PlainViT:
    """Shapes: D width · P patch size · N patches · C = 1 with a CLS token, else 0."""

    config: VisionConfig
    tensors: Mapping[str, Tensor]
    """As those of `VisionTower`, with `pos_embed` [C + N, D] always; `norm` may be missing: the identity."""
    last_block: nn.Module
    """The model's own last block."""


def plain_vit(module: Any) -> PlainViT:
    """An image tower of this project, open_clip or timm; raises NotPlain if it is more than a plain ViT."""
    if isinstance(module, VisionTower):
        config, tensors = replace(module.config, image_size=module.image_size), module.state_dict()
        return PlainViT(
            config=config, tensors=tensors | {"pos_embed": module.positions()}, last_block=module.blocks[-1]
        )
    if type(module).__name__ == "TimmModel":  # open_clip's
        return plain_vit(module.trunk)
    if type(module).__module__.startswith("open_clip."):
        parts, blocks = open_clip_parts(module), module.transformer.resblocks
    else:
        parts, blocks = timm_parts(module), module.blocks
    tensors, _ = Source(module.state_dict(), type(module).__name__).image_tower(parts)
    return PlainViT(config=parts.config, tensors=tensors, last_block=blocks[-1])


class Parts(NamedTuple):
    """What an image tower is made of."""

    config: VisionConfig
    layout: Layout
    unbiased: tuple[str, ...] = ()
    """Modules of a block that have no bias there."""
    bare_positions: bool = False
    """Whether the CLS token has no position."""


def timm_parts(model: Any) -> Parts:
    """timm's `VisionTransformer`; raises NotPlain if it is more than a plain ViT.

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
        image_size=side(model.patch_embed.img_size),
        patch_size=side(model.patch_embed.patch_size),
        mlp_ratio=mlp_ratio(first.mlp.fc1.out_features, model.embed_dim),
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
    return Parts(config, replace(TIMM, modules=modules), unbiased, bare_positions=has_cls and model.no_embed_class)


def open_clip_parts(visual: Any) -> Parts:
    """open_clip's own image tower; raises NotPlain if it is more than a plain ViT."""
    require(type(visual).__name__ == "VisionTransformer", f"its image tower is a {type(visual).__name__}, not a ViT")
    require(isinstance(visual.patch_dropout, nn.Identity), "it drops patches")
    blocks = visual.transformer.resblocks
    for block in blocks:
        require(type(block).__name__ == "ResidualAttentionBlock", f"its blocks are {type(block).__name__}")
    first, width = blocks[0], visual.conv1.weight.shape[0]
    config = VisionConfig(
        width=width,
        layers=len(blocks),
        heads=first.attn.num_heads,
        image_size=side(visual.image_size),
        patch_size=side(visual.conv1.kernel_size),
        mlp_ratio=mlp_ratio(first.mlp.c_fc.out_features, width),
        pre_norm=not isinstance(visual.ln_pre, nn.Identity),
        pos_embed="learned",
        patch_bias=False,
        activation=_activation(first.mlp.gelu),
        norm_eps=first.ln_1.eps,
    )
    modules = dict(OPEN_CLIP_VISION.modules)
    if len(visual.ln_post.weight) != width:  # the norm of an attention pooling
        del modules["norm"]
    return Parts(config, replace(OPEN_CLIP_VISION, modules=modules))


class Source:
    """Weights under a format's names, and which of them were taken; `place` is for error messages."""

    def __init__(self, weights: Mapping[str, Tensor], place: Any) -> None:
        self.weights, self.place = dict(weights), place
        self.taken: set[str] = set()

    def take(self, names: Mapping[str, tuple[str, ...]], prefix: str = "") -> dict[str, Tensor]:
        """Copies in fp32 under the names here; UserError lists the names that are missing."""
        if not any(name.startswith(prefix) for name in self.weights):
            prefix = ""
        wanted = {prefix + name for parts in names.values() for name in parts}
        if missing := sorted(wanted - self.weights.keys()):
            raise UserError(f"the weights in {self.place} lack {listed(missing)}")
        self.taken |= wanted
        tensors: dict[str, Tensor] = {}
        for ours, parts in names.items():
            copies = [self.weights[prefix + name].detach().to(torch.float32, copy=True) for name in parts]
            tensors[ours] = copies[0] if len(copies) == 1 else torch.cat(copies)
        return tensors

    def image_tower(self, parts: Parts) -> tuple[dict[str, Tensor], list[str]]:
        """The tensors of `VisionTower`, all but its projection, and notes on what was done to them."""
        vision, layout, notes = parts.config, parts.layout, []
        has = {"cls_token": vision.cls, "pre_norm": vision.pre_norm, "patch_embed.bias": vision.patch_bias}
        absent = tuple(name for name, is_there in has.items() if not is_there)
        zeros = tuple(f"{module}.bias" for module in parts.unbiased)
        names = {n: theirs for n, theirs in layout.names(vision.layers).items() if not n.startswith(absent)}
        tensors = self.take({n: theirs for n, theirs in names.items() if not n.endswith(zeros)}, layout.prefix)
        for name in [name for name in names if name not in tensors]:
            tensors[name] = torch.zeros(len(tensors[name.removesuffix("bias") + "weight"]))
        if "attn.qkv" in parts.unbiased:
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
        if parts.bare_positions:
            tensors["pos_embed"] = torch.cat([torch.zeros(1, vision.width), tensors["pos_embed"]])
        return tensors, notes

    def left_over(self, layouts: Sequence[Layout], others: Mapping[str, str]) -> dict[str, list[str]]:
        """The names that were not taken, by what they are; UserError lists names that no rule explains."""
        rules = dict(others)
        for layout in layouts:
            rules |= {start + name: what for name, what in layout.left_over.items() for start in ("", layout.prefix)}
        found: dict[str, list[str]] = {}
        for name in sorted(self.weights.keys() - self.taken):
            what = next((what for start, what in rules.items() if name.startswith(start)), "")
            found.setdefault(what, []).append(name)
        if unknown := found.get(""):
            shapes = [f"{name} {tuple(self.weights[name].shape)}" for name in unknown]
            raise UserError(f"the weights in {self.place} hold what has no place here: {listed(shapes)}")
        return found


def positions_with_bias(positions: Tensor, bias: Tensor | None, prefix_tokens: int) -> Tensor:
    """`positions` [C + N, D] with the patch convolution's `bias` [D], if there is one, added to the patches' rows.

    For classes whose patch convolution has no bias: it is the same sum.
    """
    table = positions.detach().clone()
    if bias is not None:
        table[prefix_tokens:] += bias.detach()
    return table


def _activation(module: nn.Module) -> Activation:
    name = type(module).__name__
    if name in ("GELU", "GELUTanh"):
        is_tanh = name == "GELUTanh" or getattr(module, "approximate", "none") == "tanh"
        return "gelu_tanh" if is_tanh else "gelu"
    require(name == "QuickGELU", f"its activation is {name}")
    return "quick_gelu"


def side(size: int | Sequence[int]) -> int:
    """The side of a square in pixels; raises NotPlain for other shapes."""
    height, width = (size, size) if isinstance(size, int) else size
    require(height == width, f"its pictures or patches are {height} × {width} pixels, which is not square")
    return int(height)


def mlp_ratio(hidden: int, width: int) -> float:
    """The ratio whose product with `width`, cut to an integer as the blocks cut it, is `hidden`."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def require(condition: bool, reason: str) -> None:
    """Raise NotPlain with `reason` unless `condition` holds."""
    if not condition:
        raise NotPlain(reason)
