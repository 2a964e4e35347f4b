"""Names of towers in the formats of transformers, timm and open_clip: one table per format, read in both directions."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from clips.config import Activation

QKV = ("attn.q", "attn.k", "attn.v")
"""Formats with separate query, key and value matrices are joined here in this order."""
LINEARS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
PAIR = {
    "visual.proj.weight": ("visual_projection.weight",),
    "text.proj.weight": ("text_projection.weight",),
    "logit_scale": ("logit_scale",),
}
"""Tensors of a full CLIP outside its towers, under transformers' names."""
OPEN_CLIP_PAIR = {
    "visual.proj.weight": ("visual.proj",),
    "text.proj.weight": ("text.text_projection",),
    "logit_scale": ("logit_scale",),
}
"""The same tensors under open_clip's names, where the projections are transposed."""
POSITION_IDS = {
    "embeddings.position_ids": "the numbers 0, 1, 2, …",
    "text_model.embeddings.position_ids": "the numbers 0, 1, 2, …",
}


@dataclass(frozen=True, kw_only=True)
class WeightNames:
    """How another library names the tensors of a tower: its names, keyed by those of `VisionTower` or `TextTower`."""

    prefix: str = ""
    """Prefix of every name in files that hold more than this tower."""
    tensors: Mapping[str, str]
    modules: Mapping[str, str]
    """Modules with weight and bias, outside the blocks."""
    blocks: str
    """The list of blocks."""
    block: Mapping[str, str]
    """Modules with weight and bias inside a block."""
    scales: Mapping[str, str] = field(default_factory=dict)
    """The LayerScale after each module of a block; here it is folded into the module."""
    left_over: Mapping[str, str] = field(default_factory=dict)
    """Descriptions of tensors that no tower here has, by the beginning of their names."""
    unbiased: tuple[str, ...] = ()
    """Modules of a block that have no bias there."""

    def names(self, layers: int) -> dict[str, tuple[str, ...]]:
        """Return for each tensor of a tower with `layers` blocks the format's tensors of which it is made, in order."""
        modules: dict[str, tuple[str, ...]] = {ours: (other,) for ours, other in self.modules.items()}
        for i in range(layers):
            for ours, other in self.block.items():
                name = f"blocks.{i}." + ("attn.qkv" if ours in QKV else ours)
                modules[name] = (*modules.get(name, ()), f"{self.blocks}.{i}.{other}")

        tensors: dict[str, tuple[str, ...]] = {ours: (other,) for ours, other in self.tensors.items()}
        for ours, parts in modules.items():
            for kind in ("weight",) if ours.endswith(self.unbiased) else ("weight", "bias"):
                # "attn.in_proj_" of torch's MultiheadAttention is no module: its tensor is attn.in_proj_weight.
                tensors[f"{ours}.{kind}"] = tuple(part + ("" if part[-1] == "_" else ".") + kind for part in parts)
        return tensors

    def write(self, tensors: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
        """Return the `tensors` of a tower under the format's names, without those that have no name there."""
        return {
            self.prefix + other: part
            for ours, names in self.names(layers).items()
            if ours in tensors
            for other, part in zip(names, tensors[ours].chunk(len(names)), strict=True)
        }


# ---------------------------------------------------------------------------------------------- transformers
CLIP_VISION = WeightNames(
    prefix="vision_model.",
    tensors={"cls_token": "embeddings.class_embedding", "pos_embed": "embeddings.position_embedding.weight"},
    modules={"patch_embed": "embeddings.patch_embedding", "pre_norm": "pre_layrnorm", "norm": "post_layernorm"},
    blocks="encoder.layers",
    block={
        "norm1": "layer_norm1",
        **{f"attn.{name}": f"self_attn.{name}_proj" for name in "qkv"},
        "attn.proj": "self_attn.out_proj",
        "norm2": "layer_norm2",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    },
    left_over={**POSITION_IDS, "visual_projection.": "projection into CLIP's space"},
)
SIGLIP_VISION = replace(
    CLIP_VISION,
    left_over={
        **POSITION_IDS,
        "head.": "SigLIP's pooling head",
        "text_model.": "SigLIP's text tower: other tokenizer, pooling",
        "logit_": "SigLIP's sigmoid loss",
    },
)
CLIP_TEXT = replace(
    CLIP_VISION,
    prefix="text_model.",
    tensors={
        "token_embed.weight": "embeddings.token_embedding.weight",
        "pos_embed": "embeddings.position_embedding.weight",
    },
    modules={"norm": "final_layer_norm"},
)
VIT = WeightNames(
    prefix="vit.",
    tensors={"cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings"},
    modules={"patch_embed": "embeddings.patch_embeddings.projection", "norm": "layernorm"},
    blocks="encoder.layer",
    block={
        "norm1": "layernorm_before",
        "attn.q": "attention.attention.query",
        "attn.k": "attention.attention.key",
        "attn.v": "attention.attention.value",
        "attn.proj": "attention.output.dense",
        "norm2": "layernorm_after",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    },
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
    block={**VIT.block, "norm1": "norm1", "norm2": "norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"},
    scales={"attn.proj": "layer_scale1.lambda1", "mlp.fc2": "layer_scale2.lambda1"},
)
VISION_LAYOUTS = {
    "vit": VIT,
    "dinov2": DINOV2,
    "clip_vision_model": CLIP_VISION,
    "clip": CLIP_VISION,
    "siglip_vision_model": SIGLIP_VISION,
    "siglip": SIGLIP_VISION,
}
"""Names of the weights of the image tower for each `model_type` of transformers."""
ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "quick_gelu": "quick_gelu",
}
"""The name here for each `hidden_act` of transformers."""

# ---------------------------------------------------------------------------------------------- timm and open_clip
TIMM = WeightNames(
    tensors={"cls_token": "cls_token", "pos_embed": "pos_embed"},
    modules={"patch_embed": "patch_embed.proj", "pre_norm": "norm_pre", "norm": "norm"},
    blocks="blocks",
    block={name: name for name in ("norm1", "norm2", *LINEARS)},
    scales={"attn.proj": "ls1.gamma", "mlp.fc2": "ls2.gamma"},
    left_over={"head.": "classifier", "attn_pool.": "attention pooling"},
)
OPEN_CLIP_VISION = WeightNames(
    prefix="visual.",
    tensors={"cls_token": "class_embedding", "pos_embed": "positional_embedding"},
    modules={"patch_embed": "conv1", "pre_norm": "ln_pre", "norm": "ln_post"},
    blocks="transformer.resblocks",
    block={
        "norm1": "ln_1",
        "attn.qkv": "attn.in_proj_",
        "attn.proj": "attn.out_proj",
        "norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    },
    scales={"attn.proj": "ls_1.gamma", "mlp.fc2": "ls_2.gamma"},
    left_over={"proj": "projection", "attn_pool": "attention pooling", "ln_post": "its LayerNorm"},
)
OPEN_CLIP_TEXT = replace(
    OPEN_CLIP_VISION,
    prefix="text.",
    tensors={"token_embed.weight": "token_embedding.weight", "pos_embed": "positional_embedding"},
    modules={"norm": "ln_final"},
)
