"""Vision transformers of this project, open_clip and timm as stock transformers models, where the mapping is exact.

A reader takes a foreign model apart into a `PlainViT`; one writer puts that into the transformers class that computes
the same: `ViTModel` (no LayerNorm before the blocks), `CLIPVisionModel` (with one) or `SiglipVisionModel` (no CLS).
Layer scale is folded into the matrix before it, a missing bias is zero, and a patch bias that the class lacks goes
into the positions. Whatever else a model does is refused, and every mapping is compared with the original on random
images before it is used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

from clips import CLIP_VISION_BLOCK, VIT_BLOCK, NotPlain, module_activation, timm_vision_config
from clips.common.errors import UserError

TOLERANCE = 1e-3
"""Largest difference of a token, relative to the tokens' largest value, between a mapped model and its original."""
ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu"}
"""This project's name of an activation → transformers'."""
Linear = tuple[Tensor, Tensor]
"""Weight and bias."""


@dataclass(frozen=True, kw_only=True)
class PlainViT:
    """Shapes: W width · P patch size · N patches."""

    patch: Linear
    """[W, 3, P, P], [W]"""
    cls: Tensor | None
    """[W]"""
    positions: Tensor
    """[N, W], or [1 + N, W] when there is a CLS"""
    pre_norm: Linear | None
    blocks: list[dict[str, Linear]]
    """One dict per block; its keys are those of `clips.VIT_BLOCK`."""
    norm: Linear
    heads: int
    activation: str
    eps: float
    image_size: int


def read_clips(tower: Any) -> PlainViT:
    """Take this project's own image tower apart."""
    blocks = []
    for block in tower.blocks:
        q, k, v = zip(block.attn.qkv.weight.chunk(3), block.attn.qkv.bias.chunk(3), strict=True)
        parts = {"norm1": block.norm1, "norm2": block.norm2, "attn.proj": block.attn.proj}
        parts |= {"mlp.fc1": block.mlp.fc1, "mlp.fc2": block.mlp.fc2}
        blocks.append({"attn.q": q, "attn.k": k, "attn.v": v} | {name: _pair(part) for name, part in parts.items()})
    config = tower.config
    return PlainViT(
        patch=_pair(tower.patch_embed),
        cls=tower.cls_token,
        positions=tower.positions(),
        pre_norm=_pair(tower.pre_norm) if config.pre_norm else None,
        blocks=blocks,
        norm=_pair(tower.norm),
        heads=config.heads,
        activation=ACTIVATIONS[config.activation],
        eps=config.norm_eps,
        image_size=tower.image_size,
    )


def read_open_clip(visual: Any) -> PlainViT:
    """Take open_clip's image tower apart; raises NotPlain where it is more than a plain ViT."""
    if type(visual).__name__ == "TimmModel":
        return read_timm(visual.trunk)
    _require(type(visual).__name__ == "VisionTransformer", f"its image tower is a {type(visual).__name__}, not a ViT")
    _require(isinstance(visual.patch_dropout, nn.Identity), "it drops patches")
    blocks = []
    for block in visual.transformer.resblocks:
        _require(type(block).__name__ == "ResidualAttentionBlock", f"its blocks are {type(block).__name__}")
        q, k, v = zip(block.attn.in_proj_weight.chunk(3), block.attn.in_proj_bias.chunk(3), strict=True)
        blocks.append(
            {
                "norm1": _pair(block.ln_1),
                "attn.q": q,
                "attn.k": k,
                "attn.v": v,
                "attn.proj": _scaled(block.attn.out_proj, block.ls_1),
                "norm2": _pair(block.ln_2),
                "mlp.fc1": _pair(block.mlp.c_fc),
                "mlp.fc2": _scaled(block.mlp.c_proj, block.ls_2),
            }
        )
    first = visual.transformer.resblocks[0]
    width = visual.conv1.weight.shape[0]
    no_norm = isinstance(visual.ln_pre, nn.Identity)
    return PlainViT(
        patch=_pair(visual.conv1),
        cls=visual.class_embedding,
        positions=visual.positional_embedding,
        pre_norm=None if no_norm else _pair(visual.ln_pre),
        blocks=blocks,
        norm=_pair(visual.ln_post) if len(visual.ln_post.weight) == width else (torch.ones(width), torch.zeros(width)),
        heads=first.attn.num_heads,
        activation=ACTIVATIONS[module_activation(first.mlp.gelu)],
        eps=first.ln_1.eps,
        image_size=_square(visual.image_size),
    )


def read_timm(model: Any) -> PlainViT:
    """Take timm's `VisionTransformer` apart; raises NotPlain where it is more than a plain ViT."""
    vision = timm_vision_config(model)
    blocks = []
    for block in model.blocks:
        weight, bias = _pair(block.attn.qkv)
        q, k, v = zip(weight.chunk(3), bias.chunk(3), strict=True)
        blocks.append(
            {
                "norm1": _pair(block.norm1),
                "attn.q": q,
                "attn.k": k,
                "attn.v": v,
                "attn.proj": _scaled(block.attn.proj, block.ls1),
                "norm2": _pair(block.norm2),
                "mlp.fc1": _pair(block.mlp.fc1),
                "mlp.fc2": _scaled(block.mlp.fc2, block.ls2),
            }
        )
    cls = None if model.cls_token is None else model.cls_token[0, 0]
    positions = model.pos_embed[0]
    if cls is not None and model.no_embed_class:
        positions = torch.cat([torch.zeros_like(positions[:1]), positions])
    final = model.norm if isinstance(model.norm, nn.LayerNorm) else model.fc_norm
    width = model.embed_dim
    return PlainViT(
        patch=_pair(model.patch_embed.proj),
        cls=cls,
        positions=positions,
        pre_norm=None if isinstance(model.norm_pre, nn.Identity) else _pair(model.norm_pre),
        blocks=blocks,
        norm=_pair(final) if isinstance(final, nn.LayerNorm) else (torch.ones(width), torch.zeros(width)),
        heads=vision.heads,
        activation=ACTIVATIONS[vision.activation],
        eps=vision.norm_eps,
        image_size=vision.image_size,
    )


