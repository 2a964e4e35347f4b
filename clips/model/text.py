"""The text tower: a bidirectional transformer whose summary token (CLS) stands in the last slot.

Shapes: B texts · L slots, `[bos, words…, eos, pad…, CLS]` · D width.

Two ways with padding:
- `pad_mask = False`, the reference: every text fills the whole context and padding is attended.
- `pad_mask = True`: padding is masked and CLS keeps the position of the last slot, so a text gives
  the same features at any padded length and a batch is padded only to its own length. The mask is
  the one that stock open_clip builds for `embed_cls` (slot j is seen iff slot j−1 holds no padding:
  the first padding slot stays visible), so that such a tower still exports to stock open_clip exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clips.config import TextConfig
from clips.model.layers import LAYER_NORM_EPS, Blocks, init_weights, stream_dtype


def visible_slots(ids_BL: Tensor, pad_id: int) -> Tensor:
    """[B, L] booleans: which slots may be attended when padding is masked (CLS in the last slot)."""
    before_is_word = ids_BL[:, :-1] != pad_id
    return torch.cat([torch.ones_like(before_is_word[:, :1]), before_is_word], dim=1)


class TextTower(nn.Module):
    def __init__(self, config: TextConfig, embed_dim: int, pad_id: int) -> None:
        super().__init__()
        self.config = config
        self.pad_id = pad_id
        self.token_embed = nn.Embedding(config.vocab_size, config.width)
        self.pos_embed = nn.Parameter(torch.empty(config.context_length, config.width))
        self.blocks = Blocks(config.layers, config.width, config.heads, config.mlp_ratio, gelu="tanh")
        self.norm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.proj = nn.Linear(config.width, embed_dim, bias=False)
        init_weights(self)
        nn.init.normal_(self.token_embed.weight, std=0.02)
        nn.init.normal_(self.pos_embed, std=0.01)

    def forward(self, ids_BL: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """ids [B, L] → (pooled [B, D] after the final norm, states [B, L−1, D] before it, visible [B, L−1] or None).

        `states` leave the CLS slot out: they are what the captioner reads. `visible` marks those it may attend.
        """
        L, context = ids_BL.shape[1], self.config.context_length
        if context < L or (context > L and not self.config.pad_mask):
            raise ValueError(
                f"texts have {L} slots, the tower's context is {context} (pad_mask={self.config.pad_mask})"
            )
        positions = torch.cat([self.pos_embed[: L - 1], self.pos_embed[-1:]])
        x = (self.token_embed(ids_BL) + positions).to(stream_dtype(ids_BL.device))
        visible = visible_slots(ids_BL, self.pad_id) if self.config.pad_mask else None
        x = self.blocks(x, None if visible is None else visible[:, None, None, :])
        return self.norm(x[:, -1]), x[:, :-1], None if visible is None else visible[:, :-1]
