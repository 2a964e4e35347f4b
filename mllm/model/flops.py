"""What training steps of a LLaVA model compute, in floating-point operations, from shapes alone.

A multiply-add counts twice. As `torch.utils.flop_counter`, matrix products, convolutions and attention are counted.
Not counted is what is computed a second time to save memory, and what a step runs and does not use: an encoder's
pooler, and the zero picture that a batch without pictures sends through the encoder (mllm/model/forward.py). Of a
mixture of experts every expert is counted, although a token sees few of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from mllm.encoders.encoder import KINDS
from mllm.model.tiles import Llava

READS_INPUT = ("q_proj", "k_proj", "v_proj", "qkv_proj")
"""The linear layers of a decoder layer that read what comes into it, by their names in transformers."""


class LlavaFlops:
    """FLOPs of the training steps of `model` (with adapters or without), whose parts train as they are set now.

    A picture here is a square: with tiles a user's picture has several. `image_size` is its side in pixels,
    `image_tokens` how many tokens it has behind the projector;
    `features`: the encoder does not run, since its features are cached.
    """

    def __init__(self, model: Llava, *, image_size: int, image_tokens: int, features: bool) -> None:
        inner: Any = model.model
        tower, projector, language_model = inner.vision_tower, inner.multi_modal_projector, inner.language_model
        self.picture = {
            "vision_tower": 0 if features else _tower(tower, model.config.vision_feature_layer, image_size),
            "projector": image_tokens * _chain(projector, any(p.requires_grad for p in tower.parameters())),
        }
        """Per picture, by part."""
        embedding = language_model.get_input_embeddings()
        into = any(p.requires_grad for part in (tower, projector, embedding) for p in part.parameters())
        self.position = _decoder(_layers(language_model), into)
        """Per position of a sample."""
        text = model.config.get_text_config()
        head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        # Scores and their application to the values, and for each two gradients.
        trains = into or any(p.requires_grad for p in language_model.parameters())
        self.pair = (3 if trains else 1) * 4 * text.num_hidden_layers * text.num_attention_heads * head
        """Per pair of positions of a sample: of causal attention too, as torch counts it."""
        self.prediction = _product(model.lm_head, trains)
        """Per labelled position."""

    def __call__(self, *, samples: int, length: int, pictures: int, predicted: int) -> dict[str, int]:
        """FLOPs of forward and backward pass by part: vision_tower, projector, language_model, head.

        `length` counts positions of each sample, padding included; `predicted` labelled positions of all samples.
        """
        return self.parts(pictures=pictures, positions=samples * length, pairs=samples * length**2, predicted=predicted)

    def parts(self, *, pictures: int, positions: int, pairs: int, predicted: int) -> dict[str, int]:
        """The same for any number of positions and of pairs of query and key that attention computes."""
        parts = {part: pictures * count for part, count in self.picture.items()}
        language_model = self.position * positions + self.pair * pairs
        return parts | {"language_model": language_model, "head": predicted * self.prediction}


def _product(layer: nn.Linear, input_learns: bool) -> int:
    """One vector through a linear layer and back; quantised weights have the sizes of what they stand for."""
    times = 1 + int(layer.weight.requires_grad) + int(input_learns)
    return times * 2 * layer.in_features * layer.out_features


def _chain(module: nn.Module, input_learns: bool) -> int:
    """One vector through the linear layers of `module`, one after the other."""
    total = 0
    for _, layer in _linears(module):
        total += _product(layer, input_learns)
        input_learns |= layer.weight.requires_grad
    return total


def _decoder(layers: nn.ModuleList, input_learns: bool) -> int:
    """One position through decoder layers without their attention; an adapter's two products count beside its layer's.

    Where nothing in front learns, the first layer's input needs no gradient.
    """
    total = 0
    learns = input_learns
    for layer in layers:
        for name, linear in _linears(layer):
            reads_input = any(part in READS_INPUT for part in name.split(".")) and "lora_B" not in name
            inside = learns or any(p.requires_grad for p in layer.parameters())
            total += _product(linear, learns if reads_input else inside)
        learns |= any(p.requires_grad for p in layer.parameters())
    return total


def _tower(tower: Any, feature_layer: int | list[int], image_size: int) -> int:
    """One picture through all layers of an encoder, and back through those up to the last one whose output is used."""
    (patches,) = (module for module in tower.modules() if isinstance(module, nn.Conv2d))
    layers = _layers(tower)
    count = (image_size // patches.kernel_size[0]) ** 2
    tokens = count + KINDS[tower.config.model_type].prefix_tokens(tower.config)
    used = max(
        layer if layer >= 0 else len(layers) + 1 + layer
        for layer in ([feature_layer] if isinstance(feature_layer, int) else feature_layer)
    )
    learns = patches.weight.requires_grad
    total = count * (1 + learns) * 2 * patches.weight.numel()
    for index, layer in enumerate(layers):
        forward = sum(2 * linear.in_features * linear.out_features for _, linear in _linears(layer))
        forward = tokens * (forward + 4 * tokens * tower.config.hidden_size)
        total += (3 if learns and index < used else 1) * forward
    return total


def _layers(model: nn.Module) -> nn.ModuleList:
    """The blocks of a transformer: its longest list of modules."""
    return max((module for module in model.modules() if isinstance(module, nn.ModuleList)), key=len)


def _linears(module: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    return ((name, layer) for name, layer in module.named_modules() if isinstance(layer, nn.Linear))
