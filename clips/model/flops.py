"""What a step of training computes, in floating-point operations, from shapes alone (a multiply-add counts twice).

Counted are matrix products, convolutions and attention, as `torch.utils.flop_counter` does; not counted is what is
computed a second time to save memory (activation checkpointing, the caption head's logits). Over the time of the step
this gives the model FLOPs utilisation, MFU (PaLM, appendix B).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from clips.config import CaptionerConfig, Freeze, ModelConfig


@dataclass(frozen=True)
class BatchShape:
    """What the FLOPs of one micro-batch of one rank depend on."""

    samples: int
    image_size: int
    texts: Sequence[int]
    """Slots of each text of a sample, padding included: web caption, then sub-caption; as many as the objective has."""
    caption: int = 0
    """Positions of the captions, padding included; 0: the captioner does not run."""
    predicted: int = 0
    """Caption tokens that are predicted, over all samples; without padding."""
    world_size: int = 1
    """Ranks whose features the contrastive loss sees; times the micro-batches, where it sees all of a step."""


def forward_flops(model: ModelConfig, shape: BatchShape) -> dict[str, int]:
    """FLOPs of the forward pass by part: vision, text, captioner, head (of the captioner), contrastive."""
    vision, text, captioner, B = model.vision, model.text, model.captioner, shape.samples
    patches = vision.kept_tokens(shape.image_size)
    parts = {
        "vision": _patch_embed(model, shape)
        + B * _blocks(vision.width, vision.layers, vision.mlp_ratio, patches + vision.prefix_tokens)
        + B * 2 * vision.width * model.embed_dim,
        "text": sum(
            B * _blocks(text.width, text.layers, text.mlp_ratio, length) + B * 2 * text.width * model.embed_dim
            for length in shape.texts
        ),
        "captioner": 0,
        "head": 0,
        # Each text: this rank's images against all texts, and its texts against all images.
        "contrastive": len(shape.texts) * 2 * 2 * B * (B * shape.world_size) * model.embed_dim,
    }
    if captioner is not None and shape.caption:
        length = captioner.kept_tokens(patches) + _words(captioner, model, shape) + shape.caption - 1
        parts["captioner"] = B * _blocks(captioner.width, captioner.layers, captioner.mlp_ratio, length)
        parts["captioner"] += sum(_prefix(model, shape).values())
        parts["head"] = shape.predicted * 2 * captioner.width * text.vocab_size
    return parts


def training_flops(model: ModelConfig, shape: BatchShape, freeze: Freeze = "none") -> dict[str, int]:
    """FLOPs of forward and backward pass by part, as `forward_flops`.

    A matrix product costs twice as much again for its two gradients. Pixels have none, and a frozen tower none but
    those of its projection.
    """
    forward = forward_flops(model, shape)
    parts = {name: 3 * count for name, count in forward.items()}
    parts["vision"] -= _patch_embed(model, shape)
    for name in ("vision", "text"):
        if freeze == name:
            width, texts = (model.vision.width, 1) if name == "vision" else (model.text.width, len(shape.texts))
            # The projection's weights learn; what comes into it, and into the captioner, needs no gradient.
            parts[name] = forward[name] + shape.samples * texts * 2 * width * model.embed_dim
            parts["captioner"] -= _prefix(model, shape).get(name, 0)
    return parts


def repeated_flops(model: ModelConfig, shape: BatchShape, *, checkpointing: bool) -> int:
    """FLOPs that a step spends a second time to save memory, and that count for no MFU.

    The caption head's always, those of all blocks with activation checkpointing.
    """
    forward = forward_flops(model, shape)
    return sum(forward[part] for part in (("vision", "text", "captioner", "head") if checkpointing else ("head",)))


def _blocks(width: int, layers: int, mlp_ratio: float, length: int) -> int:
    """One sequence through transformer blocks: projections, MLP, scores and their application to the values."""
    return layers * length * (8 * width**2 + 4 * width * int(width * mlp_ratio) + 4 * width * length)


def _prefix(model: ModelConfig, shape: BatchShape) -> dict[str, int]:
    """The captioner's projections of what the towers give it, by tower."""
    vision, captioner = model.vision, model.captioner
    if captioner is None or not shape.caption:
        return {}
    inputs = {
        "vision": captioner.kept_tokens(vision.kept_tokens(shape.image_size)) * vision.width,
        "text": _words(captioner, model, shape) * model.text.width,
    }
    return {tower: shape.samples * 2 * size * captioner.width for tower, size in inputs.items()}


def _words(captioner: CaptionerConfig, model: ModelConfig, shape: BatchShape) -> int:
    """States of the web caption that the captioner reads."""
    return shape.texts[0] - (model.text.pool == "cls") if captioner.web else 0


def _patch_embed(model: ModelConfig, shape: BatchShape) -> int:
    vision = model.vision
    return shape.samples * vision.tokens(shape.image_size) * 2 * 3 * vision.patch_size**2 * vision.width
