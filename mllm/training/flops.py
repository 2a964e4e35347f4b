"""The FLOPs of a LLaVA stage: its units of work, and what each unit costs."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from clips.common.flops import forward_flops, training_flops
from mllm.encoders.encoder import gives_map, prefix_tokens
from mllm.model.packing import pairs_of
from mllm.model.tiles import Llava, TokenLayout


def costs_of(model: Llava, image_size: int) -> dict[str, int]:
    """Return the FLOPs of the forward and backward pass for each unit of work, with the parts that train now.

    What a step runs without using it is not counted: an encoder's pooler, and the zero image that a batch without
    images sends through the encoder (mllm/model/forward.py). In a mixture of experts every expert is counted.

    Args:
        image_size: Side of a square that the encoder sees, in pixels; 0 if its features are cached.
    """
    inner: Any = model.model
    tower, projector, language_model = inner.vision_tower, inner.multi_modal_projector, inner.language_model
    sees = _trains(tower)
    into = sees or _trains(projector) or _trains(language_model.get_input_embeddings())
    learns = into or _trains(language_model)
    text = model.config.get_text_config()
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    square = TokenLayout.of(model.config).tokens_per_crop * training_flops(projector, sees)
    return {
        "images": square + (_tower(tower, model.config.vision_feature_layer, image_size) if image_size else 0),
        "positions": training_flops(_blocks(language_model), into),
        "pairs": (3 if learns else 1) * 4 * text.num_hidden_layers * text.num_attention_heads * head,
        "predicted": training_flops(model.lm_head, learns),
    }


def _trains(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def _blocks(model: nn.Module) -> nn.ModuleList:
    """Return the blocks of a transformer: its longest list of modules."""
    return max((module for module in model.modules() if isinstance(module, nn.ModuleList)), key=len)


def _tower(tower: Any, feature_layer: int | list[int], image_size: int) -> int:
    """Return the FLOPs of one square through all blocks of an encoder, and back through those whose output is used."""
    if gives_map(tower.config):
        from mllm.encoders.maps import map_flops  # not at the top: it imports timm

        return map_flops(tower, image_size)
    (patches,) = (module for module in tower.modules() if isinstance(module, nn.Conv2d))
    blocks = _blocks(tower)
    count = (image_size // patches.kernel_size[0]) ** 2
    tokens = count + prefix_tokens(tower.config)
    layers = [feature_layer] if isinstance(feature_layer, int) else feature_layer
    used = max(layer if layer >= 0 else len(blocks) + 1 + layer for layer in layers)
    total = count * training_flops(patches, False)
    for index, block in enumerate(blocks):
        passes = 3 if patches.weight.requires_grad and index < used else 1
        total += passes * tokens * (forward_flops(block) + 4 * tokens * tower.config.hidden_size)
    return total


def flops_of(batch: Mapping[str, Any], costs: Mapping[str, int], *, packed: bool) -> int:
    """Return the FLOPs of the forward and backward pass over a batch; `costs` are those that `costs_of` returns.

    The units of work are those of `units_of`, which explains `packed`.
    """
    return sum(count * costs[unit] for unit, count in units_of(batch, packed=packed).items())


def units_of(batch: Mapping[str, Any], *, packed: bool) -> dict[str, int]:
    """Return the units of work in a batch of `Collator` (mllm/training/task.py).

    Units are crops of images, positions of sequences, pairs of query and key (causal or not), and tokens that are
    learned. If the batch is `packed` (mllm/model/packing.py), padding costs nothing.
    """
    samples, length = batch["input_ids"].shape
    counts = batch["counts"]
    return {
        "images": sum(len(batch[name]) for name in ("image_features", "pixel_values") if name in batch),
        "positions": counts.row if packed else samples * length,
        "pairs": pairs_of(samples, length, counts.shared if packed else 0),
        "predicted": counts.learned,
    }
