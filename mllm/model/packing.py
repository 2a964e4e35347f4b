"""Samples of a batch in one row without padding, and what all of them begin with computed once.

A language model's layers outside of attention treat each position alone, so a padded batch [B, L] goes through them as
one row of its T real positions. Attention sees samples again: a query reads the positions of its own sample before it
and the beginning that all samples share (the system text of a conversation), whose states are the same for each. Loss
and gradients are those of the padded batch up to rounding; only dropout draws once for what is shared.

Shapes: B samples · L longest of them · P shared positions · R longest rest behind them · T positions of the row ·
H heads · D width of a head.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig

from mllm.data.conversation import IGNORE

PACKED = "packed"
"""The name under which transformers knows the attention below."""
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
"""Language models that a test has shown to compute the same (tests/numerics/test_packing.py); others train padded."""
SHORT = 512
"""Up to this many keys torch's fused attention is slower on CPUs in bf16 than plain products: a step of SmolLM2-135M
on 32 samples of 40 tokens took 3.1 s of one core with it and 2.1 s without."""


def can_pack(config: PreTrainedConfig) -> bool:
    """Whether the language model of a LLaVA model with this text config can be given packed rows."""
    return config.model_type in MODEL_TYPES


def places_of(marked: Tensor, count: int) -> Tensor:
    """int64 [count]: the places of the `count` marked entries of `marked`, bool [B, L], in 0 … B·L − 1."""
    return torch.nonzero_static(marked.flatten(), size=count)[:, 0]


def marked(input_ids: Tensor, *ids: int) -> Tensor:
    """bool, of the shape of `input_ids`: where one of `ids` is."""
    return functools.reduce(torch.logical_or, [input_ids == token for token in ids])


def shared_length(input_ids: Tensor, attention_mask: Tensor, labels: Tensor, *image_ids: int) -> Tensor:
    """P, a scalar: the positions that all samples of a batch [B, L] begin with, none of them learned or of an image.

    Each sample keeps a position of its own behind them. It is not learned either: its prediction is shared.
    """
    if len(input_ids) == 1:
        return torch.zeros((), dtype=torch.long, device=input_ids.device)
    given = (attention_mask.bool() & (labels == IGNORE)).all(0)
    same = (input_ids == input_ids[:1]).all(0) & ~marked(input_ids[0], *image_ids)
    return (given & same)[:-1].logical_and(given[1:]).long().cumprod(0).sum()


def pairs_of(samples: int, longest: int, shared: int) -> int:
    """Pairs of query and key that `packed_attention` computes, for FLOPs."""
    rest = longest - shared
    return samples * rest * longest + shared * shared


@dataclass(frozen=True)
class Counts:
    """Numbers of a batch [B, L] that sizes depend on. They are counted on the host: on a GPU each would be a wait."""

    real: int
    """Positions that are no padding."""
    image_tokens: int
    learned: int
    """Positions whose next token is a label."""
    shared: int
    """P, of a batch that is packed."""
    row: int
    """T, of a batch that is packed."""

    @classmethod
    def of(cls, batch: Mapping[str, Any], *image_ids: int) -> Counts:
        """Of a batch in the layout of mllm/data/dataset.py; `image_ids` are the ids of images and videos."""
        ids, mask, labels = (batch[name] for name in ("input_ids", "attention_mask", "labels"))
        real, shared = int(mask.sum()), int(shared_length(ids, mask, labels, *image_ids))
        image_tokens, learned = int(marked(ids, *image_ids).sum()), int((labels[:, 1:] != IGNORE).sum())
        return cls(real, image_tokens, learned, shared, real - (len(ids) - 1) * shared)


@dataclass(frozen=True)
class Packing:
    """Places of the positions of a batch [B, L], padded on the right, in the row [T]: shared, rest 0, rest 1, …"""

    shared: int
    """P"""
    kept: Tensor
    """bool [B, L]: what the row holds, in this order."""
    row: Tensor
    """int64 [T]: the places of the row's positions in the batch, 0 … B·L − 1."""
    rests: Tensor
    """int64 [B, R]: places in the row of each sample's rest; behind its end some place, read and never used."""
    filled: Tensor
    """int64 [T - P]: which of the B·R entries of `rests` are no padding."""

    @classmethod
    def of(cls, attention_mask: Tensor, counts: Counts) -> Packing:
        """The row of a batch whose samples have their first `counts.shared` positions in common."""
        shared, row = counts.shared, counts.row
        is_kept = attention_mask.bool()
        is_kept[1:, :shared] = False
        real = attention_mask[:, shared:].bool()
        places = shared + real.flatten().cumsum(0).view_as(real) - 1
        return cls(shared, is_kept, places_of(is_kept, row), places, places_of(real, row - shared))

    @property
    def position_ids(self) -> Tensor:
        """int64 [1, T]: the position of each within its own sample."""
        return (self.row % self.kept.shape[1])[None]

    def in_row(self, places: Tensor) -> Tensor:
        """Places in the row of the positions at `places` of the batch; all of them must be in the row."""
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
    """transformers' attention function for one packed row; `packing` is handed through the model's layers.

    query [1, H, T, D], key and value [1, a divisor of H, T, D] → [1, T, H, D]. Without `packing` the model is asked
    outside its training, with any number of rows and no padding, else ValueError.
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
    if value.device.type != "cpu":  # a view would keep all of the row until the backward pass
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
    """Causal attention of the last positions: query [B, H, R, D], key and value [B, H / groups, P + R, D]."""
    rest, length = query.shape[2], key.shape[2]
    on_cpu = value.device.type == "cpu"
    if not on_cpu and rest == length and (window is None or length <= window):  # fastest is the kernel without a mask
        return F.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=groups > 1
        )
    mask = torch.ones(rest, length, dtype=torch.bool, device=query.device).tril(length - rest)
    if window is not None:
        mask = mask.triu(length - rest - window + 1)
    if not on_cpu:  # with a mask no fused kernel of a GPU takes grouped heads, and plain products would hold all scores
        key, value, groups = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), 1
    if on_cpu and value.dtype == torch.bfloat16 and length <= SHORT:
        key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
        scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~mask, float("-inf"))
        return F.dropout(scores.softmax(-1, dtype=torch.float32).to(query.dtype), dropout) @ value
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling, enable_gqa=groups > 1
    )


AttentionInterface.register(PACKED, packed_attention)
