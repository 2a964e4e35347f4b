"""The text tower: a transformer over token ids, one of whose slots summarises the text.

Shapes: B texts · L slots · D width. Two layouts, chosen by `text.pool`:
- `cls`: `[bos, words…, eos, pad…, CLS]`; the summary token (CLS) is in the last slot. CLIPS.
- `eos`: `[bos, words…, eos, pad…]`; the end of the text is read. CLIP, with `text.causal`.

Padding is treated in one of two ways:
- `pad_mask = False`, the reference: every text fills the whole context and padding is attended (with `causal` and
  `eos` no slot that matters sees padding, so texts need not fill the context then).
- `pad_mask = True`: padding is masked and CLS keeps the position of the last slot, so a text has
  the same features at any length, and padding is left out (`Packed` in layers.py). With CLS the mask is
  the one that stock open_clip builds for `embed_cls` (slot j is seen iff slot j−1 holds no padding, so
  the first padding slot stays visible). Therefore such a tower exports to stock open_clip exactly.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from clips.config import TextConfig
from clips.model.layers import Blocks, Packed, init_weights, stream_dtype


def visible_slots(ids_BL: Tensor, pad_id: int) -> Tensor:
    """Return booleans [B, L] of the slots that may be attended when padding is masked (CLS is in the last slot)."""
    before_is_word = ids_BL[:, :-1] != pad_id
    return torch.cat([torch.ones_like(before_is_word[:, :1]), before_is_word], dim=1)


def word_slots(ids_BL: Tensor, pad_id: int) -> Tensor:
    """Return booleans [B, L] that mark each text, `bos … eos`, without its padding.

    Only ids at the end count as padding, because CLIP pads with the id of a word ("!").
    """
    return (ids_BL != pad_id).flip(1).cumsum(dim=1).flip(1) > 0


def attended_slots(ids_BL: Tensor, config: TextConfig, pad_id: int) -> Tensor:
    """Return booleans [B, L] of the slots that may be attended when padding is masked; without a CLS, up to eos."""
    return (visible_slots if config.pool == "cls" else word_slots)(ids_BL, pad_id)


def computed_slots(ids_BL: Tensor, config: TextConfig, pad_id: int) -> Tensor | None:
    """Return booleans [B, L] of the slots that can affect an output, or None for all, if padding is attended."""
    if not config.trim:
        return None
    attended = attended_slots(ids_BL, config, pad_id)
    if config.pool == "cls":
        attended[:, -1] = True
    return attended


def count_computed(ids_BL: Tensor, config: TextConfig, pad_id: int) -> int:
    """Count the `computed_slots` of ids on the host."""
    computed = computed_slots(ids_BL, config, pad_id)
    return ids_BL.numel() if computed is None else int(computed.sum())


class TextStates(NamedTuple):
    """The tower's outputs for one text per sample."""

    pooled: Tensor
    """[B, D], the summary slot after the final norm."""
    states: Tensor
    """States [B, M, D] before the norm, for the captioner: all slots except CLS (M = L − 1, or L without a CLS). If
    padding is masked, its states are zero."""
    visible: Tensor | None
    """[B, M], the states that the captioner may attend to; None if it attends to padding, as the tower itself does."""


class TextTower(nn.Module):
    """The text tower; `forward` returns the states of several texts in one pass."""

    def __init__(self, config: TextConfig, embed_dim: int, pad_id: int) -> None:
        super().__init__()
        self.config = config
        self.pad_id = pad_id
        self.token_embed = nn.Embedding(config.vocab_size, config.width)
        self.pos_embed = nn.Parameter(torch.empty(config.context_length, config.width))
        self.blocks = Blocks(
            config.layers, config.width, config.heads, config.mlp_ratio, config.activation, config.norm_eps
        )
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.proj = nn.Linear(config.width, embed_dim, bias=False) if embed_dim else nn.Identity()
        init_weights(self)
        nn.init.normal_(self.token_embed.weight, std=0.02)
        nn.init.normal_(self.pos_embed, std=0.01)

    def forward(self, *texts: Tensor, counts: Sequence[int | None] | None = None) -> list[TextStates]:
        """Encode the texts of a batch, each as ids [B, L] of any length, in one pass.

        `counts` are the `count_computed` of each text; if not given, the host waits for the GPU.
        Raises ValueError for a text longer than the context, or a shorter one if padding is attended.
        """
        for ids in texts:
            L, context = ids.shape[1], self.config.context_length
            if context < L or (context > L and not self.config.trim):
                raise ValueError(f"texts have {L} slots, the tower's context is {context}")
        known = counts or [None] * len(texts)
        batches = [
            Packed.of(ids.shape, computed_slots(ids, self.config, self.pad_id), count, self._mask(ids))
            for ids, count in zip(texts, known, strict=True)
        ]
        x = torch.cat([batch.pack(self._embed(ids)) for batch, ids in zip(batches, texts, strict=True)])
        parts = self.blocks(x, batches).split([batch.rows for batch in batches])
        return [self._states(b.unpack(part), ids) for b, part, ids in zip(batches, parts, texts, strict=True)]

    def _embed(self, ids_BL: Tensor) -> Tensor:
        L = ids_BL.shape[1]
        has_cls = self.config.pool == "cls"
        positions = torch.cat([self.pos_embed[: L - 1], self.pos_embed[-1:]]) if has_cls else self.pos_embed[:L]
        return (self.token_embed(ids_BL) + positions).to(stream_dtype(ids_BL.device))

    def _mask(self, ids_BL: Tensor) -> Tensor | None:
        mask = attended_slots(ids_BL, self.config, self.pad_id)[:, None, None, :] if self.config.pad_mask else None
        if self.config.causal:
            L = ids_BL.shape[1]
            causal = torch.ones(L, L, dtype=torch.bool, device=ids_BL.device).tril()
            mask = causal if mask is None else mask & causal
        return mask

    def _states(self, x_BLD: Tensor, ids_BL: Tensor) -> TextStates:
        visible = attended_slots(ids_BL, self.config, self.pad_id)
        read = visible if self.config.trim else None
        if self.config.pool == "cls":
            return TextStates(self.norm(x_BLD[:, -1]), x_BLD[:, :-1], None if read is None else read[:, :-1])
        eos_B = visible.sum(dim=1) - 1
        return TextStates(self.norm(x_BLD[torch.arange(len(x_BLD), device=x_BLD.device), eos_B]), x_BLD, read)
