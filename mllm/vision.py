"""Vision encoders by name: what a LLaVA-style model sees with. Nothing downstream asks which one it is.

    clips[:DIR|ID]  the newest CLIPS export under runs/, or the one named (run, export or model directory, hub id)
    clip[:DIR|ID]   the same for the CLIP baseline trained here
    random[:DIR]    the architecture of a CLIPS export, untrained, seeded
    blind[:DIR]     the same, and every image gives the same tokens: no image information
    open_clip:MODEL[/PRETRAINED]   or open_clip:local-dir:DIR, open_clip:hf-hub:ID
    hf:ID|DIR       CLIP, SigLIP, ViT and DINOv2 of transformers
    timm:NAME       plain vit_* models, or timm:local-dir:DIR

Every encoder is a stock transformers model, so what is trained on it can be saved as a stock
`LlavaForConditionalGeneration`; what does not fit there is refused here, before any training.

Shapes: B images · N image tokens · W width of a token.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    BaseImageProcessor,
    CLIPImageProcessor,
    CLIPVisionModel,
    Dinov2Model,
    Dinov2WithRegistersModel,
    LlavaImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipVisionModel,
    ViTModel,
)

from clips.errors import UserError
from clips.layers import init_weights
from clips.tower import sincos_positions
from mllm.hub import check_complete, loading, resolve
from mllm.plain_vit import NotPlain, PlainViT, check_equal, read_open_clip, read_timm, to_transformers

SelectFeature = Literal["default", "full"]
AspectRatio = Literal["square", "pad"]

UNUSED = ("pooler.", "head.", "vision_model.head.")
"""Parameters behind the token features; no part of what an encoder is."""

RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}
"""Names of interpolations → PIL's numbers, which image processors are saved with."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A vision model that stock `LlavaForConditionalGeneration` can hold."""

    cls: type[PreTrainedModel]
    prefix_tokens: Callable[[Any], int] = lambda config: 1
    """Tokens in front of the patches (CLS, registers), from the model's config."""


KINDS = {
    "clip_vision_model": Kind(cls=CLIPVisionModel),
    "siglip_vision_model": Kind(cls=SiglipVisionModel, prefix_tokens=lambda config: 0),
    "vit": Kind(cls=ViTModel),
    "dinov2": Kind(cls=Dinov2Model),
    "dinov2_with_registers": Kind(
        cls=Dinov2WithRegistersModel, prefix_tokens=lambda config: 1 + config.num_register_tokens
    ),
}
"""transformers' `model_type` → how it sits in a stock LLaVA model."""

TWO_TOWERS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}
"""Checkpoints with a text tower, of which the image tower is taken."""


