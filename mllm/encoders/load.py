"""Load each kind of vision encoder as a stock transformers model. Only exact mappings are allowed."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    CLIPImageProcessor,
    CLIPVisionModel,
    LlavaImageProcessor,
    LlavaNextImageProcessor,
    LlavaOnevisionImageProcessor,
    PreTrainedModel,
    SiglipVisionModel,
    ViTModel,
)

from clips import (
    CLIPS,
    IMAGENET_MEAN,
    IMAGENET_STD,
    NotPlain,
    init_weights,
    newest_export,
    plain_vit,
    read_open_clip_config,
    sincos_positions,
    transformers_vit,
)
from clips.common.errors import UserError
from clips.common.hub import ANY_WEIGHTS, resolve
from clips.common.opening import NO_CODE, check_size, load_weights, loading, opening
from clips.common.rundir import check_current
from mllm.data.video import MOST_DRAWN
from mllm.encoders.encoder import (
    KINDS,
    UNUSED,
    AspectRatio,
    ImageProcessor,
    SelectFeature,
    VisionEncoder,
    check_close,
    check_tokens,
    prefix_tokens,
)
from mllm.encoders.registry import grid_pinpoints, parse_vision_name

RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}
"""PIL's number of each interpolation, which image processors save."""
TWO_TOWERS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}
"""The `model_type` of the image tower, which is used, for each kind of checkpoint that has a text tower too."""


# ---------------------------------------------------------------------------------------------- the kinds
LoadedVision = tuple[PreTrainedModel, ImageProcessor, str]
"""Model, image processor, and where the weights came from."""
Loader = Callable[[str, Path, int], LoadedVision]
"""Takes the argument in an encoder's name, the directory of runs, and the seed."""


def trained_here(objective: str, recipe: str) -> Loader:
    """Return the loader of encoders pretrained here: a directory, or the newest run of `objective`."""

    def load(argument: str, runs: Path, seed: int) -> LoadedVision:
        if not argument:
            return _load_export(newest_export(runs, objective, recipe))
        return _load_export(resolve(argument, "vision encoder", ANY_WEIGHTS))

    return load


def untrained(blind: bool) -> Loader:
    """Return the loader of an untrained encoder, whose tokens are the same for all images if `blind`."""

    def load(argument: str, runs: Path, seed: int) -> LoadedVision:
        model, processor, source = load_clips(argument, runs, seed)
        reinitialise(model, seed, blind=blind)
        what = "the same tokens for every image" if blind else "untrained"
        return model, processor, f"the architecture of {source}, {what}, seed {seed}"

    return load


def _load_open_clip(argument: str, eps: float | None = None) -> LoadedVision:
    """Load a model of open_clip. `eps`, if given, replaces the eps of its LayerNorms."""
    import open_clip

    if argument.startswith(("local-dir:", "hf-hub:")):
        place = argument.partition(":")[2]
        directory = resolve(place, "vision encoder", ANY_WEIGHTS)
        model_name, pretrained = f"local-dir:{directory}", None
        with loading("vision encoder", directory):
            empty = partial(open_clip.create_model, model_name, load_weights=False, device="meta")
            check_size("vision encoder", directory, empty)
    else:
        model_name, _, pretrained = argument.partition("/")
        tags = open_clip.list_pretrained_tags_by_model(model_name)
        if not pretrained:
            raise UserError(f"open_clip:{model_name} needs weights: /TAG, a checkpoint or one of {', '.join(tags)}")
    with loading("vision encoder", f"open_clip:{argument}"):
        visual = open_clip.create_model(model_name, pretrained=pretrained).visual.float().eval()
    if eps is not None:
        for module in visual.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = eps
    preprocess = visual.preprocess_cfg
    if preprocess["resize_mode"] == "longest":
        raise UserError(f"open_clip:{argument} resizes by the longest side, which the stock image processor cannot do")
    model = _mapped(f"open_clip:{argument}", visual)
    size = model.config.image_size
    processor = _image_processor(size, size, squash=preprocess["resize_mode"] == "squash", **_look(preprocess))
    return model, processor, f"open_clip:{argument}"


