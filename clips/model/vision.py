"""The vision tower: a plain ViT with fixed 2-D sin-cos positions (docs/method.md, "Architecture").

Shapes: B images · P patch size · N = (image_size / P)² patch tokens · D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clips.config import PositionTable, VisionConfig, check_image_size
from clips.model.layers import LAYER_NORM_EPS, Blocks, init_weights, stream_dtype


def sincos_positions(width: int, grid: int, table: PositionTable = "sincos") -> Tensor:
    """Fixed position table [1 + grid², width], float32: zeros for CLS, then row-major patches.

    The first half of the width encodes the column, the second half the row, each as sines then
    cosines of 1 / 10000^(i / n), i = 0 … width/4 - 1. "sincos": n = width/4 (MoCo v3; the same table as
    open_clip's `sin_cos_2d`). "sincos_reference": n = width/4 - 1 (big_vision, from which CLIPS and
    OpenVision have theirs).
    """
    steps = width // 4 if table == "sincos" else max(width // 4 - 1, 1)
    frequencies = 1.0 / 10_000 ** (torch.arange(width // 4, dtype=torch.float64) / steps)
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # [grid, width / 2]
    rows = axis[:, None, :].expand(grid, grid, -1)
    columns = axis[None, :, :].expand(grid, grid, -1)
    patches = torch.cat([columns, rows], dim=2).reshape(grid * grid, width)
    return torch.cat([torch.zeros(1, width, dtype=patches.dtype), patches]).float()


class VisionTower(nn.Module):
    pos_embed: Tensor
    """[1 + N, D], a buffer that `set_image_size` registers."""

    def __init__(self, config: VisionConfig, embed_dim: int) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = nn.Conv2d(
            3, config.width, config.patch_size, stride=config.patch_size, bias=config.patch_bias
        )
        self.cls_token = nn.Parameter(torch.zeros(config.width))
        self.pre_norm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS) if config.pre_norm else nn.Identity()
        self.blocks = Blocks(config.layers, config.width, config.heads, config.mlp_ratio, gelu="none")
        self.norm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.proj = nn.Linear(config.width, embed_dim, bias=False)
        init_weights(self)
        nn.init.normal_(self.patch_embed.weight, std=(3 * config.patch_size**2) ** -0.5)
        if self.patch_embed.bias is not None:
            nn.init.zeros_(self.patch_embed.bias)
        self.set_image_size(config.image_size)

    def set_image_size(self, image_size: int) -> None:
        """Recompute the fixed positions for images of `image_size` pixels; nothing learned changes."""
        check_image_size(image_size, self.config.patch_size)
        grid = image_size // self.config.patch_size
        table = sincos_positions(self.config.width, grid, self.config.pos_embed)
        self.register_buffer("pos_embed", table.to(self.cls_token.device), persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images [B, 3, S, S] → (pooled [B, D] after the final norm, tokens [B, 1 + N, D] before it, CLS first)."""
        patches_BND = self.patch_embed(images).flatten(2).transpose(1, 2)
        dtype = stream_dtype(images.device)
        cls_B1D = self.cls_token.expand(len(images), 1, -1)
        x = torch.cat([cls_B1D.to(dtype), patches_BND.to(dtype)], dim=1)
        if x.shape[1] != len(self.pos_embed):
            side = int((len(self.pos_embed) - 1) ** 0.5) * self.config.patch_size
            raise ValueError(f"images are {tuple(images.shape[2:])} , the tower is set to {side}: call set_image_size")
        tokens = self.blocks(self.pre_norm(x + self.pos_embed.to(dtype)))
        return self.norm(tokens[:, 1:].mean(dim=1)), tokens
