"""Towers of transformers, timm and open_clip as configurations and tensors under this project's names.

LayerScale, a factor for each channel at the end of a branch, goes into `attn.proj` and `mlp.fc2`. A bias that a model
lacks is zero here. The mean and deviation that a model was trained with go into its patch convolution, because images
here are always normalised with ImageNet's. A tower that computes anything else is refused.
open_clip's directories are read in clips/weights/open_clip.py.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clips.common.errors import UserError
from clips.common.files import read_json
from clips.common.tensors import hash_weights, listed, read_model, read_safetensors
from clips.config import Activation, CaptionerConfig, ImagePool, TextConfig, VisionConfig
from clips.data.images import IMAGENET_MEAN, IMAGENET_STD
from clips.data.tokenizer import CaptionTokenizer, build_tokenizer
from clips.model.vision import VisionTower
from clips.weights import layouts
from clips.weights.layouts import WeightNames

Normalisation = tuple[Sequence[float], Sequence[float]]
"""Mean and deviation of red, green and blue, for pixel values from 0 to 1."""
EMBEDDING = "embedding.safetensors"
"""File of the projection that this project exports with an image tower."""
CLIP_VOCABULARY = 49_408
HALF = (0.5, 0.5, 0.5)
NORMALISED: dict[str, Normalisation] = {
    "vit": (HALF, HALF),
    "dinov2": (IMAGENET_MEAN, IMAGENET_STD),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "siglip": (HALF, HALF),
}
"""Normalisation of the published models of a kind, for directories without an image processor."""


class NotPlain(Exception):
    """A model has a part that no tower here has."""


@dataclass(frozen=True, kw_only=True)
class InitialWeights:
    """Weights to start from: the parts of a model that `CLIPSModel` can take, in fp32 and under its tensor names."""

    source: str = ""
    """The name that the user gave."""
    kind: str
    """Format and architecture, for messages, such as "transformers, clip"."""
    vision: VisionConfig
    text: TextConfig | None = None
    captioner: CaptionerConfig | None = None
    tokenizer: CaptionTokenizer | None = None
    """The tokenizer of `text`."""
    tokenizer_kind: str = ""
    """A `TokenizerKind`, or "" without a text tower."""
    embed_dim: int | None = None
    """None if the file has no projections into a space that two towers share."""
    tensors: dict[str, Tensor]
    left_over: dict[str, list[str]] = field(default_factory=dict)
    """Names of tensors in the file that are not used, grouped under a description of the part they belong to."""
    notes: list[str] = field(default_factory=list)
    """Changes that were made to the weights, to be printed."""

    @cached_property
    def architecture(self) -> dict[str, Any]:
        """The configuration of the parts in the file: fields or values by their paths in RunConfig ("model.vision")."""
        towers = {"model.vision": self.vision, "model.text": self.text, "model.captioner": self.captioner}
        found: dict[str, Any] = {path: asdict(part) for path, part in towers.items() if part is not None}
        if self.tokenizer_kind:
            found["captions.tokenizer"] = self.tokenizer_kind
        if self.embed_dim is not None:
            found["model.embed_dim"] = self.embed_dim
        return found

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the tensors and their names, independent of file, format and place."""
        return hash_weights(self.tensors).hexdigest()


@dataclass(frozen=True, kw_only=True)
class PlainViT:
    """A plain ViT. Shapes: D width · P patch size · N patches · C = 1 with a CLS token, else 0."""

    config: VisionConfig
    tensors: Mapping[str, Tensor]
    """Named as in `VisionTower`, always with `pos_embed` [C + N, D]; if `norm` is missing, it is the identity."""
    last_block: nn.Module
    """The model's own last block."""


def kind_of(directory: Path) -> str | None:
    """Return "open_clip", "transformers" or "timm" by the configuration in `directory`, or None for none of them."""
    if (directory / "open_clip_config.json").is_file():  # first: beside it may lie the same model for transformers
        return "open_clip"
    config = read_json(directory / "config.json")
    # This project's own configuration has neither; timm's has no model_type.
    return "transformers" if "model_type" in config else "timm" if "architecture" in config else None


