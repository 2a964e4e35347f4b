"""The image tower as the transformers class that computes it: ViTModel, CLIPVisionModel or SiglipVisionModel.

`export/hf_vit` holds that model, its image processor, and `embedding.safetensors`: the projection, whose metadata say
what is pooled (`mean` of the patches, or `cls`). The image embedding is the L2-normalised projection of the final
LayerNorm of the pooled tokens. A tower that came without a projection has no such file.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clips.common.files import read_json
from clips.common.tensors import write_weights
from clips.config import ImagePool, TextConfig, VisionConfig
from clips.data.images import IMAGENET_MEAN, IMAGENET_STD
from clips.model.vision import VisionTower
from clips.weights.foreign import EMBEDDING, PlainViT, plain_vit, positions_with_bias, read_embedding
from clips.weights.layouts import ACTIVATIONS, VISION_LAYOUTS


def stock_fields(tower: VisionConfig | TextConfig) -> dict[str, Any]:
    """Return the settings of a tower's blocks under the names of transformers' configurations."""
    return {
        "hidden_size": tower.width,
        "num_hidden_layers": tower.layers,
        "num_attention_heads": tower.heads,
        "intermediate_size": int(tower.width * tower.mlp_ratio),
        "hidden_act": next(other for other, ours in ACTIVATIONS.items() if ours == tower.activation),
        "layer_norm_eps": tower.norm_eps,
    }


def transformers_vit(plain: PlainViT) -> tuple[Any, Any, dict[str, Tensor]]:
    """Return the class of transformers that computes `plain`, its configuration and its tensors.

    Tensors are named as in the files on the hub, because every release of transformers reads these.
    """
    import transformers

    vision, tensors = plain.config, dict(plain.tensors)
    name, width = vision.transformers_class, vision.width
    common = {**stock_fields(vision), "image_size": vision.image_size, "patch_size": vision.patch_size}
    tensors = {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)} | tensors
    config: Any
    if name == "CLIPVisionModel":
        config = transformers.CLIPVisionConfig(**common)
        bias = tensors.pop("patch_embed.bias", None)  # the class has none
        tensors["pos_embed"] = positions_with_bias(tensors["pos_embed"], bias, vision.prefix_tokens)
    else:
        tensors.setdefault("patch_embed.bias", torch.zeros(width))  # both classes always have one
        if name == "ViTModel":
            config = transformers.ViTConfig(**common)
            # The class keeps both with a leading batch axis.
            tensors |= {"cls_token": tensors["cls_token"][None, None], "pos_embed": tensors["pos_embed"][None]}
        else:
            config = transformers.SiglipVisionConfig(**common, vision_use_head=False)
    layout = VISION_LAYOUTS[config.model_type]
    if name == "ViTModel":
        layout = replace(layout, prefix="")
    stored = layout.write(tensors, vision.layers)
    return getattr(transformers, name), config, {name: tensor.detach().float() for name, tensor in stored.items()}


def write_hf_vit(tower: VisionTower, directory: Path) -> None:
    """Write the image tower, its image processor and, unless the tower has none, the projection."""
    from transformers import ViTImageProcessor

    cls, config, tensors = transformers_vit(plain_vit(tower))
    config.architectures = [cls.__name__]
    if cls.__name__ == "CLIPVisionModel":
        config.projection_dim = tower.proj.out_features if isinstance(tower.proj, nn.Linear) else tower.config.width
    if cls.__name__ == "ViTModel":
        # Its pooler gives the CLS token as it is. Without one transformers draws a random one.
        config.pooler_act, width = "linear", tower.config.width
        tensors |= {"pooler.dense.weight": torch.eye(width), "pooler.dense.bias": torch.zeros(width)}
    directory.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(directory)
    write_weights(tensors, directory / "model.safetensors")
    if isinstance(tower.proj, nn.Linear):
        write_weights({"proj.weight": tower.proj.weight}, directory / EMBEDDING, pool=tower.config.pool)
    size = {"height": tower.image_size, "width": tower.image_size}
    ViTImageProcessor(
        size=size, resample=2, image_mean=list(IMAGENET_MEAN), image_std=list(IMAGENET_STD), do_convert_rgb=True
    ).save_pretrained(directory)


def hf_features(directory: Path, images: Tensor, pool: ImagePool) -> tuple[Tensor, Tensor]:
    """Load `hf_vit` with stock transformers; return (tokens before the final norm [B, C + N, D], embedding [B, E]).

    The embedding is not normalised. It is pooled as the projection's file says, or by `pool` if there is no such file.
    Raises UserError if a tensor was not loaded.
    """
    import transformers

    from clips.common.opening import load_weights, loading

    (name,) = read_json(directory / "config.json")["architectures"]
    with loading("export hf_vit", directory):
        model, _ = load_weights(getattr(transformers, name), "export hf_vit", directory)
    tokens = model.eval()(images, output_hidden_states=True).hidden_states[-1]
    inner = getattr(model, "vision_model", model)  # a level that transformers removed in 5.x
    norm = inner.layernorm if name == "ViTModel" else inner.post_layernorm
    weight = None
    if (directory / EMBEDDING).is_file():
        weight, pool = read_embedding(directory)
    prefix = tokens.shape[1] - math.isqrt(tokens.shape[1]) ** 2
    pooled = norm(tokens[:, 0] if pool == "cls" else tokens[:, prefix:].mean(dim=1))
    return tokens, pooled if weight is None else pooled @ weight.T
