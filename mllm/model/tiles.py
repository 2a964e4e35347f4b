"""Number and order of the tokens of images and videos: one square, LLaVA-NeXT's tiles, or LLaVA-OneVision's frames.

With tiles the model sees an image twice: resized to one square, and cut into tiles. For the tiles it is fitted into
the grid of `image_grid_pinpoints` that keeps most of its resolution, and padded. The tokens of all tiles form one
grid. The tokens of the padding are dropped (`unpad`), and the newline embedding ends each row. This is the order of
transformers' `LlavaNextModel.pack_image_features`, and sizes are (height, width) as they are there.

A video is F frames of one square each, and the constant VIDEO takes the place of its size. The tokens of each frame are
pooled 2 × 2, and the newline embedding ends the video, as in transformers' `LlavaOnevisionModel.get_video_features`.

Shapes: T crops of an image, the resized image first, then the tiles by rows · F frames of a video · N = g × g tokens
of a crop · n pooled tokens of a frame · D width of a word embedding.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    FastVlmForConditionalGeneration,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
    LlavaProcessor,
)
from transformers.image_processing_utils import select_best_resolution

from clips.common.errors import UserError
from mllm.data.video import NO_VIDEOS, VIDEO, Size, VideoTokens

Llava = (
    LlavaForConditionalGeneration
    | FastVlmForConditionalGeneration
    | LlavaNextForConditionalGeneration
    | LlavaOnevisionForConditionalGeneration
)
"""The stock classes, in order: one square per image, the same for feature maps, tiles, and tiles and videos."""
LlavaProcessors = LlavaProcessor | LlavaNextProcessor | LlavaOnevisionProcessor
NEWLINE = -1
"""Stands for the newline in `TokenLayout.order`."""
MOST_TILES_WITH_VIDEO = 9
"""With more tiles than this, LLaVA-OneVision shrinks the grid of tokens (`anyres_max_9`)."""


@dataclass(frozen=True)
class TokenLayout:
    """How many crops and tokens an image of a given size takes, and in what order."""

    tokens_per_crop: int
    """Tokens of one crop; N with tiles."""
    side: int = 0
    """Side of a crop in pixels."""
    pinpoints: tuple[Size, ...] = ()
    """The grids. If there are none, an image is one square."""
    frames: int = 0
    """F, or 0 if the model takes no videos."""

    @classmethod
    def of(cls, config: Any) -> TokenLayout:
        """Return the layout of a model with this config. Raises UserError for more tiles than LLaVA-OneVision takes."""
        pinpoints = getattr(config, "image_grid_pinpoints", None)
        if not pinpoints:
            return cls(config.image_seq_length)
        vision, frames = config.vision_config, getattr(config, "num_frames", 0)
        most = max(height * width for height, width in pinpoints) // vision.image_size**2
        if config.model_type == "llava_onevision" and most > MOST_TILES_WITH_VIDEO:
            raise UserError(f"LLaVA-OneVision takes {MOST_TILES_WITH_VIDEO} tiles, --image_grid_pinpoints has {most}")
        tokens = (vision.image_size // vision.patch_size) ** 2
        return cls(tokens, vision.image_size, tuple(map(tuple, pinpoints)), frames)

    @property
    def of_every(self) -> int | None:
        """The number of tokens of every image, or None with tiles, because then it depends on the image's size."""
        return None if self.pinpoints else self.tokens_per_crop

    @property
    def sizes(self) -> tuple[Size, ...]:
        """One image size for each grid, and VIDEO if the model takes videos."""
        return (*self.pinpoints, VIDEO) if self.frames else self.pinpoints

    @property
    def most(self) -> int:
        """The largest number of tokens that an image or video can take."""
        return max([self.tokens_per_crop, *map(self.tokens, self.sizes)])

    @property
    def most_crops(self) -> int:
        """Largest number of crops that an image is split into."""
        return max([1, *map(self.crops, self.sizes)])

    def __str__(self) -> str:
        """Return the number of tokens of an image as a text for people."""
        if not self.pinpoints:
            return f"{self.tokens_per_crop:,}"
        video = f", {self.tokens(VIDEO):,} for a video," if self.frames else ""
        return f"{self.tokens_per_crop:,} to {max(map(self.tokens, self.pinpoints)):,}{video}"

    def tokens(self, size: Size) -> int:
        """Return the number of tokens of an image of `size`, or of a video. Raises UserError if it takes no videos."""
        if size == VIDEO:
            if not self.frames:
                raise UserError(NO_VIDEOS)
            return VideoTokens(self.frames * math.ceil(math.isqrt(self.tokens_per_crop) / 2) ** 2 + 1)
        return len(self.order(size)) if self.pinpoints else self.tokens_per_crop

    def crops(self, size: Size) -> int:
        """Return T or F: how many crops the encoder reads for an image of `size` or for a video."""
        if size == VIDEO:
            return self.frames
        return 1 + math.prod(self._tiles(size)) if self.pinpoints else 1

    def _tiles(self, size: Size) -> tuple[int, int]:
        """Return the rows and columns of tiles."""
        height, width = select_best_resolution(size, list(self.pinpoints))
        return height // self.side, width // self.side

    @functools.lru_cache(maxsize=1024)  # noqa: B019 - layouts are few and frozen
    def order(self, size: Size) -> np.ndarray:
        """Return int64 [tokens]: the index of each token in the image's tokens [T · N], or NEWLINE."""
        rows, columns = self._tiles(size)
        g = math.isqrt(self.tokens_per_crop)
        tiles = np.arange(self.tokens_per_crop, (1 + rows * columns) * self.tokens_per_crop).reshape(
            rows, columns, g, g
        )
        tokens = tiles.transpose(0, 2, 1, 3).reshape(rows * g, columns * g)
        top, left = _padding((rows * g, columns * g), size)
        unpadded = tokens[top : rows * g - top, left : columns * g - left]
        lines = np.pad(unpadded, ((0, 0), (0, 1)), constant_values=NEWLINE)
        return np.concatenate([np.arange(self.tokens_per_crop), lines.ravel()])

    def arranged(self, tokens: Tensor, newline: Tensor, sizes: Sequence[Size]) -> Tensor:
        """Order projected tokens [crops of all images and videos, N, D] and the newline [D] as tokens [tokens, D].

        `sizes` are those of the images and videos, in order. Raises ValueError if they have another number of crops.
        """
        end = tokens.shape[0] * tokens.shape[1]
        indices, pooled, first, last = [], [], 0, end + 1
        for size in sizes:
            count = self.crops(size)
            if size == VIDEO:
                pooled.append(pool_tokens(tokens[first : first + count]).flatten(0, 1))
                indices.append(np.append(np.arange(last, last + len(pooled[-1])), end))
                last += len(pooled[-1])
            else:
                order = self.order(size)
                indices.append(np.where(order == NEWLINE, end, first * self.tokens_per_crop + order))
            first += count
        if first != len(tokens):
            raise ValueError(f"{len(tokens)} crops, but images of the sizes {list(sizes)}")
        rows = torch.cat([tokens.flatten(0, 1), newline.to(tokens.dtype)[None], *pooled])
        index = torch.from_numpy(np.concatenate(indices))
        index = index.pin_memory() if tokens.is_cuda else index  # without pinning the host would wait for the GPU
        return rows.index_select(0, index.to(tokens.device, non_blocking=True))