def read_transformers(directory: Path) -> InitialWeights:
    """Read the image tower of a ViT, DINOv2, CLIP or SigLIP; of a full CLIP, both towers and the logit scale.

    An image tower that this project exported brings its projection. Raises UserError if no tower here computes it.
    """
    from transformers import AutoConfig

    from clips.common.opening import NO_CODE, loading

    kind = read_json(directory / "config.json")["model_type"]
    if kind not in layouts.VISION_LAYOUTS:
        raise UserError(f"{directory}: {kind!r} cannot be read; these types can: {', '.join(layouts.VISION_LAYOUTS)}")
    with loading("config.json", directory):
        config: Any = AutoConfig.from_pretrained(directory, **NO_CODE)
    try:
        vision = _vision_config(getattr(config, "vision_config", config), kind)
        text = None
        if kind == "clip":
            stock = config.text_config
            slots = stock.max_position_embeddings
            text = TextConfig(
                **_same_fields(stock), context_length=slots, vocab_size=stock.vocab_size, causal=True, pool="eos"
            )
    except NotPlain as reason:
        raise UserError(f"{directory}: {reason}, which no tower here has") from None

    layout = layouts.VISION_LAYOUTS[kind]
    if not getattr(config, "qkv_bias", True):
        layout = replace(layout, unbiased=("attn.qkv",))
    tokenizer = _clip_tokenizer(directory, text.vocab_size) if text else None
    foreign = NamedWeights(read_model(directory), directory).initial_weights(
        f"transformers, {kind}", vision, layout, _normalisation(directory, kind), text, layouts.CLIP_TEXT, tokenizer
    )
    if not (directory / EMBEDDING).is_file():
        return foreign
    projection, pool = read_embedding(directory)
    tensors = foreign.tensors | {"visual.proj.weight": projection}
    return replace(foreign, vision=replace(vision, pool=pool), tensors=tensors, embed_dim=len(projection))


def read_timm(directory: Path) -> InitialWeights:
    """Read the image tower of a plain `VisionTransformer` from a directory as timm saves it or as it is on the hub.

    Raises UserError if no tower here computes it.
    """
    import timm

    from clips.common.opening import loading

    with loading("timm", directory), torch.device("meta"):  # its shapes and settings; the weights are read here
        stock: Any = timm.create_model(f"local-dir:{directory}", pretrained=False)
    try:
        vision, layout = _timm_tower(stock)
        require("norm" in layout.modules, "it has no LayerNorm after its blocks")
    except NotPlain as reason:
        raise UserError(f"{directory}: {reason}, which no tower here has") from None

    normalisation = (stock.pretrained_cfg["mean"], stock.pretrained_cfg["std"])
    return NamedWeights(read_model(directory), directory).initial_weights("timm", vision, layout, normalisation)


def plain_vit(module: Any) -> PlainViT:
    """Return an image tower of this project, open_clip or timm. Raises NotPlain if it is more than a plain ViT."""
    if isinstance(module, VisionTower):
        tensors = module.state_dict() | {"pos_embed": module.positions()}
        config = replace(module.config, image_size=module.image_size)
        return PlainViT(config=config, tensors=tensors, last_block=module.blocks[-1])
    if type(module).__name__ == "TimmModel":  # open_clip's
        return plain_vit(module.trunk)

    if type(module).__module__.startswith("open_clip."):
        config, layout = open_clip_tower(module)
        last_block = module.transformer.resblocks[-1]
    else:
        config, layout = _timm_tower(module)
        last_block = module.blocks[-1]
    source = NamedWeights(module.state_dict(), type(module).__name__)
    tensors, _ = source.tower(config, layout)
    source.left_over(layout)
    return PlainViT(config=config, tensors=tensors, last_block=last_block)


def _clip_tokenizer(directory: Path, vocab_size: int) -> CaptionTokenizer:
    """The tokenizer of a transformers CLIP; if it is missing, CLIP's own for a vocabulary of its size."""
    if not (directory / "tokenizer.json").is_file() and vocab_size == CLIP_VOCABULARY:
        return build_tokenizer("clip")
    return CaptionTokenizer.load(directory)


def read_embedding(directory: Path) -> tuple[Tensor, ImagePool]:
    """Read the projection [E, D] in `directory`, and how tokens are pooled before it."""
    tensors, metadata = read_safetensors(directory / EMBEDDING)
    pool: Any = metadata["pool"]
    return tensors["proj.weight"], pool


