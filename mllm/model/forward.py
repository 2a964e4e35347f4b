"""The forward pass in training: image features among the word embeddings, packed rows, the loss on the answers.

A language model's layers outside of attention treat each position alone, so a padded batch [B, L] can go through them
as one row of its T real positions. Attention separates the samples again: a query sees the earlier positions of its own
sample, and the beginning that all samples share (the system text of a conversation), whose states are the same in each.
Loss and gradients are those of the padded batch up to rounding, but dropout draws only once for the shared positions.

Shapes: B samples · L longest sample · P shared positions · R longest rest of a sample after them · T positions of the
row · H heads · D width of a head.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig

from clips.common.runtime import LANGUAGE_MODEL_KEYS, attends_plainly
from mllm.data.conversation import IGNORE
from mllm.data.video import Size
from mllm.encoders.encoder import select_features
from mllm.model.tiles import Llava, TokenLayout, newline_of, placeholder_ids

PACKED = "packed"
"""The name under which `packed_attention` is registered in transformers."""
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
"""Language models for which tests/numerics/test_packing.py shows equal results. The others train on padded batches."""


def can_pack(config: PreTrainedConfig) -> bool:
    """Return True if a language model with this config can be given packed rows."""
    return config.model_type in MODEL_TYPES


def places_of(marked: Tensor, count: int) -> Tensor:
    """Return int64 [count]: the indices, in 0 … B·L − 1, of the `count` true entries of `marked`, bool [B, L]."""
    return torch.nonzero_static(marked.flatten(), size=count)[:, 0]


def marked(input_ids: Tensor, *ids: int) -> Tensor:
    """Return a bool tensor of the shape of `input_ids` that is True where the id is one of `ids`."""
    return functools.reduce(torch.logical_or, [input_ids == token for token in ids])


def shared_length(input_ids: Tensor, attention_mask: Tensor, labels: Tensor, *image_ids: int) -> Tensor:
    """Return P, a scalar: how many positions at the start of all samples of a batch [B, L] are equal.

    They are neither learned nor of an image. Each sample keeps a position of its own after them, which is not learned
    either, because its token is predicted at the last shared position.
    """
    if len(input_ids) == 1:
        return torch.zeros((), dtype=torch.long, device=input_ids.device)
    unlearned = (attention_mask.bool() & (labels == IGNORE)).all(0)
    same = (input_ids == input_ids[:1]).all(0) & ~marked(input_ids[0], *image_ids)
    return (unlearned & same)[:-1].logical_and(unlearned[1:]).long().cumprod(0).sum()


def pairs_of(samples: int, longest: int, shared: int) -> int:
    """Count the query–key pairs of one `packed_attention` call, for FLOPs.

    Args:
        samples: Number of rows.
        longest: Number of positions to which the rows are padded.
        shared: Number of first positions that all rows share, and that are computed once.
    """
    rest = longest - shared
    return samples * rest * longest + shared * shared


@dataclass(frozen=True)
class Counts:
    """Counts of a batch [B, L] that tensor sizes depend on. They are made on the host, so no GPU waits for them."""

    real: int
    """Positions that are not padding."""
    image_tokens: int
    learned: int
    """Positions whose next token is a label."""
    shared: int
    """P, the shared positions of a packed batch."""
    row: int
    """T, the positions of the row of a packed batch."""

    @classmethod
    def of(cls, batch: Mapping[str, Any], *image_ids: int) -> Counts:
        """Count a batch in the layout of mllm/data/dataset.py. `image_ids` are the ids of `<image>` and `<video>`."""
        ids, mask, labels = (batch[name] for name in ("input_ids", "attention_mask", "labels"))
        real, shared = int(mask.sum()), int(shared_length(ids, mask, labels, *image_ids))
        image_tokens, learned = int(marked(ids, *image_ids).sum()), int((labels[:, 1:] != IGNORE).sum())
        return cls(real, image_tokens, learned, shared, real - (len(ids) - 1) * shared)


@dataclass(frozen=True)
class Packing:
    """Index maps between a batch [B, L], padded on the right, and its row [T]: shared positions, rest 0, rest 1, …"""

    shared: int
    """P"""
    kept: Tensor
    """bool [B, L]: True for the positions that the row holds, which are in the same order there."""
    row: Tensor
    """int64 [T]: the index in the flattened batch, 0 … B·L − 1, of each position of the row."""
    rests: Tensor
    """int64 [B, R]: the indices in the row of each sample's rest, then arbitrary ones that are read but never used."""
    filled: Tensor
    """int64 [T - P]: the indices of the B·R entries of `rests` that are not padding."""

    @classmethod
    def of(cls, attention_mask: Tensor, counts: Counts) -> Packing:
        """Make the index maps for a batch whose samples have their first `counts.shared` positions in common.

        `attention_mask` [B, L] is padded on the right, and `counts` are those of the same batch.
        """
        shared, row = counts.shared, counts.row
        is_kept = attention_mask.bool()
        is_kept[1:, :shared] = False
        real = attention_mask[:, shared:].bool()
        places = shared + real.flatten().cumsum(0).view_as(real) - 1
        return cls(shared, is_kept, places_of(is_kept, row), places, places_of(real, row - shared))

    @property
    def position_ids(self) -> Tensor:
        """int64 [1, T]: the position of each token within its own sample."""
        return (self.row % self.kept.shape[1])[None]

    def in_row(self, places: Tensor) -> Tensor:
        """Map indices into the flattened batch to indices into the row, which must hold all of them."""
        return (self.kept.flatten().cumsum(0) - 1).index_select(0, places)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packing: Packing | None = None,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Compute attention in one packed row, as an attention function of transformers; the layers pass `packing` on.

    query is [1, H, T, D], key and value are [1, a divisor of H, T, D], and the result is [1, T, H, D]. Without
    `packing`, as outside of training, it takes any number of rows. Raises ValueError if these have padding.
    """
    groups = query.shape[1] // key.shape[1]
    if packing is None:
        if attention_mask is not None and not attention_mask.all():
            raise ValueError("a model that is being trained takes no padding: set_attn_implementation('sdpa') first")
        causal: dict[str, Any] = {"groups": groups, "scaling": scaling, "dropout": dropout, "window": sliding_window}
        return _attend(query, key, value, **causal).transpose(1, 2), None
    shared = packing.shared
    rows = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
    rest, keys, values = (row.index_select(0, packing.rests.flatten()) for row in rows)
    samples, longest = packing.rests.shape
    rest, keys, values = (t.view(samples, longest, *t.shape[1:]).transpose(1, 2) for t in (rest, keys, values))
    begin = [tensor[:, :, :shared] for tensor in (query, key, value)]
    if value.device.type != "cpu":  # a view would keep the whole row in memory until the backward pass
        begin = [tensor.clone() for tensor in begin]
    if shared:
        keys = torch.cat([begin[1].expand(samples, -1, -1, -1), keys], 2)
        values = torch.cat([begin[2].expand(samples, -1, -1, -1), values], 2)
    options: dict[str, Any] = {"groups": groups, "scaling": scaling, "dropout": dropout, "window": sliding_window}
    out = _attend(rest, keys, values, **options).transpose(1, 2).flatten(0, 1).index_select(0, packing.filled)
    if shared:
        out = torch.cat([_attend(*begin, **options).transpose(1, 2)[0], out])
    return out[None], None


def _attend(
    query: Tensor, key: Tensor, value: Tensor, *, groups: int, scaling: float, dropout: float, window: int | None
) -> Tensor:
    """Compute causal attention of the last R positions: query [B, H, R, D], key and value [B, H / groups, P + R, D]."""
    rest, length = query.shape[2], key.shape[2]
    on_cpu = value.device.type == "cpu"
    if not on_cpu and rest == length and (window is None or length <= window):  # the kernel without a mask is fastest
        return F.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=groups > 1
        )
    mask = torch.ones(rest, length, dtype=torch.bool, device=query.device).tril(length - rest)
    if window is not None:
        mask = mask.triu(length - rest - window + 1)
    if not on_cpu:  # no fused GPU kernel takes a mask and grouped heads, and plain products would hold all scores
        key, value, groups = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), 1
    if attends_plainly(value.device, value.dtype, length, LANGUAGE_MODEL_KEYS):
        key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
        scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~mask, float("-inf"))
        return F.dropout(scores.softmax(-1, dtype=torch.float32).to(query.dtype), dropout) @ value
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling, enable_gqa=groups > 1
    )


AttentionInterface.register(PACKED, packed_attention)


def embed_inputs(
    model: Llava,
    input_ids: Tensor,
    image_features: Tensor | None = None,
    pixel_values: Tensor | None = None,
    placeholders: int | None = None,
    image_sizes: Sequence[Size] = (),
) -> Tensor:
    """Return the word embeddings [B, L, D] of `input_ids` with projected image tokens at the `<image>` positions.

    They equal those of the stock forward. `image_features` [n, N, W] are the encoder's tokens of all crops in order;
    alternatively `pixel_values` [n, 3, S, S] are the crops. With tiles, `image_sizes` holds (height, width) of each
    image, or VIDEO for a video, whose frames are its crops. `placeholders` is the number of placeholders in
    `input_ids`; without it the host waits for the GPU. For a batch without images pass the same kind of tensor with
    n = 0. A zero image then goes through the same modules with weight zero, because under ZeRO-3 every rank must run
    every module, or the other ranks wait forever. Raises ValueError if placeholders and image tokens differ in number.
    """
    config, inner = model.config, model.model
    newline = newline_of(model)
    inputs_embeds = model.get_input_embeddings()(input_ids)
    tower, projector = inner.vision_tower, inner.multi_modal_projector
    if pixel_values is not None:
        has_images = len(pixel_values) > 0
        pixels = pixel_values if has_images else pixel_values.new_zeros(1, *pixel_values.shape[1:])
        # With checkpointing PEFT makes embeddings require gradients, so a frozen tower would keep its activations.
        learns = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in tower.parameters())
        with torch.set_grad_enabled(learns):
            image_features = select_features(
                tower, pixels, config.vision_feature_layer, config.vision_feature_select_strategy
            )
    elif image_features is not None and len(image_features) > 0:
        has_images = True
    else:
        has_images = False
        image_features = torch.zeros(1, 1, projector.linear_1.in_features, device=input_ids.device)
    projected = projector(image_features.to(inputs_embeds.device, projector.linear_1.weight.dtype))
    projected = projected.to(inputs_embeds.dtype)
    positions = marked(input_ids, *placeholder_ids(config))
    tokens = projected.flatten(0, 1) if has_images else projected.flatten(0, 1)[:0]
    if has_images and newline is not None:
        tokens = TokenLayout.of(config).arranged(projected, newline, image_sizes)
    if placeholders is None:
        placeholders = int(positions.sum())
    if placeholders != len(tokens):
        raise ValueError(f"{placeholders} image placeholders, but {len(tokens)} image tokens")
    if not has_images:
        unused = projected.sum() if newline is None else projected.sum() + newline.sum()
        return inputs_embeds + 0.0 * unused
    # Not masked_scatter, because its gradient is a selection, and the host would wait for its size.
    rows = inputs_embeds.flatten(0, 1).index_put((places_of(positions, placeholders),), tokens)
    return rows.view_as(inputs_embeds)


def hidden_states(
    model: Llava, inputs_embeds: Tensor, attention_mask: Tensor, packing: Packing | None = None
) -> Tensor:
    """Return the language model's last hidden states: those of all positions [B · L, D], or of the packed row [T, D].

    Args:
        inputs_embeds: [B, L, D].
        attention_mask: [B, L], not read with `packing`.
    """
    language_model = model.model.language_model
    if packing is None:
        outputs = language_model(inputs_embeds=inputs_embeds, attention_mask=attention_mask, use_cache=False)
    else:
        outputs = language_model(
            inputs_embeds=inputs_embeds.flatten(0, 1).index_select(0, packing.row)[None],
            position_ids=packing.position_ids,
            use_cache=False,
            packing=packing,
        )
    return outputs.last_hidden_state.flatten(0, 1)


def causal_lm_loss(
    model: Llava,
    inputs_embeds: Tensor,
    attention_mask: Tensor,
    labels: Tensor,
    num_items: Tensor | float | None = None,
    *,
    learned: int | None = None,
    packing: Packing | None = None,
) -> Tensor:
    """Return the mean next-token cross entropy over the labelled positions. Only those positions get logits.

    inputs_embeds [B, L, D], attention_mask [B, L], labels [B, L] with -100 where nothing is learned. `num_items`, for
    gradient accumulation, replaces the number of labelled tokens as divisor. `learned` is that number; without it the
    host waits for the GPU. With `packing` the batch goes through the language model as one row without padding, so the
    attention of the language model must be `PACKED`. A batch without labels has loss zero, but the loss still depends
    on every weight.
    """
    is_learned = F.pad(labels[:, 1:] != IGNORE, (0, 1))
    indices = places_of(is_learned, int(is_learned.sum()) if learned is None else learned)
    states = hidden_states(model, inputs_embeds, attention_mask, packing)
    logits = model.lm_head(states.index_select(0, indices if packing is None else packing.in_row(indices))).float()
    divisor = num_items if num_items is not None else max(len(indices), 1)
    return F.cross_entropy(logits, labels.flatten().index_select(0, indices + 1), reduction="sum") / divisor
