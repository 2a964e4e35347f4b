"""Number and order of the tokens of images and videos: one square, LLaVA-NeXT's tiles, or LLaVA-OneVision's frames.

With tiles the model sees an image twice: resized to one square, and cut into tiles. For the tiles it is fitted into
the canvas of `image_grid_pinpoints` that keeps most of its resolution, and padded. The cells of all tiles form one
grid. The cells of the padding are dropped (`unpad`), and the newline embedding ends each row. This is the order of
transformers' `LlavaNextModel.pack_image_features`, and sizes are (height, width) as they are there.

A video is F frames of one square each, and the constant VIDEO takes the place of its size. The cells of each frame are
pooled 2 × 2, and the newline embedding ends the video, as in transformers' `LlavaOnevisionModel.get_video_features`.

Shapes: T squares of an image, the resized image first, then the tiles by rows · F frames of a video · N = g × g cells
of a square · n pooled cells of a frame · D width of a word embedding.
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

Llava = LlavaForConditionalGeneration | LlavaNextForConditionalGeneration | LlavaOnevisionForConditionalGeneration
"""The stock classes, in order: for one square per image, for tiles, and for tiles and videos."""
LlavaProcessors = LlavaProcessor | LlavaNextProcessor | LlavaOnevisionProcessor
NEWLINE = -1
"""Stands for the newline in `Layout.order`."""
MOST_TILES_WITH_VIDEO = 9
"""With more tiles than this, LLaVA-OneVision shrinks the grid of cells (`anyres_max_9`)."""


@dataclass(frozen=True)
class Layout:
    """How many squares and tokens an image of a given size takes, and in what order."""

    square: int
    """Tokens of one square; N with tiles."""
    side: int = 0
    """Side of a square in pixels."""
    pinpoints: tuple[Size, ...] = ()
    """The canvases. If there are none, an image is one square."""
    frames: int = 0
    """F, or 0 if the model takes no videos."""

    @classmethod
    def of(cls, config: Any) -> Layout:
        """Return the layout of a model with this config. Raises UserError for more tiles than LLaVA-OneVision takes."""
        pinpoints = getattr(config, "image_grid_pinpoints", None)
        if not pinpoints:
            return cls(config.image_seq_length)
        vision, frames = config.vision_config, getattr(config, "num_frames", 0)
        most = max(height * width for height, width in pinpoints) // vision.image_size**2
        if config.model_type == "llava_onevision" and most > MOST_TILES_WITH_VIDEO:
            raise UserError(f"LLaVA-OneVision takes {MOST_TILES_WITH_VIDEO} tiles, --image_grid_pinpoints has {most}")
        cells = (vision.image_size // vision.patch_size) ** 2
        return cls(cells, vision.image_size, tuple(map(tuple, pinpoints)), frames)

    @property
    def of_every(self) -> int | None:
        """The number of tokens of every image, or None with tiles, because then it depends on the image's size."""
        return None if self.pinpoints else self.square

    @property
    def sizes(self) -> tuple[Size, ...]:
        """One image size for each canvas, and VIDEO if the model takes videos."""
        return (*self.pinpoints, VIDEO) if self.frames else self.pinpoints

    @property
    def most(self) -> int:
        """The largest number of tokens that an image or video can take."""
        return max([self.square, *map(self.tokens, self.sizes)])

    @property
    def most_squares(self) -> int:
        """Largest number of squares that an image is split into."""
        return max([1, *map(self.squares, self.sizes)])

    def __str__(self) -> str:
        """Return the number of tokens of an image as a text for people."""
        if not self.pinpoints:
            return f"{self.square:,}"
        video = f", {self.tokens(VIDEO):,} for a video," if self.frames else ""
        return f"{self.square:,} to {max(map(self.tokens, self.pinpoints)):,}{video}"

    def tokens(self, size: Size) -> int:
        """Return the number of tokens of an image of `size`, or of a video. Raises UserError if it takes no videos."""
        if size == VIDEO:
            if not self.frames:
                raise UserError(NO_VIDEOS)
            return VideoTokens(self.frames * math.ceil(math.isqrt(self.square) / 2) ** 2 + 1)
        return len(self.order(size)) if self.pinpoints else self.square

    def squares(self, size: Size) -> int:
        """Return T or F: how many squares the encoder reads for an image of `size` or for a video."""
        if size == VIDEO:
            return self.frames
        return 1 + math.prod(self._tiles(size)) if self.pinpoints else 1

    def _tiles(self, size: Size) -> tuple[int, int]:
        """Return the rows and columns of tiles."""
        height, width = select_best_resolution(size, list(self.pinpoints))
        return height // self.side, width // self.side

    @functools.lru_cache(maxsize=1024)  # noqa: B019 - layouts are few and frozen
    def order(self, size: Size) -> np.ndarray:
        """Return int64 [tokens]: the index of each token in the image's cells [T · N], or NEWLINE."""
        rows, columns = self._tiles(size)
        g = math.isqrt(self.square)
        tiles = np.arange(self.square, (1 + rows * columns) * self.square).reshape(rows, columns, g, g)
        cells = tiles.transpose(0, 2, 1, 3).reshape(rows * g, columns * g)
        top, left = _padding((rows * g, columns * g), size)
        unpadded = cells[top : rows * g - top, left : columns * g - left]
        lines = np.pad(unpadded, ((0, 0), (0, 1)), constant_values=NEWLINE)
        return np.concatenate([np.arange(self.square), lines.ravel()])

    def arranged(self, cells: Tensor, newline: Tensor, sizes: Sequence[Size]) -> Tensor:
        """Order projected cells [squares of all images and videos, N, D] and the newline [D] as tokens [tokens, D]."""
        end = cells.shape[0] * cells.shape[1]
        indices, pooled, first, last = [], [], 0, end + 1
        for size in sizes:
            count = self.squares(size)
            if size == VIDEO:
                pooled.append(pooled_cells(cells[first : first + count]).flatten(0, 1))
                indices.append(np.append(np.arange(last, last + len(pooled[-1])), end))
                last += len(pooled[-1])
            else:
                order = self.order(size)
                indices.append(np.where(order == NEWLINE, end, first * self.square + order))
            first += count
        if first != len(cells):
            raise ValueError(f"{len(cells)} squares, but images of the sizes {list(sizes)}")
        rows = torch.cat([cells.flatten(0, 1), newline.to(cells.dtype)[None], *pooled])
        index = torch.from_numpy(np.concatenate(indices))
        index = index.pin_memory() if cells.is_cuda else index  # without pinning the host would wait for the GPU
        return rows.index_select(0, index.to(cells.device, non_blocking=True))