class NamedWeights:
    """Weights under a format's names, and which of them were taken; `place` is for error messages."""

    def __init__(self, weights: Mapping[str, Tensor], place: Any) -> None:
        self.weights = weights
        self.place = place
        self.taken: set[str] = set()

    def take(self, names: Mapping[str, tuple[str, ...]], prefix: str = "") -> dict[str, Tensor]:
        """Return fp32 copies of the weights under this project's names, the keys of `names`; their parts are joined.

        `prefix` begins the names in the file, unless no name there has it. Raises UserError with the names that are
        missing.
        """
        if not any(name.startswith(prefix) for name in self.weights):
            prefix = ""
        required = {prefix + name for parts in names.values() for name in parts}
        if missing := sorted(required - self.weights.keys()):
            raise UserError(f"the weights in {self.place} lack {listed(missing)}")
        self.taken |= required
        tensors: dict[str, Tensor] = {}
        for ours, parts in names.items():
            copies = [self.weights[prefix + name].detach().to(torch.float32, copy=True) for name in parts]
            tensors[ours] = copies[0] if len(copies) == 1 else torch.cat(copies)
        return tensors

    def initial_weights(
        self,
        kind: str,
        vision: VisionConfig,
        layout: WeightNames,
        normalisation: Normalisation,
        text: TextConfig | None = None,
        text_layout: WeightNames = layouts.CLIP_TEXT,
        tokenizer: CaptionTokenizer | None = None,
    ) -> InitialWeights:
        """Return all parts of a model that this project can use; `normalisation` is that of its training images."""
        tower, notes = self.tower(vision, layout)
        if fold_normalisation(tower, vision, normalisation):
            mean = ", ".join(f"{value:.3g}" for value in normalisation[0])
            notes.append(f"mean ({mean}) and deviation of its images folded into the patch convolution")
        tensors = {f"visual.{name}": tensor for name, tensor in tower.items()}
        if text is not None:
            tensors |= {f"text.{name}": tensor for name, tensor in self.tower(text, text_layout)[0].items()}
            is_open_clip = text_layout is layouts.OPEN_CLIP_TEXT
            for name, tensor in self.take(layouts.OPEN_CLIP_PAIR if is_open_clip else layouts.PAIR).items():
                tensors[name] = tensor.T if is_open_clip and tensor.ndim == 2 else tensor
            tensors["logit_scale"] = tensors["logit_scale"].reshape(1)
        return InitialWeights(
            kind=kind,
            vision=vision,
            text=text,
            tokenizer=tokenizer,
            tokenizer_kind="" if tokenizer is None else "clip" if tokenizer.is_clip else "bert",
            embed_dim=len(tensors["visual.proj.weight"]) if text else None,
            tensors=tensors,
            left_over=self.left_over(layout),
            notes=notes,
        )

    def tower(self, config: VisionConfig | TextConfig, layout: WeightNames) -> tuple[dict[str, Tensor], list[str]]:
        """Return the tensors of a tower without its projection, and notes on how they were changed."""
        absent: tuple[str, ...] = ()
        if isinstance(config, VisionConfig):
            has = {"cls_token": config.cls, "pre_norm": config.pre_norm, "patch_embed.bias": config.patch_bias}
            absent = tuple(name for name, is_present in has.items() if not is_present)
        names = {n: other for n, other in layout.names(config.layers).items() if not n.startswith(absent)}
        tensors = self.take(names, layout.prefix)
        notes = []

        for module in layout.unbiased:
            for i in range(config.layers):
                name = f"blocks.{i}.{module}"
                tensors[f"{name}.bias"] = torch.zeros(len(tensors[f"{name}.weight"]))
        if "attn.qkv" in layout.unbiased:
            notes.append("queries, keys and values have no bias there: here it begins at zero")

        scales = {
            f"blocks.{i}.{ours}": (f"{layout.blocks}.{i}.{other}",)
            for i in range(config.layers)
            for ours, other in layout.scales.items()
        }
        if any(scale in self.weights or layout.prefix + scale in self.weights for (scale,) in scales.values()):
            for module, scale in self.take(scales, layout.prefix).items():
                tensors[f"{module}.weight"] *= scale[:, None]
                tensors[f"{module}.bias"] *= scale
            notes.append("LayerScale folded into attn.proj and mlp.fc2")

        for name in ("cls_token", "pos_embed"):  # timm and transformers keep them with axes of length 1 in front
            if name in tensors:
                tensors[name] = tensors[name].reshape(-1, config.width).squeeze(0)
        if isinstance(config, VisionConfig) and config.cls and len(tensors["pos_embed"]) == config.tokens():
            # the CLS token has no position there
            tensors["pos_embed"] = torch.cat([torch.zeros(1, config.width), tensors["pos_embed"]])
        return tensors, notes

    def left_over(self, layout: WeightNames) -> dict[str, list[str]]:
        """Return the names that were not taken, grouped under the descriptions in `layout`.

        Raises UserError for names that it does not describe.
        """
        groups: dict[str, list[str]] = {}
        for name in sorted(self.weights.keys() - self.taken):
            inner = name.removeprefix(layout.prefix)
            what = next((what for start, what in layout.left_over.items() if inner.startswith(start)), "")
            groups.setdefault(what, []).append(name)
        if unknown := groups.get(""):
            shapes = [f"{name} {tuple(self.weights[name].shape)}" for name in unknown]
            raise UserError(f"the weights in {self.place} hold tensors that no tower here has: {listed(shapes)}")
        return groups


