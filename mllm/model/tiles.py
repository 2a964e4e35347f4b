"""The tokens of a picture and their order: one square, or LLaVA-NeXT's tiles (`anyres`, `spatial_unpad`).

A picture in tiles is seen twice: whole, squeezed into one square, and cut. To be cut, it is fitted into the canvas of
`image_grid_pinpoints` that keeps most of it, and padded there. The cells of all tiles form one grid. The cells of the
padding are dropped (`unpad`), and the newline embedding ends each row. This is the order of transformers'
`LlavaNextModel.pack_image_features`; sizes are (height, width), as there.

Shapes: T squares of a picture, the whole first, then tiles by rows · N cells of a square, g × g · D width of a word.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaProcessor,
)
from transformers.image_processing_utils import select_best_resolution

Size = tuple[int, int]
"""Height and width in pixels."""
Llava = LlavaForConditionalGeneration | LlavaNextForConditionalGeneration
"""The stock classes: one square a picture, or tiles."""
LlavaProcessors = LlavaProcessor | LlavaNextProcessor
NEWLINE = -1
"""The place of the newline in `Layout.order`."""


@dataclass(frozen=True)
class Layout:
    """How many squares and tokens a picture of a size takes, and in what order."""

    square: int
    """Tokens of one square, N for tiles."""
    side: int = 0
    """Of a square, in pixels."""
    pinpoints: tuple[Size, ...] = ()
    """The canvases; without any, a picture is one square."""

    @classmethod
    def of(cls, config: Any) -> Layout:
        """Of a saved model, by its config."""
        pinpoints = getattr(config, "image_grid_pinpoints", None)
        if not pinpoints:
            return cls(config.image_seq_length)
        vision = config.vision_config
        return cls((vision.image_size // vision.patch_size) ** 2, vision.image_size, tuple(map(tuple, pinpoints)))

    @property
    def of_every(self) -> int | None:
        """The tokens that every picture takes; None with tiles, where the tokens depend on its size."""
        return None if self.pinpoints else self.square

    @property
    def most(self) -> int:
        """Tokens of the picture with the most."""
        return max([self.square, *map(self.tokens, self.pinpoints)])

    @property
    def most_squares(self) -> int:
        return max([1, *map(self.squares, self.pinpoints)])

    def __str__(self) -> str:
        """The tokens of a picture, for people."""
        return f"{self.square:,} to {self.most:,}" if self.pinpoints else f"{self.square:,}"

    def tokens(self, size: Size) -> int:
        """Tokens of a picture of `size`."""
        return len(self.order(size)) if self.pinpoints else self.square

    def squares(self, size: Size) -> int:
        """T: the squares that the encoder reads of a picture of `size`."""
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
        kept = cells[top : rows * g - top, left : columns * g - left]
        lines = np.pad(kept, ((0, 0), (0, 1)), constant_values=NEWLINE)
        return np.concatenate([np.arange(self.square), lines.ravel()])

    def arranged(self, cells: Tensor, newline: Tensor, sizes: Sequence[Size]) -> Tensor:
        """Projected cells [squares of all pictures, N, D] and the newline [D] → the tokens [tokens, D]."""
        places, first = [], 0
        for size in sizes:
            order, count = self.order(size), self.squares(size) * self.square
            places.append(np.where(order == NEWLINE, cells.shape[0] * cells.shape[1], first + order))
            first += count
        if first != cells.shape[0] * cells.shape[1]:
            raise ValueError(f"{len(cells)} squares, but pictures of the sizes {list(sizes)}")
        rows = torch.cat([cells.flatten(0, 1), newline.to(cells.dtype)[None]])
        return rows.index_select(0, torch.from_numpy(np.concatenate(places)).to(cells.device))


def newline_of(model: Llava) -> nn.Parameter | None:
    """The newline embedding [D] of a model with tiles."""
    return getattr(model.model, "image_newline", None)


def _padding(grid: Size, size: Size) -> tuple[int, int]:
    """Rows above and below, and columns at both sides, that hold padding of a picture of `size` on `grid` cells.

    Rounded as transformers rounds. LLaVA-NeXT's own code cuts off where a product falls just below a whole number.
    """
    (height, width), (rows, columns) = size, grid
    if width / height > columns / rows:
        return (rows - int(round(height * (columns / width), 7))) // 2, 0
    return 0, (columns - int(round(width * (rows / height), 7))) // 2