@torch.no_grad()
def to_transformers(plain: PlainViT) -> PreTrainedModel:
    """The stock model (fp32, eval mode) that computes what `plain` does; raises NotPlain where no class does."""
    width, _, patch_size, patch_width = plain.patch[0].shape
    _require(patch_size == patch_width, "its patches are not square")
    common: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": len(plain.blocks),
        "num_attention_heads": plain.heads,
        "intermediate_size": plain.blocks[0]["mlp.fc1"][0].shape[0],
        "hidden_act": plain.activation,
        "layer_norm_eps": plain.eps,
        "image_size": plain.image_size,
        "patch_size": patch_size,
    }
    cls: type[PreTrainedModel]
    config: PreTrainedConfig
    tensors: dict[str, Tensor] = {}

    def put(name: str, pair: Linear) -> None:
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = pair

    if plain.cls is not None and plain.pre_norm is None:
        cls, config, prefix, names = ViTModel, ViTConfig(**common), "encoder.layer", VIT_BLOCK
        tensors["embeddings.cls_token"] = plain.cls[None, None]
        tensors["embeddings.position_embeddings"] = plain.positions[None]
        put("embeddings.patch_embeddings.projection", plain.patch)
        put("layernorm", plain.norm)
    else:
        prefix, names = "vision_model.encoder.layers", CLIP_VISION_BLOCK
        weight, bias = plain.patch
        tensors["vision_model.embeddings.patch_embedding.weight"] = weight
        put("vision_model.post_layernorm", plain.norm)
        if plain.cls is not None:
            assert plain.pre_norm is not None  # a CLS without it is the branch above
            cls, config = CLIPVisionModel, CLIPVisionConfig(**common)
            positions = torch.cat([plain.positions[:1], plain.positions[1:] + bias])
            tensors["vision_model.embeddings.class_embedding"] = plain.cls
            put("vision_model.pre_layrnorm", plain.pre_norm)
        else:
            _require(plain.pre_norm is None, "it has neither a CLS token nor blocks without a LayerNorm before them")
            cls, config = SiglipVisionModel, SiglipVisionConfig(**common, vision_use_head=False)
            positions = plain.positions
            tensors["vision_model.embeddings.patch_embedding.bias"] = bias
        tensors["vision_model.embeddings.position_embedding.weight"] = positions
    for i, block in enumerate(plain.blocks):
        for ours, pair in block.items():
            put(f"{prefix}.{i}.{names[ours]}", pair)
    # Through from_pretrained, so that the hub's names, which every release of transformers reads, can be used.
    state = {name: tensor.detach().float().contiguous() for name, tensor in tensors.items()}
    # With its loading info it returns a pair, which its annotation does not say.
    loaded: Any = cls.from_pretrained(None, config=config, state_dict=state, output_loading_info=True)
    model, info = loaded
    wrong = {name for name in info["missing_keys"] if not name.startswith("pooler.")} | set(info["unexpected_keys"])
    _require(not wrong, f"these weights have no place: {', '.join(sorted(wrong)[:5])}")
    return model.eval()


@torch.no_grad()
def check_equal(model: PreTrainedModel, original: nn.Module, last_block: nn.Module) -> None:
    """Raise UserError unless `model`'s last hidden state equals what `last_block` of `original` gives."""
    size = model.config.image_size
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    captured: list[Tensor] = []
    hook = last_block.register_forward_hook(lambda module, inputs, output: captured.append(output))
    try:
        original.eval()(images.to(next(original.parameters()).dtype))
    finally:
        hook.remove()
    tokens = captured[0].float()
    mapped = model(images, output_hidden_states=True).hidden_states[-1]
    fits = mapped.shape == tokens.shape
    difference = (mapped - tokens).abs().max() / tokens.abs().max() if fits else torch.inf
    if not difference <= TOLERANCE:
        raise UserError(
            f"this model is not what transformers' {type(model).__name__} computes (largest relative difference "
            f"{float(difference):.1e}, limit {TOLERANCE:.0e}), so it cannot be saved in a stock LLaVA model"
        )


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise NotPlain(reason)


def _pair(module: nn.Linear | nn.Conv2d | nn.LayerNorm) -> Linear:
    """Weight and bias of a linear, convolution or norm; a missing bias is zero."""
    bias = module.bias
    return module.weight, torch.zeros(len(module.weight)) if bias is None else bias


def _scaled(module: nn.Linear, scale: Any) -> Linear:
    """`module` followed by a layer scale (or nothing), as one linear."""
    weight, bias = _pair(module)
    if isinstance(scale, nn.Identity):
        return weight, bias
    return weight * scale.gamma[:, None], bias * scale.gamma


def _square(size: int | tuple[int, int]) -> int:
    height, width = (size, size) if isinstance(size, int) else size
    _require(height == width, f"it takes images of {height} × {width} pixels, which are not square")
    return int(height)