def fold_normalisation(tensors: dict[str, Tensor], vision: VisionConfig, normalisation: Normalisation) -> bool:
    """Change a patch convolution for images of this `normalisation` into one for ImageNet's mean and deviation.

    w·(x - m₁)/s₁ is, in terms of y = (x - m₂)/s₂, (w s₂/s₁)·y + w·(m₂ - m₁)/s₁. The constant goes into the bias. If
    there is no bias, it goes into the patches' positions, with the same sum. Return False if nothing differs.
    """
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in normalisation)
    our_mean, our_std = (torch.tensor(values, dtype=torch.float64) for values in (IMAGENET_MEAN, IMAGENET_STD))
    if torch.equal(mean, our_mean) and torch.equal(std, our_std):
        return False
    weight = tensors["patch_embed.weight"].double()
    constant = weight.sum(dim=(2, 3)) @ ((our_mean - mean) / std)
    tensors["patch_embed.weight"] = (weight * (our_std / std)[:, None, None]).float()
    if vision.patch_bias:
        tensors["patch_embed.bias"] = (tensors["patch_embed.bias"].double() + constant).float()
    else:
        tensors["pos_embed"] = positions_with_bias(tensors["pos_embed"], constant, vision.prefix_tokens)
    return True


def positions_with_bias(positions: Tensor, bias: Tensor | None, prefix_tokens: int) -> Tensor:
    """Return `positions` [C + N, D] with the patch convolution's `bias` [D], if any, added to the rows of the patches.

    A class whose patch convolution has no bias then computes the same sum.
    """
    table = positions.detach().clone()
    if bias is not None:
        table[prefix_tokens:] += bias.detach()
    return table


def _vision_config(stock: Any, kind: str) -> VisionConfig:
    """Translate transformers' configuration of an image tower into ours. Raises NotPlain."""
    is_clip = kind.startswith("clip")
    is_siglip = kind.startswith("siglip")
    require(not getattr(stock, "use_swiglu_ffn", False), "its MLPs are gated (SwiGLU)")
    require(stock.num_channels == 3, f"it takes images of {stock.num_channels} channels")
    return VisionConfig(
        **_same_fields(stock),
        image_size=_side(stock.image_size),
        patch_size=_side(stock.patch_size),
        pre_norm=is_clip,
        pos_embed="learned",
        patch_bias=not is_clip,
        cls=not is_siglip,
        pool="mean" if is_siglip else "cls",
    )


def _same_fields(stock: Any) -> dict[str, Any]:
    """Translate both towers' fields of a transformers configuration into ours. Raises NotPlain."""
    require(stock.hidden_act in layouts.ACTIVATIONS, f"its activation is {stock.hidden_act}")
    hidden = getattr(stock, "intermediate_size", None) or int(stock.hidden_size * stock.mlp_ratio)
    return {
        "width": stock.hidden_size,
        "layers": stock.num_hidden_layers,
        "heads": stock.num_attention_heads,
        "mlp_ratio": _mlp_ratio(hidden, stock.hidden_size),
        "activation": layouts.ACTIVATIONS[stock.hidden_act],
        "norm_eps": stock.layer_norm_eps,
    }


def _normalisation(directory: Path, kind: str) -> Normalisation:
    """Return the normalisation of a transformers model: that of its image processor, else the usual one of its kind."""
    processor = read_json(directory / "preprocessor_config.json")
    processor = processor or read_json(directory / "processor_config.json").get("image_processor", {})
    if processor.get("do_normalize") is False:
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    mean, std = NORMALISED[next(name for name in NORMALISED if kind.startswith(name))]
    return processor.get("image_mean") or mean, processor.get("image_std") or std