@dataclass(frozen=True, kw_only=True)
class VisionEncoder:
    """One encoder with its preprocessing and the choice of its features."""

    name: str
    source: str
    """Where the weights came from, for people."""
    model: PreTrainedModel
    image_processor: BaseImageProcessor
    select_layer: int | list[int] = -2
    """Index into the hidden states (0 = embeddings); several layers are concatenated along the width."""
    select_feature: SelectFeature = "default"
    """"default" drops the first token (CLS), "full" keeps all."""

    @property
    def config(self) -> PreTrainedConfig:
        """The vision config it is saved under."""
        return self.model.config

    @property
    def prefix_tokens(self) -> int:
        return KINDS[self.config.model_type].prefix_tokens(self.config)

    @property
    def image_size(self) -> int:
        """Side in pixels of what the image processor gives."""
        return self.image_processor.crop_size["height"]

    @property
    def patch_size(self) -> int:
        size = self.config.patch_size
        return size if isinstance(size, int) else size[0]

    @property
    def num_tokens(self) -> int:
        """Image tokens that the language model sees, counted as `LlavaProcessor` counts them."""
        dropped = self.select_feature == "default"
        return (self.image_size // self.patch_size) ** 2 + self.prefix_tokens - dropped

    @property
    def width(self) -> int:
        layers = 1 if isinstance(self.select_layer, int) else len(self.select_layer)
        return self.config.hidden_size * layers

    def features(self, pixel_values: Tensor) -> Tensor:
        """pixel_values [B, 3, S, S] → the tokens [B, N, W] that the projector gets."""
        return select_features(self.model, pixel_values, self.select_layer, self.select_feature)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over weights, layer and preprocessing: equal fingerprints give equal features."""
        digest = self._hash_of_weights()
        config = {key: value for key, value in self.config.to_dict().items() if key not in VOLATILE}
        settings = [config, self.image_processor.to_dict(), self.select_layer, self.select_feature]
        digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
        return digest.hexdigest()

    @property
    def weights_fingerprint(self) -> str:
        """SHA-256 over the weights alone: of the same encoder with other preprocessing it is the same."""
        return self._hash_of_weights().hexdigest()

    def _hash_of_weights(self) -> Any:
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            if not name.startswith(UNUSED):
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        return digest

    def describe(self) -> str:
        """One line for plans and model cards."""
        padded = getattr(self.image_processor, "do_pad", False)
        return (
            f"{self.name} ({type(self.model).__name__} from {self.source}; {self.image_size} px"
            f"{', padded to a square' if padded else ''}, {self.num_tokens} tokens × {self.width}, "
            f"layer {self.select_layer}, {'patch tokens' if self.select_feature == 'default' else 'all tokens'})"
        )


VOLATILE = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")
"""Config entries that say nothing about the features."""


def select_features(model: nn.Module, pixel_values: Tensor, layer: int | list[int], strategy: str) -> Tensor:
    """Tokens [B, N, W] of `model`, chosen as `LlavaModel.get_image_features` chooses them."""
    hidden_states = model(pixel_values, output_hidden_states=True).hidden_states
    chosen = [hidden_states[i] for i in ([layer] if isinstance(layer, int) else layer)]
    return torch.cat([states[:, 1:] if strategy == "default" else states for states in chosen], dim=-1)


# ---------------------------------------------------------------------------------------------- the registry


@dataclass(frozen=True, kw_only=True)
class _Request:
    """What stands behind the colon of a name, and where and how to look."""

    argument: str
    runs: Path
    seed: int


_Loaded = tuple[PreTrainedModel, BaseImageProcessor, str]
"""Model, image processor, source."""


def _trained_here(objective: str, recipe: str) -> Callable[[_Request], _Loaded]:
    def load(request: _Request) -> _Loaded:
        directory = resolve(request.argument, "vision encoder") if request.argument else None
        return _load_export(directory or newest_export(request.runs, objective, recipe))

    return load


def _untrained(blind: bool) -> Callable[[_Request], _Loaded]:
    def load(request: _Request) -> _Loaded:
        model, processor, source = load_clips(request)
        reinitialise(model, request.seed, blind=blind)
        what = "the same tokens for every image" if blind else "untrained"
        return model, processor, f"the architecture of {source}, {what}, seed {request.seed}"

    return load


def _load_open_clip(request: _Request) -> _Loaded:
    import open_clip

    argument = request.argument
    if argument.startswith(("local-dir:", "hf-hub:")):
        place = argument.partition(":")[2]
        model_name, pretrained = f"local-dir:{resolve(place, 'vision encoder')}", None
    else:
        model_name, _, pretrained = argument.partition("/")
        if model_name not in open_clip.list_models():
            raise UserError(f"open_clip has no model {model_name!r}; it has: {', '.join(open_clip.list_models())}")
        tags = open_clip.list_pretrained_tags_by_model(model_name)
        if not pretrained:
            raise UserError(
                f"open_clip:{model_name} needs its weights: open_clip:{model_name}/TAG with TAG one of "
                f"{', '.join(tags) or '(none published)'}, or the path of a checkpoint"
            )
        if pretrained not in tags and not Path(pretrained).is_file():
            raise UserError(f"open_clip has no weights {pretrained!r} for {model_name}; it has: {', '.join(tags)}")
    with loading("vision encoder", f"open_clip:{argument}"):
        visual = open_clip.create_model(model_name, pretrained=pretrained).visual.float().eval()
    preprocess = visual.preprocess_cfg
    if preprocess["resize_mode"] == "longest":
        raise UserError(
            f"open_clip:{argument} fits the longest side into the square, which the stock image processor does not do"
        )
    trunk = visual.trunk if hasattr(visual, "trunk") else visual
    blocks = trunk.blocks if hasattr(trunk, "blocks") else getattr(getattr(trunk, "transformer", None), "resblocks", [])
    model = _mapped(f"open_clip:{argument}", read_open_clip, visual, blocks)
    size = model.config.image_size
    processor = _image_processor(
        size={"height": size, "width": size} if preprocess["resize_mode"] == "squash" else {"shortest_edge": size},
        crop=size,
        resample=RESAMPLE[preprocess["interpolation"]],
        image_mean=list(preprocess["mean"]),
        image_std=list(preprocess["std"]),
    )
    return model, processor, f"open_clip:{argument}"


def _load_timm(request: _Request) -> _Loaded:
    import timm

    name = request.argument
    if name.startswith("local-dir:"):
        name = f"local-dir:{resolve(name.removeprefix('local-dir:'), 'vision encoder')}"
    elif not name.startswith("hf-hub:") and not timm.is_model(name.split(".")[0]):
        raise UserError(f"timm has no model {name!r}; plain ViTs are listed by timm.list_models('vit_*')")
    with loading("vision encoder", f"timm:{name}"):
        original = timm.create_model(name, pretrained=True).float().eval()
    model = _mapped(f"timm:{name}", read_timm, original, getattr(original, "blocks", []))
    data = timm.data.resolve_model_data_config(original)
    size = model.config.image_size
    if data["crop_mode"] not in ("center", "squash"):
        raise UserError(f"timm:{name} crops in mode {data['crop_mode']!r}, which the stock image processor does not do")
    resized = int(size / data["crop_pct"])
    processor = _image_processor(
        size={"shortest_edge": resized} if data["crop_mode"] == "center" else {"height": resized, "width": resized},
        crop=size,
        resample=RESAMPLE[data["interpolation"]],
        image_mean=list(data["mean"]),
        image_std=list(data["std"]),
    )
    return model, processor, f"timm:{name}"


def _load_hf(request: _Request) -> _Loaded:
    return _load_transformers(resolve(request.argument, "vision encoder"))


load_clips = _trained_here("clips", "demo")

VISION: dict[str, Callable[[_Request], _Loaded]] = {
    "clips": load_clips,
    "clip": _trained_here("clip", "clip_baseline"),
    "random": _untrained(blind=False),
    "blind": _untrained(blind=True),
    "open_clip": _load_open_clip,
    "hf": _load_hf,
    "timm": _load_timm,
}

NEEDS_ARGUMENT = {"open_clip": "MODEL/PRETRAINED", "hf": "ID_OR_DIR", "timm": "NAME"}


def parse_vision_name(name: str) -> tuple[str, str]:
    """(kind, argument) of an encoder's name; UserError for a kind that is not known and for a missing argument."""
    key, _, argument = name.partition(":")
    if key not in VISION:
        raise UserError(f"vision encoder {name!r} is not known; known are: {', '.join(VISION)} (with :ARGUMENT)")
    if key in NEEDS_ARGUMENT and not argument:
        raise UserError(f"vision encoder {key} needs an argument: {key}:{NEEDS_ARGUMENT[key]}")
    return key, argument


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
    model, processor, source = VISION[key](_Request(argument=argument, runs=Path(runs), seed=seed))
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


# ---------------------------------------------------------------------------------------------- loading


def newest_export(runs: Path, objective: str, recipe: str = "demo") -> Path:
    """The export directory written last under `runs` by a run whose `task.objective` is `objective`."""
    found = []
    for config in runs.glob("*/export/hf_vit/config.json"):
        run_config = config.parents[2] / "config.json"
        try:
            task = json.loads(run_config.read_text()).get("task", {})
        except (OSError, ValueError):
            continue  # not a finished run of this project; the error below says what is looked for
        if task.get("objective") == objective:
            found.append((config.stat().st_mtime, config.parents[1]))
    if not found:
        raise UserError(
            f"no finished run with task.objective {objective!r} and an export under {runs}/: train one with "
            f"`deepspeed scripts/pretrain_clips.py --recipe {recipe}`, or name a directory as {objective}:DIR"
        )
    return max(found)[1]


def _load_export(directory: Path) -> _Loaded:
    """A run, an export, or a model directory in transformers' or open_clip's format."""
    for place in (directory / "export" / "hf_vit", directory / "hf_vit", directory):
        if (place / "config.json").is_file() and (place / "preprocessor_config.json").is_file():
            return _load_transformers(place)
        if (place / "open_clip_config.json").is_file():
            return _load_open_clip(_Request(argument=f"local-dir:{place}", runs=Path(), seed=0))
    raise UserError(
        f"{directory} holds no encoder: expected export/hf_vit, hf_vit, a transformers model (config.json and "
        "preprocessor_config.json) or an open_clip model (open_clip_config.json)"
    )


def _load_transformers(directory: Path) -> _Loaded:
    with loading("vision encoder", directory):
        config = AutoConfig.from_pretrained(directory)
    kind = KINDS.get(TWO_TOWERS.get(config.model_type, config.model_type))
    if kind is None:
        known = ", ".join([*TWO_TOWERS, *KINDS])
        raise UserError(
            f"vision encoder {directory} is of transformers' kind {config.model_type!r}, which does not fit into a "
            f"stock LLaVA model here; known kinds: {known}"
        )
    with loading("vision encoder", directory):
        model, info = kind.cls.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
        stock = AutoImageProcessor.from_pretrained(directory)
    check_complete(info, "vision encoder", directory, allowed=UNUSED)
    if getattr(model, "pooler", None) is not None and info["missing_keys"]:
        for parameter in model.pooler.parameters():  # unused; zero so that the same encoder has the same weights
            nn.init.zeros_(parameter)
    settings = stock.to_dict()
    size, center = settings["size"], settings.get("do_center_crop") or False
    target = settings["crop_size"] if center else size
    if target.get("height") is None or target["height"] != target.get("width"):
        raise UserError(f"vision encoder {directory}: its images are not brought to one square size ({target})")
    processor = _image_processor(
        size={edge: pixels for edge, pixels in size.items() if pixels is not None},
        crop=target["height"],
        resample=int(settings["resample"]),
        image_mean=list(settings["image_mean"]),
        image_std=list(settings["image_std"]),
        do_center_crop=center,
        rescale_factor=settings["rescale_factor"],
    )
    picture = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    ours, theirs = (p(images=picture, return_tensors="pt")["pixel_values"] for p in (processor, stock))
    if ours.shape != theirs.shape or not torch.allclose(ours, theirs, atol=1e-3):
        raise UserError(
            f"vision encoder {directory}: its {type(stock).__name__} does more than resize, crop and normalise, so a "
            "stock LLaVA processor cannot do the same"
        )
    return model, processor, str(directory)


def _image_processor(
    *,
    size: dict[str, int],
    crop: int,
    resample: int,
    image_mean: list[float],
    image_std: list[float],
    do_center_crop: bool | None = None,
    rescale_factor: float = 1 / 255,
) -> CLIPImageProcessor:
    """Resize to `size`, crop to `crop` pixels where needed, normalise. `LlavaProcessor` reads `crop_size` always."""
    square = {"height": crop, "width": crop}
    return CLIPImageProcessor(
        size=size,
        crop_size=square,
        do_center_crop=size != square if do_center_crop is None else do_center_crop,
        resample=resample,
        image_mean=image_mean,
        image_std=image_std,
        rescale_factor=rescale_factor,
    )


def _mapped(name: str, reader: Callable[[nn.Module], PlainViT], original: nn.Module, blocks: Any) -> PreTrainedModel:
    try:
        model = to_transformers(reader(original))
    except (NotPlain, AttributeError) as error:
        raise UserError(
            f"vision encoder {name} cannot be saved in a stock LLaVA model: {error}. Plain ViTs (CLIP, SigLIP, ViT, "
            "DINOv2 kinds) can."
        ) from None
    check_equal(model, original, blocks[-1])
    return model


@torch.no_grad()
def reinitialise(model: PreTrainedModel, seed: int, *, blind: bool = False) -> None:
    """Give a CLIPS tower in transformers' form the weights of an untrained one (`clips.tower`'s initialisation).

    `blind`: the patch projection is zero besides, so the tokens hold positions and nothing of the image.
    """
    if not isinstance(model, (ViTModel, CLIPVisionModel)):
        raise UserError(f"random and blind take the architecture of a CLIPS export, not of a {type(model).__name__}")
    is_clip = isinstance(model, CLIPVisionModel)
    embeddings = getattr(model, "vision_model", model).embeddings  # a level that transformers removed in 5.x
    patch = embeddings.patch_embedding if is_clip else embeddings.patch_embeddings.projection
    positions = embeddings.position_embedding.weight if is_clip else embeddings.position_embeddings[0]
    cls_token = embeddings.class_embedding if is_clip else embeddings.cls_token
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
    nn.init.zeros_(cls_token)
    grid = int((len(positions) - 1) ** 0.5)
    positions.copy_(sincos_positions(positions.shape[1], grid))
