"""Vision encoders by name: what a LLaVA-style model sees with. Nothing downstream asks which one it is.

    clips[:DIR|ID]  the newest CLIPS export under runs/, or the one named (run, export or model directory, hub id)
    clip[:DIR|ID]   the same for the CLIP baseline trained here
    caption[:DIR|ID]  the same for an encoder trained here by captions alone; caption+web for one beside web captions
    random[:DIR]    the architecture of a CLIPS export, untrained, seeded
    blind[:DIR]     the same, and every image gives the same tokens: no image information
    open_clip:MODEL[/PRETRAINED]   or open_clip:local-dir:DIR, open_clip:hf-hub:ID
    hf:ID|DIR       CLIP, SigLIP, ViT and DINOv2 of transformers; a bare ID (owner/name) or DIR is one too
    timm:NAME       plain vit_* models, or timm:local-dir:DIR

Every encoder is a stock transformers model that a stock `LlavaForConditionalGeneration` can hold. Others are refused
here, before any training. Names are parsed without importing torch.

Shapes: B images · N image tokens · W width of a token.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from clips.common.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import BaseImageProcessor

    from mllm.encoders.encoder import AspectRatio, SelectFeature, VisionEncoder

ARGUMENTS: dict[str, str | None] = {
    "clips": None,
    "clip": None,
    "caption": None,
    "caption+web": None,
    "random": None,
    "blind": None,
    "open_clip": "MODEL/PRETRAINED",
    "hf": "ID_OR_DIR",
    "timm": "NAME",
}
"""Kind (`mllm.encoders.load.LOADERS` loads each) → the argument that it needs; None: the argument is optional."""


def parse_vision_name(name: str) -> tuple[str, str]:
    """(kind, argument) of an encoder's name; UserError for an unknown kind and for a missing argument.

    A hub id or a directory alone, as LLaVA's commands give it, is of kind `hf`.
    """
    key, colon, argument = name.partition(":")
    if key not in ARGUMENTS and not colon and "/" in name:
        if (Path(name) / "export").is_dir():
            raise UserError(f"vision encoder {name} is a run of this project: clips:{name}, or clip:{name}")
        key, argument = "hf", name
    if key not in ARGUMENTS:
        raise UserError(
            f"vision encoder {name!r} is not known; known are: {', '.join(ARGUMENTS)} (with :ARGUMENT), and owner/name "
            "for hf:owner/name"
        )
    if ARGUMENTS[key] and not argument:
        raise UserError(f"vision encoder {key} needs an argument: {key}:{ARGUMENTS[key]}")
    return key, argument


def image_pixels(processor: BaseImageProcessor, image: Any) -> Tensor:
    """One picture → [1, 3, S, S], by `processor`; picklable with `partial`, for data workers."""
    return processor(images=image, return_tensors="pt")["pixel_values"]


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
    colour (LLaVA-1.5). `seed` is the seed of `random` and `blind`. Raises UserError for an unknown name (lists the
    known ones) and for everything that a stock `LlavaForConditionalGeneration` cannot hold.
    """
    from transformers import LlavaImageProcessor

    from clips.common.opening import opening
    from mllm.encoders.encoder import KINDS, VisionEncoder, check_tokens
    from mllm.encoders.load import LOADERS

    key, argument = parse_vision_name(name)
    with opening("vision encoder", argument or key):
        model, processor, source = LOADERS[key](argument, Path(runs), seed)
        if image_aspect_ratio == "pad":
            settings = {k: v for k, v in processor.to_dict().items() if k != "image_processor_type"}
            processor = LlavaImageProcessor(**settings, do_pad=True)
        encoder = VisionEncoder(
            name=f"{key}:{argument}" if key == "hf" else name,
            source=source,
            model=model.eval().requires_grad_(False),
            image_processor=processor,
            select_layer=select_layer,
            # In a tower without prefix tokens (SigLIP), stock "default" would drop a patch.
            select_feature=select_feature if KINDS[model.config.model_type].prefix_tokens(model.config) else "full",
        )
        check_tokens(encoder)
    return encoder
