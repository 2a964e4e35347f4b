"""The text tower: a transformer over token ids, one of whose slots stands for the whole text.

Shapes: B texts · L slots · D width. Two layouts, chosen by `text.pool`:
- `cls`: `[bos, words…, eos, pad…, CLS]`; the summary token (CLS) stands in the last slot. CLIPS.
- `eos`: `[bos, words…, eos, pad…]`; the end of the text is read. CLIP, with `text.causal`.

Two ways with padding:
- `pad_mask = False`, the reference: every text fills the whole context and padding is attended (with `causal` and
  `eos` no slot that counts ever sees it, so that texts need not fill the context then).
- `pad_mask = True`: padding is masked and CLS keeps the position of the last slot, so a text gives
  the same features at any padded length and a batch is padded only to its own length. With CLS the mask is
  the one that stock open_clip builds for `embed_cls` (slot j is seen iff slot j−1 holds no padding:
  the first padding slot stays visible), so that such a tower still exports to stock open_clip exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clips.config import TextConfig
from clips.model.layers import Blocks, init_weights, stream_dtype


def visible_slots(ids_BL: Tensor, pad_id: int) -> Tensor:
    """[B, L] booleans: which slots may be attended when padding is masked (CLS in the last slot)."""
    before_is_word = ids_BL[:, :-1] != pad_id
    return torch.cat([torch.ones_like(before_is_word[:, :1]), before_is_word], dim=1)


def word_slots(ids_BL: Tensor, pad_id: int) -> Tensor:
    """[B, L] booleans of rows `bos … eos pad …`: all up to eos. Only what stands at the end counts as padding:
    CLIP pads with the id of a word ("!")."""
    return (ids_BL != pad_id).flip(1).cumsum(dim=1).flip(1) > 0


class TextTower(nn.Module):
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

    def forward(self, ids_BL: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """ids [B, L] → (pooled [B, D] after the final norm, states [B, M, D] before it, visible [B, M] or None).

        `states` leave the CLS slot out (M = L − 1; without one M = L): they are what the captioner reads. `visible`
        marks those it may attend; None where padding is attended, as by the tower itself.
        """
        config, L = self.config, ids_BL.shape[1]
        if config.context_length < L or (config.context_length > L and not config.trim):
            raise ValueError(
                f"texts have {L} slots, the tower's context is {config.context_length} (pad_mask={config.pad_mask})"
            )
        has_cls = config.pool == "cls"
        positions = torch.cat([self.pos_embed[: L - 1], self.pos_embed[-1:]]) if has_cls else self.pos_embed[:L]
        x = (self.token_embed(ids_BL) + positions).to(stream_dtype(ids_BL.device))
        visible = (visible_slots if has_cls else word_slots)(ids_BL, self.pad_id)
        mask = visible[:, None, None, :] if config.pad_mask else None
        if config.causal:
            causal = torch.ones(L, L, dtype=torch.bool, device=ids_BL.device).tril()
            mask = causal if mask is None else mask & causal
        x = self.blocks(x, mask)
        if has_cls:
            return self.norm(x[:, -1]), x[:, :-1], visible[:, :-1] if config.trim else None
        eos_B = visible.sum(dim=1) - 1
        return self.norm(x[torch.arange(len(x), device=x.device), eos_B]), x, visible if config.trim else None
