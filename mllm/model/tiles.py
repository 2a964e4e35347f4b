"""The tokens of pictures and videos and their order: one square, LLaVA-NeXT's tiles, LLaVA-OneVision's frames.

A picture in tiles is seen twice: whole, squeezed into one square, and cut. To be cut, it is fitted into the canvas of
`image_grid_pinpoints` that keeps most of it, and padded there. The cells of all tiles form one grid. The cells of the
padding are dropped (`unpad`), and the newline embedding ends each row. This is the order of transformers'
`LlavaNextModel.pack_image_features`; sizes are (height, width), as there.

A video is F frames, each in one square, and VIDEO stands for its size. The cells of each frame are pooled 2 × 2, and
the newline embedding ends the video: transformers' `LlavaOnevisionModel.get_video_features`.

Shapes: T squares of a picture, the whole first, then tiles by rows · F frames of a video · N cells of a square, g × g ·
n pooled cells of a frame · D width of a word.
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
"""The stock classes: one square a picture, tiles, or tiles and videos."""
LlavaProcessors = LlavaProcessor | LlavaNextProcessor | LlavaOnevisionProcessor
NEWLINE = -1
"""The place of the newline in `Layout.order`."""
MOST_TILES_WITH_VIDEO = 9
"""LLaVA-OneVision shrinks the cells of more tiles (`anyres_max_9`)."""


@dataclass(frozen=True)
class Layout:
    """How many squares and tokens a picture of a size takes, and in what order."""

    square: int
    """Tokens of one square, N for tiles."""
    side: int = 0
    """Of a square, in pixels."""
    pinpoints: tuple[Size, ...] = ()
    """The canvases; without any, a picture is one square."""
    frames: int = 0
    """F; 0: the model takes no videos."""

    @classmethod
    def of(cls, config: Any) -> Layout:
        """Of a saved model, by its config."""
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
        """The tokens that every picture takes; None with tiles, where the tokens depend on its size."""
        return None if self.pinpoints else self.square

    @property
    def sizes(self) -> tuple[Size, ...]:
        """Of a picture for each canvas, and of a video if the model takes videos."""
        return (*self.pinpoints, VIDEO) if self.frames else self.pinpoints

    @property
    def most(self) -> int:
        """Tokens of the picture or video with the most."""
        return max([self.square, *map(self.tokens, self.sizes)])

    @property
    def most_squares(self) -> int:
        return max([1, *map(self.squares, self.sizes)])

    def __str__(self) -> str:
        """The tokens of a picture, for people."""
        if not self.pinpoints:
            return f"{self.square:,}"
        video = f", {self.tokens(VIDEO):,} for a video," if self.frames else ""
        return f"{self.square:,} to {max(map(self.tokens, self.pinpoints)):,}{video}"

    def tokens(self, size: Size) -> int:
        """Tokens of a picture of `size`, or of a video. Raises UserError if the model takes no videos."""
        if size == VIDEO:
            if not self.frames:
                raise UserError(NO_VIDEOS)
            return VideoTokens(self.frames * math.ceil(math.isqrt(self.square) / 2) ** 2 + 1)
        return len(self.order(size)) if self.pinpoints else self.square

    def squares(self, size: Size) -> int:
        """T or F: the squares that the encoder reads of a picture of `size` or of a video."""
        if size == VIDEO:
            return self.frames
        return 1 + math.prod(self._tiles(size)) if self.pinpoints else 1

    def _tiles(self, size: Size) -> tuple[int, int]:
        """Rows and columns of tiles."""
        height, width = select_best_resolution(size, list(self.pinpoints))
        return height // self.side, width // self.side

    @functools.lru_cache(maxsize=1024)  # noqa: B019 - layouts are few and frozen
    def order(self, size: Size) -> np.ndarray:
        """int64 [tokens]: the place of each token in the picture's cells [T · N], or NEWLINE."""
        rows, columns = self._tiles(size)
        g = math.isqrt(self.square)
        tiles = np.arange(self.square, (1 + rows * columns) * self.square).reshape(rows, columns, g, g)
        cells = tiles.transpose(0, 2, 1, 3).reshape(rows * g, columns * g)
        top, left = _padding((rows * g, columns * g), size)
        unpadded = cells[top : rows * g - top, left : columns * g - left]
        lines = np.pad(unpadded, ((0, 0), (0, 1)), constant_values=NEWLINE)
        return np.concatenate([np.arange(self.square), lines.ravel()])

    def arranged(self, cells: Tensor, newline: Tensor, sizes: Sequence[Size]) -> Tensor:
        """Projected cells [squares of all pictures and videos, N, D] and the newline [D] → the tokens [tokens, D]."""
        end = cells.shape[0] * cells.shape[1]
        places, pooled, first, last = [], [], 0, end + 1
        for size in sizes:
            count = self.squares(size)
            if size == VIDEO:
                pooled.append(pooled_cells(cells[first : first + count]).flatten(0, 1))
                places.append(np.append(np.arange(last, last + len(pooled[-1])), end))
                last += len(pooled[-1])
            else:
                order = self.order(size)
                places.append(np.where(order == NEWLINE, end, first * self.square + order))
            first += count
        if first != len(cells):
            raise ValueError(f"{len(cells)} squares, but pictures of the sizes {list(sizes)}")
        rows = torch.cat([cells.flatten(0, 1), newline.to(cells.dtype)[None], *pooled])
        index = torch.from_numpy(np.concatenate(places))
        index = index.pin_memory() if cells.is_cuda else index  # from other memory the host would wait for the GPU
        return rows.index_select(0, index.to(cells.device, non_blocking=True))


def pooled_cells(cells: Tensor) -> Tensor:
    """The cells [F, N, D] of frames → [F, n, D], bilinear at half the resolution, as LLaVA-OneVision's `get_2dPool`."""
    g = math.isqrt(cells.shape[1])
    grid = cells.unflatten(1, (g, g)).permute(0, 3, 1, 2)
    return F.interpolate(grid, size=[math.ceil(g / 2)] * 2, mode="bilinear").flatten(2).transpose(1, 2)


def placeholder_ids(config: Any) -> tuple[int, ...]:
    """The ids of `<image>`, and of `<video>` in a model that takes videos."""
    video = getattr(config, "video_token_id", None)
    return (config.image_token_id,) if video is None else (config.image_token_id, video)


def newline_of(model: Llava) -> nn.Parameter | None:
    """The newline embedding [D] of a model with tiles or videos."""
    return getattr(model.model, "image_newline", None)


def _padding(grid: Size, size: Size) -> tuple[int, int]:
    """Rows above and below, and columns at both sides, that hold padding of a picture of `size` on `grid` cells.

    Rounded as transformers rounds. LLaVA-NeXT's own code cuts off where a product falls just below a whole number.
    """
    (height, width), (rows, columns) = size, grid
    if width / height > columns / rows:
        return (rows - int(round(height * (columns / width), 7))) // 2, 0
    return 0, (columns - int(round(width * (rows / height), 7))) // 2
