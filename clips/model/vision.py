"""The vision tower: a plain ViT, by default that of CLIPS (docs/method.md, "Architecture").

Shapes: B images · S side of the square · P patch size · N = (S / P)² patch tokens · K of them kept · C = 1 with a CLS
token, else 0 · D width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clips.config import PositionTable, VisionConfig, check_image_size
from clips.model.layers import Blocks, init_weights, stream_dtype, taken


def sincos_positions(width: int, grid: int, table: PositionTable = "sincos") -> Tensor:
    """Return the fixed positions [1 + patches, width], float32: zeros for CLS, then `grid` × `grid` patches by row.

    The first half of the width encodes the column, the second half the row, each as sines then
    cosines of 1 / 10000^(i / n), i = 0 … width/4 - 1. "sincos": n = width/4 (MoCo v3; the same table as
    open_clip's `sin_cos_2d`). "sincos_reference": n = width/4 - 1 (big_vision, from which CLIPS and
    OpenVision took theirs).
    """
    steps = width // 4 if table == "sincos" else max(width // 4 - 1, 1)
    frequencies = 1.0 / 10_000 ** (torch.arange(width // 4, dtype=torch.float64) / steps)
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # [grid, width / 2]
    of_columns = axis[None, :].expand(grid, grid, -1)
    of_rows = axis[:, None].expand(grid, grid, -1)
    patches = torch.cat([of_columns, of_rows], dim=2).reshape(grid**2, width)
    return torch.cat([torch.zeros(1, width, dtype=patches.dtype), patches]).float()


def resample_positions(table: Tensor, grid: int, prefix_tokens: int) -> Tensor:
    """Resample a learned table [C + N0, D] to `grid` × `grid` patches, [C + N, D]; the row of CLS stays as it is.

    The filter is bicubic with antialiasing, as in open_clip and timm. A table of that size is returned unchanged.
    """
    cls, patches = table[:prefix_tokens], table[prefix_tokens:]
    side = math.isqrt(len(patches))
    if side == grid:
        return table
    square = patches.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    resampled = F.interpolate(square, size=(grid, grid), mode="bicubic", antialias=True)
    return torch.cat([cls, resampled.permute(0, 2, 3, 1).reshape(grid**2, -1).to(cls.dtype)])


class VisionTower(nn.Module):
    """The image tower, a ViT; `forward` returns a pooled vector and all tokens."""

    image_size: int
    """Side of the square input images in pixels; `set_image_size` changes it."""
    pos_embed: Tensor
    """Fixed positions: a buffer [C + N, D] that `set_image_size` registers. Learned ones: a parameter [C + N0, D] that
    keeps the configured size and is resampled in the forward pass if images have another size."""

    def __init__(self, config: VisionConfig, embed_dim: int) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.patch_embed = nn.Conv2d(3, width, config.patch_size, stride=config.patch_size, bias=config.patch_bias)
        self.cls_token = nn.Parameter(torch.zeros(width)) if config.cls else None
        self.pre_norm = nn.LayerNorm(width, eps=config.norm_eps) if config.pre_norm else nn.Identity()
        self.blocks = Blocks(config.layers, width, config.heads, config.mlp_ratio, config.activation, config.norm_eps)
        self.norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.proj = nn.Linear(width, embed_dim, bias=False) if embed_dim else nn.Identity()
        init_weights(self)
        nn.init.normal_(self.patch_embed.weight, std=(3 * config.patch_size**2) ** -0.5)
        if self.patch_embed.bias is not None:
            nn.init.zeros_(self.patch_embed.bias)
        if config.pos_embed == "learned":
            self.pos_embed = nn.Parameter(torch.empty(config.prefix_tokens + config.tokens(), width))
            nn.init.normal_(self.pos_embed, std=0.02)
        self.set_image_size(config.image_size)

    @property
    def grid(self) -> int:
        """Patches along a side of an image."""
        return self.image_size // self.config.patch_size

    def set_image_size(self, image_size: int) -> None:
        """Take images of `image_size` pixels from now on; nothing learned changes, fixed positions are recomputed."""
        check_image_size(image_size, self.config.patch_size)
        self.image_size = image_size
        if self.config.pos_embed != "learned":
            table = sincos_positions(self.config.width, self.grid, self.config.pos_embed)
            table = table[1 - self.config.prefix_tokens :].to(self.patch_embed.weight.device)
            self.register_buffer("pos_embed", table, persistent=False)

    def positions(self) -> Tensor:
        """Return the positions [C + N, D] for the current image size."""
        if self.config.pos_embed != "learned":
            return self.pos_embed
        return resample_positions(self.pos_embed, self.grid, self.config.prefix_tokens)

    def forward(self, images: Tensor, kept_BK: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (pooled [B, D] after the final norm, tokens [B, C + N, D] before it, CLS first) of the images.

        `images` are [B, 3, S, S], with the side `image_size`, else ValueError is raised. `kept_BK` are the indices of
        the patches that are seen; N is then replaced by K.
        """
        if images.shape[2:] != (self.image_size, self.image_size):
            raise ValueError(f"images are {tuple(images.shape[2:])}, not {self.image_size} px: call set_image_size")
        dtype, C = stream_dtype(images.device), self.config.prefix_tokens
        positions = self.positions().to(dtype)
        x = self.patch_embed(images).flatten(2).transpose(1, 2).to(dtype) + positions[C:]
        if kept_BK is not None:
            x = taken(x, kept_BK)
        if self.cls_token is not None:
            x = torch.cat([(self.cls_token.to(dtype) + positions[0]).expand(len(images), 1, -1), x], dim=1)
        tokens = self.blocks(self.pre_norm(x))
        pooled = tokens[:, 0] if self.config.pool == "cls" else self.patches(tokens).mean(dim=1)
        return self.norm(pooled), tokens

    def patches(self, tokens: Tensor) -> Tensor:
        """Return the patch tokens [B, N, D] of all `tokens` [B, C + N, D]."""
        return tokens[:, self.config.prefix_tokens :]