def _load_timm(argument: str) -> LoadedVision:
    from mllm.encoders import maps  # not at the top: it imports timm

    original, arguments = maps.create(argument)
    name = f"timm:{argument}"
    data = maps.timm.data.resolve_model_data_config(original)
    size, resized = data["input_size"][-1], int(data["input_size"][-1] / data["crop_pct"])
    if data["input_size"] != (3, size, size):
        raise UserError(f"{name} sees images of {' × '.join(map(str, data['input_size']))}, and not one RGB square")
    if data["crop_mode"] not in ("center", "squash") or data["interpolation"] not in RESAMPLE:
        how = f"crops in mode {data['crop_mode']!r}, {data['interpolation']}"
        raise UserError(f"{name} {how}, which the stock image processor cannot do")
    is_vit = type(original).__name__ == "VisionTransformer"
    model = _mapped(name, original) if is_vit else maps.wrap(name, original, arguments)
    processor = _image_processor(size, resized, squash=data["crop_mode"] == "squash", **_look(data))
    return model, processor, name


load_clips = trained_here("clips", "demo")
LOADERS: dict[str, Loader] = {
    "clips": load_clips,
    "clip": trained_here("clip", "clip_baseline"),
    "random": untrained(blind=False),
    "blind": untrained(blind=True),
    "open_clip": lambda argument, *_: _load_open_clip(argument),
    "hf": lambda argument, *_: _load_transformers(resolve(argument, "vision encoder")),
    "timm": lambda argument, *_: _load_timm(argument),
}
"""The loader of each kind of encoder (mllm/encoders/registry.py)."""


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
    """Load the encoder `name` (see mllm/encoders/registry.py) in fp32 and eval mode, without gradients.

    `image_aspect_ratio` "square" is the encoder's own preprocessing; "pad" first pads the image to a square with the
    mean colour (LLaVA-1.5); "anyres" gives the resized image and the tiles of `image_grid_pinpoints` (LLaVA-NeXT),
    which are not cropped even if the encoder crops images. If `frames`, the number of frames of a video, is not 0,
    anyres preprocesses as LLaVA-OneVision does. `seed` is for `random` and `blind`. Raises UserError if it fails.
    """
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


# ---------------------------------------------------------------------------------------------- loading
def _load_export(directory: Path) -> LoadedVision:
    """Load the encoder of a run, an export, or a model directory in transformers' or open_clip's format."""
    if (directory / "export").is_dir():
        check_current(directory / "export")
    for place in (directory / "export" / "hf_vit", directory / "hf_vit", directory):
        if (place / "open_clip_config.json").is_file():  # checked first, because both formats may be in one directory
            eps = None  # open_clip reads it from the file
            with suppress(UserError):  # not a plain CLIP, so not of CLIPS, whose files may leave out the eps
                eps = read_open_clip_config(place).vision.norm_eps
            return _load_open_clip(f"local-dir:{place}", eps=eps)
        if (place / "config.json").is_file() and (place / "preprocessor_config.json").is_file():
            return _load_transformers(place)
    if (directory / "native").is_dir() or (directory / "tokenizer").is_dir():
        tower = CLIPS.from_pretrained(directory, device="cpu").model.visual
        look = _look({"interpolation": "bilinear", "mean": IMAGENET_MEAN, "std": IMAGENET_STD})
        processor = _image_processor(tower.image_size, tower.image_size, squash=True, **look)
        return _mapped(f"clips:{directory}", tower), processor, str(directory)
    raise UserError(f"{directory} has no encoder: expected a run, an export, or a model of transformers or open_clip")


def _load_transformers(directory: Path) -> LoadedVision:
    with loading("vision encoder", directory):
        config = AutoConfig.from_pretrained(directory, **NO_CODE)
    cls: Any = KINDS.get(TWO_TOWERS.get(config.model_type, config.model_type))
    if cls is None:
        known = ", ".join([*TWO_TOWERS, *KINDS])
        raise UserError(f"vision encoder {directory} is of kind {config.model_type!r}; known kinds: {known}")
    with loading("vision encoder", directory):
        vision_config = getattr(config, "vision_config", config)
        check_size("vision encoder", directory, lambda: cls(vision_config))
        model, info = load_weights(cls, "vision encoder", directory, UNUSED, dtype=torch.float32)
        stock = AutoImageProcessor.from_pretrained(directory, **NO_CODE)
    if getattr(model, "pooler", None) is not None and info["missing_keys"]:
        for parameter in model.pooler.parameters():  # unused, but zero makes the weights reproducible
            nn.init.zeros_(parameter)
    settings = stock.to_dict()
    size, center = settings["size"], settings.get("do_center_crop") or False
    target = settings["crop_size"] if center else size
    if target.get("height") is None or target["height"] != target.get("width"):
        raise UserError(f"vision encoder {directory}: it does not resize all images to one square ({target})")
    processor = CLIPImageProcessor(
        size={edge: pixels for edge, pixels in size.items() if pixels is not None},
        crop_size={"height": target["height"], "width": target["height"]},
        do_center_crop=center,
        resample=int(settings["resample"]),
        image_mean=list(settings["image_mean"]),
        image_std=list(settings["image_std"]),
        rescale_factor=settings["rescale_factor"],
    )
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    pixels, expected = (p(images=image, return_tensors="pt")["pixel_values"] for p in (processor, stock))
    if pixels.shape != expected.shape or not torch.allclose(pixels, expected, atol=1e-3):
        raise UserError(f"vision encoder {directory}: {type(stock).__name__} does more than resize, crop, normalise")
    return model, processor, str(directory)


