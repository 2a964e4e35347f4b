"""Load the vision encoder of a LLaVA-style model by name. The code that uses it is the same for all encoders.

    clips[:DIR|ID]  the newest CLIPS export under runs/, or the given run, export, model directory or hub id
    clip[:DIR|ID]   the newest or the given CLIP baseline that was trained here
    random[:DIR]    the architecture of a CLIPS export with random weights (seeded)
    blind[:DIR]     like random, but every image gives the same tokens, so there is no image information
    open_clip:MODEL[/PRETRAINED]   or open_clip:local-dir:DIR, open_clip:hf-hub:ID
    hf:ID|DIR       CLIP, SigLIP, ViT and DINOv2 of transformers; "hf:" can be left out before owner/name or DIR
    timm:NAME       plain vit_* models, or timm:local-dir:DIR

Every encoder is a stock transformers model that a stock `LlavaForConditionalGeneration` can hold. Others are refused
here, before any training. Names are parsed without importing torch.

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

    from mllm.encoders.encoder import AspectRatio, SelectFeature, VisionEncoder

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


def load_vision(
    name: str,
    *,
    select_layer: int | list[int] = -2,
    select_feature: SelectFeature = "default",
    image_aspect_ratio: AspectRatio = "square",
    image_grid_pinpoints: str | None = None,
    frames: int = 0,
    seed: int = 0,
    runs: Path | str = "runs",
) -> VisionEncoder:
    """Load the encoder `name` (see the top of this file) in fp32 and eval mode, without gradients.

    `image_aspect_ratio` "square" is the encoder's own preprocessing; "pad" first pads the image to a square with the
    mean colour (LLaVA-1.5); "anyres" gives the resized image and the tiles of `image_grid_pinpoints` (LLaVA-NeXT),
    which are not cropped even if the encoder crops images. If `frames`, the number of frames of a video, is not 0,
    anyres preprocesses as LLaVA-OneVision does. `seed` is for `random` and `blind`. Raises UserError if it fails.
    """
    from transformers import LlavaImageProcessor, LlavaNextImageProcessor, LlavaOnevisionImageProcessor

    from clips.common.opening import opening
    from mllm.data.video import MOST_DRAWN
    from mllm.encoders.encoder import VisionEncoder, check_tokens, prefix_tokens
    from mllm.encoders.load import LOADERS

    key, argument = parse_vision_name(name)
    if frames and (image_aspect_ratio != "anyres" or not 0 < frames <= MOST_DRAWN):
        raise UserError(f"--frames_upbound {frames} must be 0 to {MOST_DRAWN}, with --image_aspect_ratio anyres")
    with opening("vision encoder", argument or key):
        model, processor, source = LOADERS[key](argument, Path(runs), seed)
        settings = {k: v for k, v in processor.to_dict().items() if k != "image_processor_type"}
        if image_aspect_ratio == "pad":
            processor = LlavaImageProcessor(**settings, do_pad=True)
        elif image_aspect_ratio == "anyres":
            square = dict(processor.crop_size or {})
            pinpoints = grid_pinpoints(image_grid_pinpoints, square["height"])
            whole = {"size": square, "crop_size": square, "do_center_crop": False}
            kind = LlavaOnevisionImageProcessor if frames else LlavaNextImageProcessor
            processor = kind(**settings | whole, image_grid_pinpoints=pinpoints)
        encoder = VisionEncoder(
            name=f"{key}:{argument}" if key == "hf" else name,
            source=source,
            model=model.eval().requires_grad_(False),
            image_processor=processor,
            select_layer=select_layer,
            # In a tower without prefix tokens (SigLIP), stock "default" would drop a patch.
            select_feature=select_feature if prefix_tokens(model.config) else "full",
            frames=frames,
        )
        check_tokens(encoder)
    return encoder
