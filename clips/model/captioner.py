"""The captioner: predicts the full synthetic caption from the image and the web caption.

Shapes: B samples · N image tokens · M web-text states · T caption positions · D width · V vocabulary.
Sequence `[N image tokens; M web-text states; T positions]`, self-attention only. The prefix is
visible to everything and never sees the positions; positions are causal among themselves.

`inputs = "queries"`: position k is a learned query (the paper; no teacher forcing).
`inputs = "tokens"`: position k is the embedding of caption token k (teacher forcing), which can generate.
Position k predicts token k + 1 of `bos … eos` in both.
"""

import torch
from torch import Tensor, nn

from clips.config import CaptionerConfig, TextConfig, VisionConfig
from clips.model.layers import LAYER_NORM_EPS, Blocks, KVCache, Packed, init_weights


def caption_mask(prefix: int, positions: int, visible_BM: Tensor | None, device: torch.device) -> Tensor:
    """Return the boolean attention mask [L, L] or [B, 1, L, L], L = prefix + positions; True = row attends to column.

    `visible_BM` marks the web-text states (the last M columns of the prefix) that are not padding.
    """
    L = prefix + positions
    mask = torch.ones(L, L, dtype=torch.bool, device=device).tril()
    mask[:, :prefix] = True
    if visible_BM is None:
        return mask
    B, M = visible_BM.shape
    columns = torch.ones(B, L, dtype=torch.bool, device=device)
    columns[:, prefix - M : prefix] = visible_BM
    return mask & columns[:, None, None, :]


class Captioner(nn.Module):
    """A transformer that predicts caption tokens from image tokens and web-text states (shapes above)."""

    def __init__(self, config: CaptionerConfig, vision: VisionConfig, text: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.image_proj = nn.Linear(vision.width, config.width, bias=False)
        self.text_proj = nn.Linear(text.width, config.width, bias=False)
        self.queries = nn.Parameter(torch.empty(config.length, config.width))
        self.token_embed = nn.Embedding(text.vocab_size, config.width) if config.inputs == "tokens" else None
        self.blocks = Blocks(config.layers, config.width, config.heads, config.mlp_ratio, "gelu_tanh", LAYER_NORM_EPS)
        self.norm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.head = nn.Linear(config.width, text.vocab_size, bias=config.head_bias)
        init_weights(self)
        if self.token_embed is None:
            nn.init.normal_(self.queries)  # N(0, 1), as in the paper
        else:
            nn.init.normal_(self.queries, std=0.02)  # here they are the positions of the tokens
            nn.init.normal_(self.token_embed.weight, std=0.02)

    def prefix(self, patches_BND: Tensor, states_BMD: Tensor) -> Tensor:
        """Project image tokens and web-text states to the decoder's width and join them, [B, N + M, D]."""
        return torch.cat([self.image_proj(patches_BND), self.text_proj(states_BMD)], dim=1)

    def positions(self, ids_BT: Tensor, start: int = 0) -> Tensor:
        """Return the inputs [B, T, D] of T positions from `start` on. With "queries" only the shape of `ids` counts."""
        B, T = ids_BT.shape
        queries = self.queries[start : start + T].expand(B, T, -1)
        return queries if self.token_embed is None else queries + self.token_embed(ids_BT)

    def forward(
        self,
        patches_BND: Tensor,
        states_BMD: Tensor,
        visible_BM: Tensor | None,
        ids_BT: Tensor,
        predicts_BT: Tensor | None = None,
        count: int | None = None,
        predicted: int | None = None,
    ) -> Tensor:
        """Return hidden states [B, T, D] after the final norm, ready for `head`, of caption positions 0 … T − 1.

        `predicts_BT` marks the needed positions; they come first in each caption. None means all of them.
        `predicted` is their number. `count` is the number of tokens, prefix included, that are visible or needed.
        Without these numbers the host waits for the GPU.
        """
        prefix = self.prefix(patches_BND, states_BMD)
        (B, N), L, T = patches_BND.shape[:2], prefix.shape[1], ids_BT.shape[1]
        x = torch.cat([prefix, self.positions(ids_BT).to(prefix.dtype)], dim=1)
        computed = None
        if visible_BM is not None or predicts_BT is not None:
            computed = torch.ones(B, L + T, dtype=torch.bool, device=x.device)
            for part, slots in ((visible_BM, slice(N, L)), (predicts_BT, slice(L, None))):
                if part is not None:
                    computed[:, slots] = part
        batch = Packed.of(x.shape, computed, count, caption_mask(L, T, visible_BM, x.device))
        last = Packed.of((B, T), predicts_BT, predicted, None)
        return self.norm(last.unpack(self.blocks(batch.pack(x), [batch], last=last)))

    @torch.no_grad()
    def generate(
        self, patches_BND: Tensor, states_BMD: Tensor, visible_BM: Tensor | None, bos_id: int, eos_id: int, pad_id: int
    ) -> Tensor:
        """Generate captions [B, T] greedily, without `bos` and with `pad_id` after `eos`.

        "tokens": one token at a time, with a KV cache of the prefix and the earlier tokens.
        "queries": all positions at once, because no position's input depends on another's output.
        """
        B, last = len(patches_BND), self.config.length - 1
        device = patches_BND.device
        if self.token_embed is None:
            ids = torch.zeros(B, last, dtype=torch.long, device=device)
            tokens = self.head(self(patches_BND, states_BMD, visible_BM, ids)).argmax(-1)
            ended = (tokens == eos_id).cumsum(dim=1) - (tokens == eos_id).long() > 0
            return tokens.masked_fill(ended, pad_id)

        caches = [KVCache() for _ in self.blocks]
        prefix = self.prefix(patches_BND, states_BMD)
        seen = prefix.shape[1]
        mask = caption_mask(seen, last, visible_BM, device)
        self.blocks(prefix, mask[..., :seen, :seen], caches)
        token = torch.full((B, 1), bos_id, device=device)
        done = torch.zeros(B, dtype=torch.bool, device=device)
        out = []
        for k in range(last):
            row = mask[..., seen + k : seen + k + 1, : seen + k + 1]
            x = self.blocks(self.positions(token, k).to(prefix.dtype), row, caches)
            token = self.head(self.norm(x)).argmax(-1).masked_fill(done[:, None], pad_id)
            out.append(token)
            done |= token[:, 0] == eos_id
            if done.all():
                break
        return torch.cat(out, dim=1)