def pooled_cells(cells: Tensor) -> Tensor:
    """Resize the cells [F, N, D] of frames bilinearly to half the resolution, [F, n, D], as LLaVA's `get_2dPool`."""
    g = math.isqrt(cells.shape[1])
    grid = cells.unflatten(1, (g, g)).permute(0, 3, 1, 2)
    return F.interpolate(grid, size=[math.ceil(g / 2)] * 2, mode="bilinear").flatten(2).transpose(1, 2)


def placeholder_ids(config: Any) -> tuple[int, ...]:
    """Return the ids of `<image>` and, in a model that takes videos, of `<video>`."""
    video = getattr(config, "video_token_id", None)
    return (config.image_token_id,) if video is None else (config.image_token_id, video)


def newline_of(model: Llava) -> nn.Parameter | None:
    """Return the newline embedding [D] of a model with tiles, or None if the model has none."""
    return getattr(model.model, "image_newline", None)


def _padding(grid: Size, size: Size) -> tuple[int, int]:
    """Return how many rows above and below, and columns left and right, of the `grid` of cells are padding of an image.

    The numbers are rounded as in transformers. LLaVA-NeXT's code truncates products just below a whole number.
    """
    (height, width), (rows, columns) = size, grid
    if width / height > columns / rows:
        return (rows - int(round(height * (columns / width), 7))) // 2, 0
    return 0, (columns - int(round(width * (rows / height), 7))) // 2
