"""Bytes of one rank at the fullest moment of a step, from shapes: what it holds (clips/common/memory.py), activations.

Counted are the bytes that torch's allocator hands out (`torch.cuda.max_memory_allocated`), without a CUDA context and
the allocator's gaps. tools/gpu_report.py measures the same; docs/planning.md compares. Assumptions:

- Activations are what autograd keeps, which tests/unit/clips/test_memory.py counts: of a block, per token, unit of
  width and element of e bytes, 5 + 2 · mlp_ratio elements: the inputs of both norms, of qkv, proj and fc1 (5), the
  inputs of GELU and fc2 (2 · mlp_ratio); and per slot, padding included, q, k and v (3). A GPU's autocast normalises
  in fp32, 4 bytes more. Attention with plain products, as on a CPU in bf16, keeps its probabilities; a fused kernel
  with a mask of its own for each query keeps that. With activation checkpointing a block keeps its input alone, and
  one block at a time is whole again.
- In the backward pass activations go as gradients come, from the losses over captioner and texts to the image tower.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import nn

from clips.common.memory import FP32, Parameters, held
from clips.config import CaptionerConfig, Freeze, ModelConfig, OptimConfig, RunConfig, sides
from clips.model.clips import CLIPSModel
from clips.model.flops import BatchShape, captioner_tokens, computed_words
from clips.model.layers import CPU_PLAIN_KEYS
from clips.training.engine import parameter_groups
from clips.training.losses import logit_chunks


@cache
def count_parameters(config: ModelConfig, optim: OptimConfig, freeze: Freeze) -> Parameters:
    """By building the model without its weights."""
    with torch.device("meta"):
        model = CLIPSModel(config, pad_id=0)
    model.freeze(freeze)
    groups = {group["name"]: sum(p.numel() for p in group["params"]) for group in parameter_groups(model, optim)}
    products = sum(p.numel() for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d)) for p in m.parameters())
    total = sum(p.numel() for p in model.parameters())
    return Parameters(groups=groups, frozen=total - sum(groups.values()), products=products)


# ------------------------------------------------------------------------------------------------------ activations


@dataclass(frozen=True)
class Place:
    """What decides which kernels run."""

    device: str
    """cpu or cuda."""
    bf16: bool
    checkpointing: bool

    @property
    def element(self) -> int:
        return 2 if self.bf16 else FP32


def block_bytes(
    place: Place,
    width: int,
    heads: int,
    mlp_ratio: float,
    slots: int,
    tokens: float,
    *,
    masked_rows: bool,
    packed: bool,
) -> int:
    """What autograd keeps of one block for one sequence of `slots`, `tokens` of which are computed.

    `masked_rows`: each query has a mask of its own, as in the captioner. `packed`: the tokens stand in rows.
    """
    elements = 3 + 2 * mlp_ratio  # all but the inputs of the norms, and q, k and v, which are padded
    norms = 2 * (FP32 if place.device == "cuda" else place.element) + 16 / width
    token, slot = width * (elements * place.element + norms), 3.0 * width * place.element
    if place.device == "cpu" and place.bf16 and slots <= CPU_PLAIN_KEYS:
        slot += place.element * heads * slots
    else:
        slot += FP32 * heads + (place.element * slots if masked_rows else 0)
        slot += width * place.element if packed else 0  # what comes out of it, of which the input of proj is a copy
    return int(tokens * token + slots * slot)


@dataclass(frozen=True)
class Part:
    """A stretch of the forward pass."""

    kept: int
    """Bytes that autograd keeps of it."""
    working: int
    """Bytes that its backward pass needs beside what is kept, at most."""
    parameters: int
    """Those that get their gradients in it."""
    blocks: int = 1
    """Those gradients come block by block; what is kept goes with them."""
    forward: int = 0
    """Bytes that its forward pass needs beside what is kept of it and of the parts before, at most."""


def parts_of(run: RunConfig, shape: BatchShape, place: Place) -> dict[str, Part]:
    """The parts of a step of `shape` in the order of the forward pass: vision, text, captioner, contrastive, head."""
    model, B, e = run.model, shape.samples, place.element
    vision, text, captioner = model.vision, model.text, model.captioner
    counts = count_parameters_by_part(model)
    pixels, patches = 3 * math.prod(sides(shape.image_size)), vision.kept_tokens(shape.image_size)
    frozen = run.train.freeze
    tower = _stack(place, vision.width, vision.heads, vision.layers, vision.mlp_ratio, patches + vision.prefix_tokens)
    parts = {"vision": _scaled(tower, B, counts["vision"], pixels * e if place.bf16 else 0)}
    text_shape = (text.width, text.heads, text.layers, text.mlp_ratio)
    texts = [
        _stack(place, *text_shape, slots, tokens / B, rows=text.causal, packed=text.trim)
        for slots, tokens in zip(shape.texts, computed_words(shape), strict=True)
    ]
    kept = sum(stack.kept for stack in texts)
    most = max((stack.working for stack in texts), default=0)
    # A token embedding's gradient is made whole before it is added, when the blocks are done.
    embedding = FP32 * text.vocab_size * text.width if model.has_text_tower else 0
    forward = B * max((stack.forward for stack in texts), default=0)
    parts["text"] = Part(B * kept, max(B * most, embedding), counts.get("text", 0), text.layers, forward)
    for name in ("vision", "text"):
        if frozen == name:
            parts[name] = replace(parts[name], kept=0, parameters=0)
    contrastive = _contrastive(model, shape, B * shape.world_size) if model.embed_dim else Part(0, 0, 0)
    if captioner is None or not shape.caption:
        return parts | {"contrastive": contrastive}
    words = shape.texts[0] - (text.pool == "cls") if captioner.web else 0
    seen = captioner.kept_tokens(patches)
    slots, tokens = seen + words + shape.caption - 1, captioner_tokens(captioner, model, shape) / B
    sizes = (captioner.width, captioner.heads, captioner.layers, captioner.mlp_ratio)
    decoder = _stack(place, *sizes, slots, tokens, rows=True, packed=True)
    skipped = _not_asked(place, captioner, slots, seen + words, tokens - shape.predicted / B)
    inputs = e * (seen * vision.width + words * text.width)
    norm = (FP32 if place.device == "cuda" else e) * (shape.caption - 1) * captioner.width
    if not place.checkpointing:
        decoder = replace(decoder, kept=decoder.kept - skipped)
    else:  # the last block is the smaller one, and is over when the block before it is whole again
        unasked = int(e * (captioner.mlp_ratio + 1) * (tokens - shape.predicted / B) * captioner.width)
        before = decoder.working - int(e * tokens * captioner.width) - norm if captioner.layers > 1 else 0
        decoder = replace(decoder, working=max(decoder.working - skipped - unasked, before))
    head = captioner.width * text.vocab_size
    parts["captioner"] = _scaled(decoder, B, counts["captioner"] - head, inputs + norm + slots**2)
    parts["contrastive"] = contrastive
    chunks = max(1, -(-shape.predicted // run.task.caption_chunk))
    logits = FP32 * -(-shape.predicted // chunks) * text.vocab_size
    # Of a chunk: log-probabilities, their gradient and that of the logits; then the head's own. Forward: two of them.
    working = 3 * logits + (2 * e if place.bf16 else 0) * head
    parts["head"] = Part(2 * e * shape.predicted * captioner.width, working, head, forward=2 * logits)
    return parts


def _contrastive(model: ModelConfig, shape: BatchShape, columns: int) -> Part:
    """The loss of a rank's rows against all `columns`: both directions of each pair."""
    gathered = FP32 * (1 + len(shape.texts)) * columns * model.embed_dim if columns > shape.samples else 0
    chunks = max(1, logit_chunks(shape.samples, columns))
    logits = FP32 * -(-shape.samples // chunks) * columns
    # Log-probabilities are kept, unless they are computed again; a gradient and its product with them are made.
    kept = 2 * len(shape.texts) * logits if chunks == 1 else 0
    return Part(kept + gathered, (2 if chunks == 1 else 3) * logits + gathered, 1)


def _not_asked(place: Place, captioner: CaptionerConfig, slots: int, without: int, tokens: float) -> int:
    """What the captioner's last block does not keep: `without` of its `slots` and `tokens` are no queries."""
    e, width = place.element, captioner.width
    token = width * ((2 + 2 * captioner.mlp_ratio) * e + (FP32 if place.device == "cuda" else e)) + 8
    if place.device == "cpu" and place.bf16 and slots <= CPU_PLAIN_KEYS:
        slot = width * e + e * captioner.heads * slots
    else:  # the fused kernel keeps q where k and v are
        slot = FP32 * captioner.heads + e * slots + width * e
    return int(tokens * token + without * slot)


@cache
def count_parameters_by_part(config: ModelConfig) -> dict[str, int]:
    with torch.device("meta"):
        return CLIPSModel(config, pad_id=0).parameter_counts()


def _stack(
    place: Place,
    width: int,
    heads: int,
    layers: int,
    mlp_ratio: float,
    slots: int,
    tokens: float | None = None,
    *,
    rows: bool = False,
    packed: bool = False,
) -> Part:
    """Blocks, for one sequence."""
    tokens = slots if tokens is None else tokens
    block = block_bytes(place, width, heads, mlp_ratio, slots, tokens, masked_rows=rows, packed=packed)
    norm = FP32 if place.device == "cuda" else place.element
    # The widest moment: the gradient of the GELU is made of that of fc2's input, which itself is no longer needed.
    working = int(place.element * (mlp_ratio + 1) * tokens * width)
    if not place.checkpointing:
        return Part(layers * block, working, 0, layers)
    # The forward pass keeps nothing of a block: before the second product of its MLP lie what goes into GELU and comes
    # out, the norm's output, and the sum that the MLP's result is added to.
    forward = int(tokens * width * ((2 * mlp_ratio + 1) * place.element + norm))
    return Part(int(layers * place.element * tokens * width), block + working, 0, layers, forward)


def _scaled(stack: Part, samples: int, parameters: int, more: int) -> Part:
    kept, working, forward = (samples * size for size in (stack.kept + more, stack.working, stack.forward))
    return Part(kept, working, parameters, stack.blocks, forward)


# ------------------------------------------------------------------------------------------------------------- a step


@dataclass(frozen=True)
class Usage:
    """Bytes of one rank at the fullest moment of its steps."""

    weights: int
    optimizer: int
    buffers: int
    batch: int
    """Pictures, and with GradCache the features of the whole step."""
    working: int
    """Gradients, activations, and the bf16 copies of the weights."""
    host: int
    """In the machine's memory, and no part of `total`."""

    @property
    def total(self) -> int:
        return self.weights + self.optimizer + self.buffers + self.batch + self.working


def usage(
    run: RunConfig,
    shape: BatchShape,
    device: str,
    zero: Mapping[str, Any],
    *,
    accumulation: int | None = None,
    whole_step: bool = False,
) -> Usage:
    """Of steps of `accumulation` micro-batches of `shape` (run.train.accumulation of them if it is not given).

    `whole_step`: the contrastive loss runs over all micro-batches of the step (GradCache). Then the towers' features
    and their gradients are there for the whole step, but only one micro-batch's activations, and logits of its rows
    against those of all (clips/training/grad_cache.py). The step's batches wait on the host.
    """
    accumulation = run.train.accumulation if accumulation is None else accumulation
    place = Place(device, run.train.precision == "bf16", run.train.activation_checkpointing)
    parameters = count_parameters(run.model, run.optim, run.train.freeze)
    on_rank = held(parameters, zero, shape.world_size)
    parts = parts_of(run, shape, place)
    features = 0
    if whole_step:
        rows, columns = shape.samples * accumulation, shape.samples * accumulation * shape.world_size
        # The loss itself is over before the first micro-batch's graph is built.
        features = 2 * FP32 * (1 + len(shape.texts)) * (rows + columns) * run.model.embed_dim
        contrastive = _contrastive(run.model, shape, columns)
        loss = contrastive.kept + contrastive.working
        parts["contrastive"] = Part(0, 0, 1)
    copies = place.element * parameters.products if place.bf16 else 0
    share = on_rank.gradients / max(FP32 * parameters.trained, 1)
    """What a rank keeps of a gradient."""
    before = on_rank.gradients if accumulation > 1 else 0
    pictures = shape.samples * 3 * FP32 * math.prod(sides(shape.image_size))
    """In fp32; bf16 goes on from a copy, and they are gone before the backward pass."""
    gone = pictures if place.bf16 else 0
    kept = fullest = 0
    for part in parts.values():
        kept += part.kept
        fullest = max(fullest, before + copies + kept + part.forward)
    done = 0.0
    for part in reversed(parts.values()):  # the backward pass
        last = 1 / part.blocks
        for blocks_done in (0.0, 1 - last):  # at the part's first block and at its last one
            known = done + blocks_done * part.parameters
            gradients = before if accumulation > 1 else int(share * FP32 * known)
            gradients += on_rank.reducing if known > on_rank.bucket else 0
            held_back = kept - int(blocks_done * part.kept) + part.working
            # With checkpointing the copies have gone with the forward pass.
            fullest = max(fullest, gradients + held_back + (0 if place.checkpointing else copies) - gone)
        kept, done = kept - part.kept, done + part.parameters
    fullest = max(fullest, on_rank.gradients + on_rank.reducing)
    if whole_step:
        fullest = max(fullest, before + loss)
    return Usage(
        weights=on_rank.weights,
        optimizer=on_rank.optimizer,
        buffers=on_rank.buffers,
        batch=pictures + features,
        working=fullest,
        host=on_rank.host,
    )
