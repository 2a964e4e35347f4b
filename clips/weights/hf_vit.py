"""The image tower as the transformers class that computes it: ViTModel, CLIPVisionModel or SiglipVisionModel.

`export/hf_vit` holds that model, its image processor, and `embedding.safetensors`: the projection, whose metadata say
what is pooled (`mean` of the patches, or `cls`). Image embedding = L2-normalised projection · final LayerNorm · pool of
the tokens before that LayerNorm; a tower that was trained without a shared space has no such file and no projection.
Names are the tables of clips/weights/foreign.py, the way back is there too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clips.common.errors import UserError
from clips.common.tensors import write_weights
from clips.config import ImagePool
from clips.data.images import IMAGENET_MEAN, IMAGENET_STD
from clips.model.vision import VisionTower
from clips.weights.foreign import ACTIVATIONS, EMBEDDING, VISION_LAYOUTS, read_embedding


def write_hf_vit(tower: VisionTower, directory: Path) -> None:
    """The image tower, its image processor and, unless it has none, the projection.

    Names are those of the files on the hub, which every release of transformers reads.
    """
    from transformers import CLIPVisionConfig, SiglipVisionConfig, ViTConfig, ViTImageProcessor

    vision = tower.config
    name = vision.transformers_class
    common: dict[str, Any] = {
        "hidden_size": vision.width,
        "num_hidden_layers": vision.layers,
        "num_attention_heads": vision.heads,
        "intermediate_size": int(vision.width * vision.mlp_ratio),
        "hidden_act": next(theirs for theirs, ours in ACTIVATIONS.items() if ours == vision.activation),
        "layer_norm_eps": vision.norm_eps,
        "image_size": tower.image_size,
        "patch_size": vision.patch_size,
        "architectures": [name],
    }
    config: CLIPVisionConfig | SiglipVisionConfig | ViTConfig
    tensors = tower.state_dict() | {"pos_embed": positions_with_bias(tower) if vision.pre_norm else tower.positions()}
    if name == "CLIPVisionModel":
        projected = tower.proj.out_features if isinstance(tower.proj, nn.Linear) else vision.width
        config = CLIPVisionConfig(**common, projection_dim=projected)
        tensors.pop("patch_embed.bias", None)  # the class has none: it is in the positions
    else:
        config = ViTConfig(**common) if name == "ViTModel" else SiglipVisionConfig(**common, vision_use_head=False)
        tensors.setdefault("patch_embed.bias", torch.zeros(vision.width))  # both classes always have one
    layout = VISION_LAYOUTS[config.model_type]
    prefix = "" if name == "ViTModel" else layout.prefix
    stored: dict[str, Tensor] = {}
    for ours, parts in layout.names(vision.layers).items():
        if ours in tensors:
            stored |= {prefix + part: t for part, t in zip(parts, tensors[ours].chunk(len(parts)), strict=True)}
    if name == "ViTModel":  # keeps both with the batch's axis in front
        stored["embeddings.cls_token"] = stored["embeddings.cls_token"][None, None]
        stored["embeddings.position_embeddings"] = stored["embeddings.position_embeddings"][None]
    directory.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(directory)
    write_weights(stored, directory / "model.safetensors")
    if isinstance(tower.proj, nn.Linear):
        write_weights({"proj.weight": tower.proj.weight}, directory / EMBEDDING, pool=vision.pool)
    size = {"height": tower.image_size, "width": tower.image_size}
    ViTImageProcessor(
        size=size, resample=2, image_mean=list(IMAGENET_MEAN), image_std=list(IMAGENET_STD), do_convert_rgb=True
    ).save_pretrained(directory)


def positions_with_bias(tower: VisionTower) -> Tensor:
    """The positions [C + N, D], with the patch convolution's bias, if there is one, added to the patches' rows.

    For classes whose patch convolution has no bias: it is the same sum.
    """
    table = tower.positions().detach().clone()
    if tower.patch_embed.bias is not None:
        table[tower.config.prefix_tokens :] += tower.patch_embed.bias
    return table


def hf_features(directory: Path, images: Tensor, pool: ImagePool) -> tuple[Tensor, Tensor]:
    """Load `hf_vit` with stock transformers: (tokens before the final norm [B, C + N, D], embedding [B, E]).

    The second is not normalised, and pooled as the projection's file says; without one, by `pool` and without
    projection. Raises UserError when a tensor was not taken.
    """
    tokens, norm = hf_tokens(directory, images)
    weight = None
    if (directory / EMBEDDING).is_file():
        weight, pool = read_embedding(directory)
    prefix = tokens.shape[1] - math.isqrt(tokens.shape[1]) ** 2
    pooled = norm(tokens[:, 0] if pool == "cls" else tokens[:, prefix:].mean(dim=1))
    return tokens, pooled if weight is None else pooled @ weight.T


def hf_tokens(directory: Path, images: Tensor) -> tuple[Tensor, nn.Module]:
    """What stock transformers gives before the final LayerNorm, [B, C + N, D], and that LayerNorm.

    Raises UserError when a tensor was not taken.
    """
    from transformers import CLIPVisionModel, SiglipVisionModel, ViTModel

    model_type = json.loads((directory / "config.json").read_text())["model_type"]
    loaded: Any  # a pair, which transformers' annotation does not say
    with _no_progress_bar():  # "Loading weights" would break the training line
        if model_type == "vit":
            loaded = ViTModel.from_pretrained(directory, add_pooling_layer=False, output_loading_info=True)
        else:
            cls: Any = CLIPVisionModel if model_type == "clip_vision_model" else SiglipVisionModel
            loaded = cls.from_pretrained(directory, output_loading_info=True)
    model, info = loaded
    if left := {kind: names for kind, names in info.items() if names}:
        raise UserError(f"{directory}: transformers did not take the weights one to one: {left}")
    inner = getattr(model, "vision_model", model)  # a level that transformers removed in 5.x
    norm = inner.layernorm if model_type == "vit" else inner.post_layernorm
    return model.eval()(images, output_hidden_states=True).hidden_states[-1], norm


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    from transformers.utils import logging

    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()