def pool_tokens(tokens: Tensor) -> Tensor:
    """Resize the tokens [F, N, D] of frames bilinearly to half the resolution, [F, n, D], as LLaVA's `get_2dPool`."""
    g = math.isqrt(tokens.shape[1])
    grid = tokens.unflatten(1, (g, g)).permute(0, 3, 1, 2)
    return F.interpolate(grid, size=[math.ceil(g / 2)] * 2, mode="bilinear").flatten(2).transpose(1, 2)


def placeholder_ids(config: Any) -> tuple[int, ...]:
    """Return the ids of `<image>` and, in a model that takes videos, of `<video>`."""
    video = getattr(config, "video_token_id", None)
    return (config.image_token_id,) if video is None else (config.image_token_id, video)


def llava_of(model: nn.Module) -> Llava:
    """Return the LLaVA model in `model`, which is that model itself or wraps it (as a PeftModel does)."""
    return next(module for module in model.modules() if isinstance(module, Llava))


def newline_of(model: Llava) -> nn.Parameter | None:
    """Return the newline embedding [D] of a model with tiles, or None if the model has none."""
    return getattr(model.model, "image_newline", None)


def _padding(grid: Size, size: Size) -> tuple[int, int]:
    """Return how many rows above and below, and columns left and right, of a `grid` of tokens are padding.

    The numbers are rounded as in transformers. LLaVA-NeXT's code truncates products just below a whole number.
    """
    (height, width), (rows, columns) = size, grid
    if width / height > columns / rows:
        return (rows - int(round(height * (columns / width), 7))) // 2, 0
    return 0, (columns - int(round(width * (rows / height), 7))) // 2
