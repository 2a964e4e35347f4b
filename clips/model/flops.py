"""What a step of training computes, in floating-point operations, from shapes alone (a multiply-add counts twice).

Counted are matrix products, convolutions and attention, as `torch.utils.flop_counter` does; not counted is what is
computed a second time to save memory (activation checkpointing, the caption head's logits). Over the time of the step
this gives the model FLOPs utilisation, MFU (PaLM, appendix B).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from clips.config import CaptionerConfig, Freeze, ModelConfig, TextConfig, VisionConfig


@dataclass(frozen=True)
class BatchShape:
    """What the FLOPs of one micro-batch of one rank depend on."""

    samples: int
    image_size: int
    texts: Sequence[int]
    """Slots of each text of a sample, padding included: web caption, then sub-caption; as many as the objective has."""
    caption: int = 0
    """Positions of the captions, padding included; 0: the captioner does not run."""
    captioned: int | None = None
    """Samples whose caption is predicted; None: all of them."""
    predicted: int = 0
    """Caption tokens that are predicted, over all captioned samples; without padding."""
    captioner_tokens: int | None = None
    """Tokens that the captioner computes, over all captioned samples; None: those of texts that fill their slots."""
    world_size: int = 1
    """Ranks whose features the contrastive loss sees; times the micro-batches, where it sees all of a step."""
    words: Sequence[int] = ()
    """Slots of each text that are computed, over all samples; without padding where it is masked. None given: all."""


def forward_flops(model: ModelConfig, shape: BatchShape) -> dict[str, int]:
    """FLOPs of the forward pass by part: vision, text, captioner, head (of the captioner), contrastive."""
    vision, text, captioner, B = model.vision, model.text, model.captioner, shape.samples
    patches = vision.kept_tokens(shape.image_size)
    parts = {
        "vision": _patch_embed(model, shape)
        + _blocks(vision.width, vision.layers, vision.mlp_ratio, B, patches + vision.prefix_tokens)
        + B * 2 * vision.width * model.embed_dim,
        "text": sum(
            _blocks(text.width, text.layers, text.mlp_ratio, B, slots, tokens) + B * 2 * text.width * model.embed_dim
            for slots, tokens in zip(shape.texts, computed_words(shape), strict=True)
        ),
        "captioner": 0,
        "head": 0,
        # Each text: this rank's images against all texts, and its texts against all images.
        "contrastive": len(shape.texts) * 2 * 2 * B * (B * shape.world_size) * model.embed_dim,
    }
    if captioner is not None and shape.caption:
        C = _captioned(shape)
        slots = captioner.kept_tokens(patches) + _words(model, shape) + shape.caption - 1
        tokens = captioner_tokens(captioner, model, shape)
        parts["captioner"] = _blocks(captioner.width, captioner.layers, captioner.mlp_ratio, C, slots, tokens)
        # The last block's attention, projection and MLP are of the positions that predict alone.
        skipped = 2 * captioner.width**2 + 4 * captioner.width * int(captioner.width * captioner.mlp_ratio)
        parts["captioner"] -= (tokens - shape.predicted) * skipped
        parts["captioner"] -= C * slots * (slots - shape.caption + 1) * 4 * captioner.width
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


def repeated_flops(
    model: ModelConfig, shape: BatchShape, *, checkpointing: bool, chunk: int, freeze: Freeze = "none"
) -> int:
    """FLOPs that a step spends a second time to save memory, and that count for no MFU.

    The caption head's if there are more than `chunk` caption positions, those of all blocks with activation
    checkpointing, but for each block's last product: its output is needed by no gradient of the block.
    """
    forward = forward_flops(model, shape)
    head = forward["head"] if shape.samples * (shape.caption - 1) > chunk else 0
    if not checkpointing:
        return head
    vision, text, captioner, B = model.vision, model.text, model.captioner, shape.samples
    repeated = forward["captioner"] + head
    stacks: list[tuple[VisionConfig | TextConfig | CaptionerConfig, int]] = []
    if freeze != "vision":
        repeated += forward["vision"] - _patch_embed(model, shape) - B * 2 * vision.width * model.embed_dim
        tokens = B * (vision.kept_tokens(shape.image_size) + vision.prefix_tokens)
        stacks.append((vision, tokens * vision.layers))
    if freeze != "text":
        repeated += forward["text"] - B * 2 * text.width * model.embed_dim * len(shape.texts)
        stacks += [(text, count * text.layers) for count in computed_words(shape)]
    if captioner is not None and shape.caption:
        repeated -= sum(_prefix(model, shape).values())
        of_all = captioner_tokens(captioner, model, shape)
        stacks.append((captioner, of_all * (captioner.layers - 1) + shape.predicted))
    return repeated - sum(2 * s.width * int(s.width * s.mlp_ratio) * count for s, count in stacks)


def computed_words(shape: BatchShape) -> Sequence[int]:
    return shape.words or [shape.samples * slots for slots in shape.texts]


def captioner_tokens(captioner: CaptionerConfig, model: ModelConfig, shape: BatchShape) -> int:
    """Image tokens, the web caption's and positions that predict, over all captioned samples."""
    if shape.captioner_tokens is not None:
        return shape.captioner_tokens
    patches = captioner.kept_tokens(model.vision.kept_tokens(shape.image_size))
    return _captioned(shape) * (patches + _words(model, shape)) + shape.predicted


def _captioned(shape: BatchShape) -> int:
    return shape.samples if shape.captioned is None else shape.captioned


def _blocks(width: int, layers: int, mlp_ratio: float, samples: int, slots: int, tokens: int | None = None) -> int:
    """Sequences through transformer blocks: projections and MLP of `tokens` (all slots, if they are not given); scores
    and their application to the values of all slots, for attention is padded."""
    tokens = samples * slots if tokens is None else tokens
    each = 8 * width**2 + 4 * width * int(width * mlp_ratio)
    return layers * (tokens * each + samples * slots**2 * 4 * width)


def _prefix(model: ModelConfig, shape: BatchShape) -> dict[str, int]:
    """The captioner's projections of what the towers give it, by tower."""
    vision, captioner = model.vision, model.captioner
    if captioner is None or not shape.caption:
        return {}
    inputs = {
        "vision": captioner.kept_tokens(vision.kept_tokens(shape.image_size)) * vision.width,
        "text": _words(model, shape) * model.text.width,
    }
    return {tower: _captioned(shape) * 2 * size * captioner.width for tower, size in inputs.items()}


def _words(model: ModelConfig, shape: BatchShape) -> int:
    """States of the web caption that the captioner reads."""
    return shape.texts[0] - (model.text.pool == "cls")


def _patch_embed(model: ModelConfig, shape: BatchShape) -> int:
    vision = model.vision
    return shape.samples * vision.tokens(shape.image_size) * 2 * 3 * vision.patch_size**2 * vision.width