def _look(preprocess: Mapping[str, Any]) -> dict[str, Any]:
    """Translate interpolation, mean and deviation in a config of timm or open_clip to fields of an image processor."""
    mean, std = list(preprocess["mean"]), list(preprocess["std"])
    return {"resample": RESAMPLE[preprocess["interpolation"]], "image_mean": mean, "image_std": std}


def _image_processor(crop: int, resized: int, *, squash: bool, **look: Any) -> CLIPImageProcessor:
    """Build a processor that resizes both sides (`squash`) or the shorter side to `resized` pixels, then crops."""
    square = {"height": crop, "width": crop}
    size = {"height": resized, "width": resized} if squash else {"shortest_edge": resized}
    # `crop_size` is set even without a crop, because `LlavaProcessor` reads it.
    return CLIPImageProcessor(
        size=size, crop_size=square, do_center_crop=size != square, rescale_factor=1 / 255, **look
    )


@torch.no_grad()
def _mapped(name: str, original: nn.Module) -> PreTrainedModel:
    """Return the stock model (fp32, eval mode) that equals an image tower. Raises UserError if there is none."""
    try:
        plain = plain_vit(original)
        cls, config, state = transformers_vit(plain)
    except (NotPlain, AttributeError) as error:
        raise UserError(f"vision encoder {name} cannot be saved in a stock LLaVA model: {error}") from None
    # from_pretrained, because it reads the names of weights on the hub in every release of transformers.
    model, _ = load_weights(cls, "vision encoder", name, UNUSED, config=config, state_dict=state)
    check_equal(model.eval(), original, plain.last_block)
    return model


@torch.no_grad()
def check_equal(model: PreTrainedModel, original: nn.Module, last_block: nn.Module) -> None:
    """Raise UserError unless `model`'s last hidden state is the output of `last_block` of `original`."""
    size = model.config.image_size
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    captured: list[Tensor] = []
    hook = last_block.register_forward_hook(lambda module, inputs, output: captured.append(output))
    try:
        original.eval()(images.to(next(original.parameters()).dtype))
    finally:
        hook.remove()
    check_close(model, model(images, output_hidden_states=True).hidden_states[-1], captured[0].float())


@torch.no_grad()
def reinitialise(model: PreTrainedModel, seed: int, *, blind: bool = False) -> None:
    """Give a CLIPS tower in transformers' form untrained weights, in place, with the initialisation of `clips.model`.

    `blind` also sets the patch projection to zero, so the tokens hold positions but nothing of the image. Raises
    UserError for a model of another class than CLIPS exports have.
    """
    if not isinstance(model, (ViTModel, CLIPVisionModel, SiglipVisionModel)):
        raise UserError(f"random and blind take the architecture of a CLIPS export, not of a {type(model).__name__}")
    is_vit = isinstance(model, ViTModel)
    embeddings: Any = getattr(model, "vision_model", model).embeddings  # transformers removed this level in 5.x
    patch = embeddings.patch_embeddings.projection if is_vit else embeddings.patch_embedding
    positions = embeddings.position_embeddings[0] if is_vit else embeddings.position_embedding.weight
    prefix = prefix_tokens(model.config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        init_weights(model)
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(patch.weight, std=0.0 if blind else patch.weight[0].numel() ** -0.5)
    if patch.bias is not None:
        nn.init.zeros_(patch.bias)
    if prefix:
        nn.init.zeros_(embeddings.cls_token if is_vit else embeddings.class_embedding)
    grid = int((len(positions) - prefix) ** 0.5)
    positions.copy_(sincos_positions(positions.shape[1], grid)[1 - prefix :])
