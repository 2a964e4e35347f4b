"""Vision encoders by name: what a LLaVA-style model sees with. Nothing downstream asks which one it is.

    clips[:DIR|ID]  the newest CLIPS export under runs/, or the one named (run, export or model directory, hub id)
    clip[:DIR|ID]   the same for the CLIP baseline trained here
    caption[:DIR|ID]  the same for an encoder trained here by captions alone; caption+web for one beside web captions
    random[:DIR]    the architecture of a CLIPS export, untrained, seeded
    blind[:DIR]     the same, and every image gives the same tokens: no image information
    open_clip:MODEL[/PRETRAINED]   or open_clip:local-dir:DIR, open_clip:hf-hub:ID
    hf:ID|DIR       CLIP, SigLIP, ViT and DINOv2 of transformers; a bare ID (owner/name) or DIR is one too
    timm:NAME       plain vit_* models, or timm:local-dir:DIR

Every encoder is a stock transformers model, so what is trained on it can be saved as a stock
`LlavaForConditionalGeneration`; what does not fit there is refused here, before any training.

Shapes: B images · N image tokens · W width of a token.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModel, BaseImageProcessor, LlavaImageProcessor

from clips.common.errors import UserError
from clips.common.stock import loading
from mllm.encoders.encoder import KINDS, AspectRatio, SelectFeature, VisionEncoder
from mllm.encoders.load import (
    LoadedVision,
    VisionRequest,
    load_clips,
    load_hf,
    load_open_clip,
    load_timm,
    trained_here,
    untrained,
)
from mllm.encoders.names import parse_vision_name


def image_pixels(processor: BaseImageProcessor, image: Any) -> Tensor:
    """One picture → [3, S, S], by `processor`; picklable with `partial`, for data workers."""
    return processor(images=image, return_tensors="pt")["pixel_values"][0]


VISION: dict[str, Callable[[VisionRequest], LoadedVision]] = {
    "clips": load_clips,
    "clip": trained_here("clip", "clip_baseline"),
    "caption": trained_here("caption", "caption"),
    "caption+web": trained_here("caption+web", "caption_web"),
    "random": untrained(blind=False),
    "blind": untrained(blind=True),
    "open_clip": load_open_clip,
    "hf": load_hf,
    "timm": load_timm,
}


def load_vision(
    name: str,
    *,
    select_layer: int | list[int] = -2,
    select_feature: SelectFeature = "default",
    image_aspect_ratio: AspectRatio = "square",
    seed: int = 0,
    runs: Path | str = "runs",
) -> VisionEncoder:
    """The encoder `name` (see the top of this file), fp32, in eval mode, without gradients.

    `image_aspect_ratio`: "square" is the encoder's own preprocessing; "pad" first pads to a square with the mean
    colour (LLaVA-1.5). `seed` is that of `random` and `blind`. Raises UserError for an unknown name (lists the known
    ones) and for everything that a stock `LlavaForConditionalGeneration` cannot hold.
    """
    key, argument = parse_vision_name(name)
    name = f"{key}:{argument}" if key == "hf" else name
    model, processor, source = VISION[key](VisionRequest(argument=argument, runs=Path(runs), seed=seed))
    if image_aspect_ratio == "pad":
        settings = {k: v for k, v in processor.to_dict().items() if k != "image_processor_type"}
        processor = LlavaImageProcessor(**settings, do_pad=True)
    encoder = VisionEncoder(
        name=name,
        source=source,
        model=model.eval().requires_grad_(False),
        image_processor=processor,
        select_layer=select_layer,
        # Where no token stands in front of the patches (SigLIP), stock "default" would drop a patch.
        select_feature=select_feature if KINDS[model.config.model_type].prefix_tokens(model.config) else "full",
    )
    _check(encoder)
    return encoder


@torch.no_grad()
def _check(encoder: VisionEncoder) -> None:
    """Run one image through preprocessing and model; UserError when the tokens are not what stock LLaVA expects."""
    with torch.device("meta"):
        rebuilt = type(AutoModel.from_config(encoder.config))
    if rebuilt is not type(encoder.model):
        raise UserError(f"vision encoder {encoder.name}: a stock LLaVA model would hold a {rebuilt.__name__}")
    layers = encoder.config.num_hidden_layers
    chosen = [encoder.select_layer] if isinstance(encoder.select_layer, int) else encoder.select_layer
    if not chosen or not all(-layers - 1 <= layer <= layers for layer in chosen):
        raise UserError(
            f"mm_vision_select_layer {encoder.select_layer}: {encoder.name} has layers "
            f"{-layers - 1} … {layers} (0 = embeddings)"
        )
    picture = np.zeros((48, 64, 3), dtype=np.uint8)
    pixels = encoder.image_processor(images=picture, return_tensors="pt")["pixel_values"]
    with loading("vision encoder", encoder.name):
        shape = tuple(encoder.features(pixels).shape)
    if shape != (1, encoder.num_tokens, encoder.width):
        raise UserError(
            f"vision encoder {encoder.name} gives tokens of shape {shape[1:]}, a stock LLaVA model expects "
            f"{(encoder.num_tokens, encoder.width)}"
        )
