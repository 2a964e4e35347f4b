"""Read and write both towers in open_clip's format: any CLIP of plain transformers that open_clip has a class for.

open_clip's patch convolution has no bias. Ours, if there is one (`vision.patch_bias`), is added to the positions of the
patch tokens, with the same sum. For padding see clips/model/text.py and `open_clip_config`.
"""

import dataclasses
import json
import math
import typing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clips.common.errors import UserError
from clips.common.files import from_json, read_bytes, read_json
from clips.common.opening import loading
from clips.common.tensors import read_weights, write_weights
from clips.config import ModelConfig, PositionTable, TextConfig
from clips.data.images import IMAGENET_MEAN, IMAGENET_STD
from clips.data.tokenizer import CaptionTokenizer, build_tokenizer
from clips.model.clips import MAX_LOGIT_SCALE, CLIPSModel
from clips.model.layers import LAYER_NORM_EPS
from clips.model.vision import sincos_positions
from clips.weights.foreign import (
    NORMALISED,
    InitialWeights,
    NamedWeights,
    NotPlain,
    open_clip_text,
    open_clip_tower,
    plain_vit,
    positions_with_bias,
    require,
)
from clips.weights.layouts import OPEN_CLIP_TEXT, OPEN_CLIP_VISION

POSITION_TOLERANCE = 1e-4
"""Largest distance in fp32 at which positions count as a sin-cos table plus a constant."""
NO_PATCH_BIAS = 1e-5
"""Up to this size the constant is the rounding error of a table computed in fp32, not a patch bias."""
CLIPA_CONTEXT = 32
"""Context length of CLIPA's text towers, the only difference of their configurations from those of CLIPS."""
BERT_NAMES = ("bert-base-uncased", "google-bert/bert-base-uncased")
"""Values of `hf_tokenizer_name` that mean this project's BERT tokenizer."""
VISION_FIELDS = ("image_size", "patch_size", "width", "layers", "mlp_ratio")
TEXT_FIELDS = ("width", "heads", "layers", "vocab_size", "mlp_ratio")
"""Fields of the same name and meaning in both configurations."""
NO_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask", "text.attn_mask")
"""Entries of OpenAI's and older files that are settings or fixed masks."""


def logit_scale_parameter(model: CLIPSModel) -> Tensor:
    """Return open_clip's `logit_scale`: ln(1 / temperature), a scalar clamped to ln(MAX_LOGIT_SCALE) as in training."""
    return model.logit_scale.clamp(max=math.log(MAX_LOGIT_SCALE)).reshape(())


def has_cls_parameter(text: TextConfig) -> bool:
    """Return True if the CLS of a text is a parameter in open_clip (`embed_cls`), not a token."""
    return text.pool == "cls" and text.pad_mask


def open_clip_lacks(config: ModelConfig) -> str | None:
    """Return why no class of open_clip computes this model, or None if one does."""
    vision, text = config.vision, config.text
    if not vision.cls:
        return "open_clip's own image tower always has a CLS token, this one has none (vision.cls=false)"
    if (vision.activation == "quick_gelu") != (text.activation == "quick_gelu"):
        return f"open_clip has one quick_gelu for both towers; these have {vision.activation} and {text.activation}"
    if text.pool == "eos" and text.pad_mask and not text.causal:
        return "open_clip masks padding only beside a CLS slot or a causal mask (text.pad_mask, text.pool=eos)"
    return None


def open_clip_config(config: ModelConfig, tokenizer: CaptionTokenizer) -> dict[str, Any]:
    """Return the content of open_clip_config.json; `open_clip_lacks` must be None.

    Text with a CLS and without padding mask is open_clip's own CLIPS layout (`tokenizer_mode="clips"`, CLS as a token
    in the last slot). With padding mask it is `embed_cls`: CLS is a parameter appended after `context_length − 1`
    ordinary slots, and open_clip masks padding as clips/model/text.py does. Without CLS a text is read at its eos.
    """
    vision, text = config.vision, config.text
    stock: dict[str, Any] = {
        "model_cfg": {
            "embed_dim": config.embed_dim,
            "custom_text": True,
            "vision_cfg": {
                **{name: getattr(vision, name) for name in VISION_FIELDS},
                "head_width": vision.width // vision.heads,
                "pos_embed_type": "learnable" if vision.pos_embed == "learned" else "sin_cos_2d",
                "no_ln_pre": not vision.pre_norm,
                "final_ln_after_pool": True,
                "pool_type": "avg" if vision.pool == "mean" else "tok",
                "norm_kwargs": {"eps": vision.norm_eps},
            },
            "text_cfg": {
                **{name: getattr(text, name) for name in TEXT_FIELDS},
                "context_length": text.context_length,
                "hf_tokenizer_name": "local",
                "pad_id": tokenizer.pad_id,
                "eos_id": tokenizer.eos_id,
                "no_causal_mask": not text.causal,
                "pool_type": "last" if text.pool == "cls" else "eos",
                "norm_kwargs": {"eps": text.norm_eps},
            },
        },
        "preprocess_cfg": {
            "size": vision.image_size,
            "mean": list(IMAGENET_MEAN),
            "std": list(IMAGENET_STD),
            "interpolation": "bilinear",
            "resize_mode": "squash",
        },
    }
    model, fields = stock["model_cfg"], stock["model_cfg"]["text_cfg"]
    if text.activation == "quick_gelu":
        model["quick_gelu"] = True
    for part, tower in (("vision_cfg", vision), ("text_cfg", text)):
        if tower.activation == "gelu_tanh":
            model[part]["act_kwargs"] = {"approximate": "tanh"}
    if tokenizer.is_clip:
        del fields["hf_tokenizer_name"]  # open_clip's own tokenizer
    if has_cls_parameter(text):
        fields |= {"context_length": text.context_length - 1, "embed_cls": True}
    elif text.pool == "cls":
        fields["tokenizer_mode"] = "clips"
    return stock