def _timm_tower(model: Any) -> tuple[VisionConfig, WeightNames]:
    """Return the settings and names of timm's `VisionTransformer`. Raises NotPlain if it is more than a plain ViT.

    The settings are read off the modules, so a model on the "meta" device is enough.
    """
    kind = type(model).__name__
    require(kind == "VisionTransformer", f"it is a {kind}, not a plain VisionTransformer")
    for block in model.blocks:
        parts = [type(part).__name__ for part in (block, block.attn, block.mlp)]
        require(parts == ["Block", "Attention", "Mlp"], f"its blocks are made of {', '.join(parts)}")

    has_cls = model.cls_token is not None
    config = VisionConfig(
        **_block_fields(model.blocks, layouts.TIMM),
        image_size=_side(model.patch_embed.img_size),
        patch_size=_side(model.patch_embed.patch_size),
        pre_norm=not isinstance(model.norm_pre, nn.Identity),
        pos_embed="learned",
        patch_bias=model.patch_embed.proj.bias is not None,
        cls=has_cls,
        pool="cls" if has_cls and model.global_pool == "token" else "mean",
    )

    modules = {ours: other for ours, other in layouts.TIMM.modules.items() if ours != "norm"}
    for name in ("fc_norm", "norm"):
        if isinstance(getattr(model, name), nn.LayerNorm):
            modules["norm"] = name
    unbiased = tuple(name for name in layouts.LINEARS if model.blocks[0].get_submodule(name).bias is None)
    return config, replace(layouts.TIMM, modules=modules, unbiased=unbiased)


def open_clip_tower(visual: Any) -> tuple[VisionConfig, WeightNames]:
    """Return the settings and names of open_clip's own image tower. Raises NotPlain if it is more than a plain ViT."""
    require(type(visual).__name__ == "VisionTransformer", f"its image tower is a {type(visual).__name__}, not a ViT")
    config = VisionConfig(
        **_block_fields(visual.transformer.resblocks, layouts.OPEN_CLIP_VISION),
        image_size=_side(visual.image_size),
        patch_size=_side(visual.conv1.kernel_size),
        pre_norm=not isinstance(visual.ln_pre, nn.Identity),
        pos_embed="learned",
        patch_bias=False,
        pool="mean" if visual.pool_type == "avg" else "cls",
    )
    modules = dict(layouts.OPEN_CLIP_VISION.modules)
    if len(visual.ln_post.weight) != config.width:  # the norm of an attention pooling
        del modules["norm"]
    return config, replace(layouts.OPEN_CLIP_VISION, modules=modules)


def open_clip_text(text: Any) -> TextConfig:
    """Return the settings of open_clip's own text tower. Raises NotPlain if it is more than a plain transformer."""
    has_cls = text.cls_emb is not None
    require(has_cls or text.pool_type in ("last", "argmax", "eos"), f"it reads a text by pool_type {text.pool_type!r}")
    return TextConfig(
        **_block_fields(text.transformer.resblocks, layouts.OPEN_CLIP_TEXT),
        context_length=len(text.positional_embedding),
        vocab_size=text.vocab_size,
        pad_mask=has_cls,
        causal=text.attn_mask is not None,
        pool="cls" if has_cls or text.pool_type == "last" else "eos",
    )


def _block_fields(blocks: Any, layout: WeightNames) -> dict[str, Any]:
    """The fields of both towers, read off a library's blocks; raises NotPlain."""
    first = blocks[0]
    fc1 = first.get_submodule(layout.block["mlp.fc1"])
    if layout is not layouts.TIMM:
        for block in blocks:
            require(type(block).__name__ == "ResidualAttentionBlock", f"its blocks are {type(block).__name__}")
    return {
        "width": fc1.in_features,
        "layers": len(blocks),
        "heads": first.attn.num_heads,
        "mlp_ratio": _mlp_ratio(fc1.out_features, fc1.in_features),
        "activation": _activation(first.mlp.act if layout is layouts.TIMM else first.mlp.gelu),
        "norm_eps": first.get_submodule(layout.block["norm1"]).eps,
    }


def _activation(module: nn.Module) -> Activation:
    name = type(module).__name__
    if name in ("GELU", "GELUTanh"):
        is_tanh = name == "GELUTanh" or getattr(module, "approximate", "none") == "tanh"
        return "gelu_tanh" if is_tanh else "gelu"
    require(name == "QuickGELU", f"its activation is {name}")
    return "quick_gelu"


def _side(size: int | Sequence[int]) -> int:
    """The side of a square in pixels; raises NotPlain for other shapes."""
    height, width = (size, size) if isinstance(size, int) else size
    require(height == width, f"its images or patches are {height} × {width} pixels, which is not square")
    return int(height)


def _mlp_ratio(hidden: int, width: int) -> float:
    """The ratio whose product with `width`, cut to an integer as the blocks cut it, is `hidden`."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def require(condition: bool, reason: str) -> None:
    """Raise NotPlain with `reason` unless `condition` holds."""
    if not condition:
        raise NotPlain(reason)
