"""Vision tower and projector as llama.cpp's multimodal projector file, for the towers that its graph computes.

llama.cpp's LLaVA graph (projector type "mlp"; tools/mtmd/models/llava.cpp): patches + positions → optional LayerNorm →
blocks → the hidden states of `feature_layer` → linear → GELU → linear. Its GELU is the tanh approximation, on CPUs
looked up in fp16. The class token is behind the patches there, but positions and the choice of patches count as if it
were in front (ggml-org/llama.cpp issue 25814): the first patch is lost and the class token goes to the language model.
Such towers are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from gguf import MODEL_ARCH, GGUFWriter, get_tensor_name_map
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from clips.common.errors import UserError
from mllm.gguf.language import gguf_name

ACTIVATIONS = {
    "gelu": "gelu",  # exact here, the approximation there: they differ less than its fp16 table does from it
    "gelu_pytorch_tanh": "gelu",
    "gelu_new": "gelu",
    "quick_gelu": None,
    "silu": "silu",
}
"""The tower's `hidden_act` → llama.cpp's switch `clip.use_…`; None is what it does without one."""
PAD_COLOUR = (122, 116, 104)
"""The colour that llama.cpp pads to a square with: CLIP's mean, as LLaVA-1.5 does."""


def feature_layers(config: Any) -> list[int]:
    """Indices ≥ 0 into the tower's hidden states (0 = embeddings)."""
    layers = config.vision_feature_layer
    count = config.vision_config.num_hidden_layers + 1
    return [layer % count for layer in ([layers] if isinstance(layers, int) else layers)]


def check_tower(config: Any, processor: Any) -> None:
    """UserError where llama.cpp's graph or its preparation of pictures cannot do what the model was trained with."""
    tower, layers = config.vision_config, feature_layers(config)
    own = f"vision tower {tower.model_type}"
    retrain = "pretrain with --tower siglip (scripts/pretrain_clips.py) and train LLaVA on that"
    if tower.model_type != "siglip_vision_model":
        raise UserError(
            f"{own}: llama.cpp's LLaVA graph puts a class token behind the patches but takes positions and features as "
            "if it stood in front (its issue 25814), so the language model would see other tokens than it was trained "
            f"with: {retrain}"
        )
    size, act = picture_size(processor), config.projector_hidden_act
    refused = {
        f"{own}: llama.cpp's LLaVA graph has no {tower.hidden_act!r} activation: {retrain}": (
            tower.hidden_act not in ACTIVATIONS
        ),
        f"{own}: config.json, vision_feature_select_strategy 'default' drops the first patch of a tower without a "
        "class token; llama.cpp keeps all: train with a tower that this project loads, which sets 'full'": (
            config.vision_feature_select_strategy != "full"
        ),
        f"{own}: llama.cpp takes layers in ascending order from 1, this model has {layers}: train with "
        "--mm_vision_select_layer -1": layers != sorted(set(layers)) or layers[0] == 0,
        f"config.json, projector_hidden_act {act!r}: llama.cpp's LLaVA projector has a GELU: train with "
        "--mm_projector_type mlp2x_gelu": act not in ("gelu", "linear"),
        f"pictures are prepared at {size} px, the tower's positions are for {tower.image_size} px: export the tower "
        "at that size (scripts/export_clips.py --image-size) and train on that": size != tower.image_size,
    }
    if reason := next((reason for reason, holds in refused.items() if holds), None):
        raise UserError(reason)
    pads(processor)


def picture_size(processor: Any) -> int:
    return processor.crop_size["height"] if processor.do_center_crop else processor.size.get("height")


def pads(processor: Any) -> bool:
    """Whether pictures are padded to a square instead of squeezed into it; UserError for what is neither."""
    size = processor.size
    if not (processor.do_resize and size.get("height") and size.get("height") == size.get("width")):
        raise UserError(
            "pictures are cropped to a square, llama.cpp pads or squeezes them: train with --image_aspect_ratio pad"
        )
    if not getattr(processor, "do_pad", False):
        return False
    colour = tuple(int(value * 255) for value in processor.image_mean)
    if max(abs(a - b) for a, b in zip(colour, PAD_COLOUR, strict=True)) > 1:
        raise UserError(
            f"pictures are padded with the colour {colour}, llama.cpp pads with {PAD_COLOUR}: train with "
            "--image_aspect_ratio square"
        )
    return True


def write_tower_metadata(writer: GGUFWriter, config: Any, processor: Any) -> None:
    tower, layers = config.vision_config, feature_layers(config)
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("mlp")
    writer.add_vision_projection_dim(config.text_config.hidden_size)
    writer.add_vision_image_size(tower.image_size)
    writer.add_vision_patch_size(tower.patch_size)
    writer.add_vision_embedding_length(tower.hidden_size)
    writer.add_vision_feed_forward_length(tower.intermediate_size)
    writer.add_vision_block_count(layers[-1])  # later blocks are not needed
    writer.add_vision_head_count(tower.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(tower.layer_norm_eps)
    writer.add_vision_image_mean(list(processor.image_mean))
    writer.add_vision_image_std(list(processor.image_std))
    writer.add_array("clip.vision.feature_layer", layers)
    writer.add_vision_use_gelu(ACTIVATIONS[tower.hidden_act] == "gelu")
    writer.add_vision_use_silu(ACTIVATIONS[tower.hidden_act] == "silu")
    if not pads(processor):
        # Of a picture with a grid of tiles llama.cpp takes first the whole one, squeezed into the square, and then as
        # many tiles as fit into the grid's size. In a size of nothing there are none.
        writer.add_array("clip.vision.image_grid_pinpoints", [0, 0])


def tower_tensors(model: LlavaForConditionalGeneration) -> Iterator[tuple[str, Tensor]]:
    """(GGUF name, tensor) of the tower up to the deepest chosen layer and of the projector."""
    config: Any = model.config
    deepest = feature_layers(config)[-1]
    names = get_tensor_name_map(MODEL_ARCH.MMPROJ, deepest)
    tower: Any = model.model.vision_tower
    parts = {"embeddings": tower.embeddings}  # the final norm and the pooling head come after all hidden states
    parts |= {f"encoder.layers.{i}": layer for i, layer in enumerate(tower.encoder.layers[:deepest])}
    for place, part in parts.items():
        for key, tensor in part.state_dict().items():
            yield gguf_name(names, f"vision_tower.vision_model.{place}.{key}"), tensor
    yield from _projector_tensors(model)


def _projector_tensors(model: LlavaForConditionalGeneration) -> Iterator[tuple[str, Tensor]]:
    projector: Any = model.model.multi_modal_projector
    first, second = projector.linear_1, projector.linear_2
    weights = [first.weight, second.weight]
    biases = [torch.zeros(len(x.weight)) if x.bias is None else x.bias for x in (first, second)]
    if model.config.projector_hidden_act == "linear":
        # llama.cpp's projector has a GELU in any case; GELU(x) − GELU(−x) is x.
        weights = [torch.cat([weights[0], -weights[0]]), torch.cat([weights[1], -weights[1]], dim=1)]
        biases[0] = torch.cat([biases[0], -biases[0]])
    for place, weight, bias in zip((0, 2), weights, biases, strict=True):
        yield f"mm.{place}.weight", weight.detach()
        yield f"mm.{place}.bias", bias.detach()