def write_open_clip(model: CLIPSModel, tokenizer: CaptionTokenizer, directory: Path) -> None:
    """Write open_clip_config.json, weights and tokenizer of both towers for open_clip ≥ 3.3; it has no captioner."""
    visual, text = dict(plain_vit(model.visual).tensors), model.text.state_dict()
    bias = visual.pop("patch_embed.bias", None)
    visual["pos_embed"] = positions_with_bias(visual["pos_embed"], bias, model.config.vision.prefix_tokens)
    tensors = OPEN_CLIP_VISION.write(visual, model.config.vision.layers)
    tensors |= OPEN_CLIP_TEXT.write(text, model.config.text.layers)
    tensors |= {"visual.proj": visual["proj.weight"].T, "text.text_projection": text["proj.weight"].T}
    tensors["logit_scale"] = logit_scale_parameter(model)
    if has_cls_parameter(model.config.text):
        tensors["text.cls_emb"] = text["token_embed.weight"][tokenizer.cls_id]

    directory.mkdir(parents=True, exist_ok=True)
    if not tokenizer.is_clip:
        tokenizer.save(directory)
    config = open_clip_config(model.config, tokenizer)
    (directory / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write_weights(tensors, directory / "open_clip_model.safetensors")


def read_open_clip(directory: Path) -> InitialWeights:
    """Read a checkpoint in open_clip's format: an export, an official checkpoint, any plain model of open_clip.

    Positions that are a fixed sin-cos table plus a constant become that table and a patch bias. Tokenizer files may be
    missing if the configuration names BERT's, or none (then it is CLIP's). Raises UserError like `read_transformers`.
    """
    config = read_open_clip_config(directory)
    files = sorted(directory.glob("open_clip*.safetensors")) or sorted(directory.glob("open_clip*.bin"))
    if not files:
        raise UserError(f"{directory} holds no open_clip*.safetensors or open_clip*.bin")
    weights = {name: tensor for name, tensor in read_weights(files[0]).items() if name not in NO_WEIGHTS}
    if "positional_embedding" in weights:  # the layout of open_clip's class CLIP: text tensors are at the top
        weights = {n if n.startswith(("visual.", "logit_")) else f"text.{n}": t for n, t in weights.items()}
    tokenizer = _open_clip_tokenizer(directory, config.text)
    preprocess = read_json(directory / "open_clip_config.json").get("preprocess_cfg", {})
    mean, std = NORMALISED["clip"]  # open_clip's own default
    normalisation = preprocess.get("mean") or mean, preprocess.get("std") or std

    source = NamedWeights(weights, files[0])
    if has_cls_parameter(config.text):
        cls_embedding = source.take({"cls": ("text.cls_emb",)})["cls"]
    foreign = source.initial_weights(
        "open_clip", config.vision, OPEN_CLIP_VISION, normalisation, config.text, OPEN_CLIP_TEXT, tokenizer
    )
    if has_cls_parameter(config.text):
        foreign.tensors["text.token_embed.weight"][tokenizer.cls_id] = cls_embedding
    return _with_fixed_positions(foreign, weights["visual.positional_embedding"], files[0])


def _with_fixed_positions(foreign: InitialWeights, stored: Tensor, path: Path) -> InitialWeights:
    """Replace learned positions by a fixed table [1 + N, D] and a patch bias, if that is what they are."""
    vision, tensors = foreign.vision, dict(foreign.tensors)
    positions = tensors.pop("visual.pos_embed")
    shape = (1 + vision.tokens(), vision.width)
    if positions.shape != shape:
        raise UserError(f"{path}: positional_embedding is {tuple(positions.shape)}, by image_size it would be {shape}")
    # The rounding error of a value of this size in the file: up to 5e-4 in fp16, 4e-3 in bf16.
    rounding = torch.finfo(stored.dtype).eps * stored.abs().max().item()
    fits: list[tuple[float, Any, Any]] = []
    for table in typing.get_args(PositionTable) if vision.width % 4 == 0 else ():
        rest = positions[1:] - sincos_positions(vision.width, vision.image_size // vision.patch_size, table)[1:]
        bias = rest.mean(dim=0)
        fits.append(((rest - bias).abs().max().item(), table, bias))
    no_fit: tuple[float, Any, Any] = (math.inf, None, None)
    distance, table, bias = min(fits, key=lambda fit: fit[0], default=no_fit)
    if not distance <= max(POSITION_TOLERANCE, rounding):
        return foreign
    tensors["visual.cls_token"] += positions[0]  # the tables' first row is zero
    # A constant that comes from folding the normalisation is not a rounding error.
    least = max(NO_PATCH_BIAS, rounding) if torch.equal(positions, stored.float()) else 0
    has_bias = bias.abs().max().item() > least
    if has_bias:
        tensors["visual.patch_embed.bias"] = bias
    return dataclasses.replace(
        foreign, vision=dataclasses.replace(vision, pos_embed=table, patch_bias=has_bias), tensors=tensors
    )


def _open_clip_tokenizer(directory: Path, tower: TextConfig) -> CaptionTokenizer:
    """Return the tokenizer in `directory`, or CLIP's or BERT's if the configuration means those without files."""
    text = read_json(directory / "open_clip_config.json")["model_cfg"]["text_cfg"]
    name = text.get("hf_tokenizer_name")
    has_files = any((directory / file).is_file() for file in ("tokenizer.json", "vocab.txt"))
    if not name:
        tokenizer = build_tokenizer("clip")
    elif name in BERT_NAMES and not has_files:
        tokenizer = build_tokenizer("bert")
    else:
        tokenizer = CaptionTokenizer.load(directory)
    if tokenizer.vocab_size > tower.vocab_size:
        raise UserError(f"{directory}: tokenizer of {tokenizer.vocab_size} ids, text_cfg.vocab_size {tower.vocab_size}")
    eos_id = {"eos": text.get("eos_id", 2), "argmax": tokenizer.vocab_size - 1}.get(text.get("pool_type", "argmax"))
    if tower.pool == "eos" and tokenizer.eos_id != eos_id:
        raise UserError(f"{directory}: text_cfg.eos_id is {eos_id}, the tokenizer ends texts with {tokenizer.eos_id}")
    return tokenizer


def read_open_clip_config(directory: Path) -> ModelConfig:
    """Return the configuration of the model in `directory`, as open_clip builds it from its JSON file without weights.

    Only `read_open_clip` can tell whether positions are fixed, and what `patch_bias` is. Raises UserError if no towers
    here compute the model.
    """
    path = directory / "open_clip_config.json"
    with loading("open_clip", directory):
        stock = from_json(read_bytes(path))["model_cfg"]
        try:
            return _model_config(stock)
        except NotPlain as reason:
            raise UserError(f"{path}: {reason}, which no tower here has") from None


def _model_config(stock: dict[str, Any]) -> ModelConfig:
    """Translate open_clip's `model_cfg` into a ModelConfig. Raises NotPlain."""
    from open_clip import CustomTextCLIP

    vision, text = dict(stock["vision_cfg"]), dict(stock["text_cfg"])
    for part, name in ((vision, "timm_model_name"), (text, "hf_model_name")):  # they would be built by other libraries
        require(not part.get(name), f"{name} is {part.get(name)!r}")
    is_clips = text.get("pool_type") == "last" and not text.get("embed_cls")
    kwargs = text.get("tokenizer_kwargs") or {}
    require(set(kwargs) <= ({"strip_sep_token"} if is_clips else set()), f"tokenizer_kwargs is {kwargs}")
    if is_clips:
        if "tokenizer_mode" not in text and text.get("context_length") == CLIPA_CONTEXT:
            raise UserError(f"CLIPA (context_length {CLIPA_CONTEXT}, no tokenizer_mode) lays texts out differently")
        # Files converted from the JAX original of CLIPS leave eps and the kind of GELU at open_clip's defaults,
        # although theirs are 1e-6 and, in text, tanh: that moves features by about 1e-3.
        for part in (vision, text):
            part["norm_kwargs"] = {"eps": LAYER_NORM_EPS} | (part.get("norm_kwargs") or {})
        if not stock.get("quick_gelu"):
            text["act_kwargs"] = text.get("act_kwargs") or {"approximate": "tanh"}
    vision["pos_embed_type"] = "learnable"  # open_clip would compute a table of any size
    fields = {name: value for name, value in stock.items() if name != "custom_text"}
    with torch.device("meta"):
        model = CustomTextCLIP(**fields | {"vision_cfg": vision, "text_cfg": text})
    config, layout = open_clip_tower(model.visual)
    require("norm" in layout.modules and model.visual.attn_pool is None, "it pools by attention")
    after_pool = model.visual.final_ln_after_pool or model.visual.pool_type == "tok"  # for one token it is the same
    require(after_pool and model.visual.pool_type != "none", "it does not pool before its last LayerNorm")
    return ModelConfig(vision=config, text=open_clip_text(model.text), captioner=None, embed_dim=stock["embed_dim"])
