"""The names of vision encoders, which mllm/encoders/load.py loads. The code that uses them is the same for all.

    clips[:DIR|ID]  the newest CLIPS export under runs/, or the given run, export, model directory or hub id
    clip[:DIR|ID]   the newest or the given CLIP baseline that was trained here
    random[:DIR]    the architecture of a CLIPS export with random weights (seeded)
    blind[:DIR]     like random, but every image gives the same tokens, so there is no image information
    open_clip:MODEL[/PRETRAINED]   or open_clip:local-dir:DIR, open_clip:hf-hub:ID
    hf:ID|DIR       CLIP, SigLIP, ViT and DINOv2 of transformers; "hf:" can be left out before owner/name or DIR
    timm:NAME       plain vit_* models and towers with a feature map (EfficientNet, ConvNeXt, FastViT, ResNet, …);
                    or timm:local-dir:DIR, timm:hf-hub:ID, timm:NAME:FILE with weights from FILE; @SIZE behind any of
                    them sets the image size in pixels

Every encoder is a stock transformers model that a stock LLaVA or FastVLM model can hold. Others are refused before any
training. Nothing here imports torch.

Shapes: B images · N image tokens · W width of a token.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clips.common.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

ARGUMENTS: dict[str, str | None] = {
    "clips": None,
    "clip": None,
    "random": None,
    "blind": None,
    "open_clip": "MODEL/PRETRAINED",
    "hf": "ID_OR_DIR",
    "timm": "NAME",
}
"""The argument that each kind of encoder needs, or None if it is optional. `mllm.encoders.load.LOADERS` loads them."""
GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
"""LLaVA-NeXT's grids for tiles, (width, height) in tiles."""
MOST_TILES, MOST_GRIDS = 36, 64
"""Most tiles in one grid (LLaVA-OneVision has 36), and most grids."""


def parse_vision_name(name: str) -> tuple[str, str]:
    """Split an encoder's name into (kind, argument). Raises UserError for an unknown kind or a missing argument.

    A hub id or a directory without a kind, as in LLaVA's commands, is of kind `hf`.
    """
    key, colon, argument = name.partition(":")
    if key not in ARGUMENTS and not colon and "/" in name:
        if (Path(name) / "export").is_dir():
            raise UserError(f"vision encoder {name} is a run of this project: clips:{name}, or clip:{name}")
        key, argument = "hf", name
    if key not in ARGUMENTS:
        known = ", ".join(ARGUMENTS)
        raise UserError(f"vision encoder {name!r} is not known; known are: {known}, and owner/name as hf:owner/name")
    if ARGUMENTS[key] and not argument:
        raise UserError(f"vision encoder {key} needs an argument: {key}:{ARGUMENTS[key]}")
    return key, argument


def image_pixels(processor: Any, image: Any) -> Tensor:
    """Return the crops [T, 3, S, S] of one image. A `partial` of this function can be pickled for data workers.

    T is 1, or with tiles (mllm/model/tiles.py) their number plus one. If `image` is a list, it holds the frames of a
    video, and each becomes one crop, as in transformers' video processor.
    """
    if isinstance(image, list):
        square = [[processor.size["height"], processor.size["width"]]]
        return processor(images=image, image_grid_pinpoints=square, return_tensors="pt")["pixel_values"][:, 0]
    pixels = processor(images=image, return_tensors="pt")["pixel_values"]
    return pixels[0] if pixels.ndim == 5 else pixels


def grid_pinpoints(text: str | None, side: int) -> list[list[int]]:
    """Parse LLaVA-NeXT's `--image_grid_pinpoints` into transformers' form: (height, width) of each grid in pixels.

    `text` is a list of (width, height) in pixels, a range of tiles such as "(1x1),...,(2x3)", or None for GRIDS.
    `side` is the side of a tile in pixels. Raises UserError if a grid does not consist of 1 to MOST_TILES tiles.
    """
    grids: Sequence[tuple[int, int]] = GRIDS
    if text is not None:
        unit = 1 if "x" in text else side  # a range counts tiles, and a list pixels
        numbers = [int(number) for number in re.findall(r"\d+", text)]
        is_whole = len(numbers) % 2 == 0 and not any(number % unit for number in numbers)
        grids = list(zip(numbers[::2], numbers[1::2], strict=True)) if is_whole else []
        grids = [(width // unit, height // unit) for width, height in grids]
        if "x" in text and grids:
            (width, height), (last_width, last_height) = grids[0], grids[-1]
            widths, heights = range(width, last_width + 1), range(height, last_height + 1)
            grids = list(itertools.product(widths[:MOST_GRIDS], heights[:MOST_GRIDS]))
    if not 0 < len(grids) <= MOST_GRIDS or not all(0 < w * h <= MOST_TILES for w, h in grids):
        form = f"[(width, height), …] in multiples of {side} pixels, of at most {MOST_TILES} tiles"
        raise UserError(f"--image_grid_pinpoints {text!r} must be {form}, or a range (1x1),...,(2x2)")
    return [[side * height, side * width] for width, height in grids]
