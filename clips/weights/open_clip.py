"""Both towers under the names of open_clip, both ways: any CLIP of plain transformers that it has a class for.

open_clip's patch convolution has no bias. Ours, if there is one (`vision.patch_bias`), is added to the positions of the
patch tokens, which is the same sum. For padding see clips/model/text.py and `open_clip_config`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clips.common.errors import UserError
from clips.common.files import from_json, read_bytes, read_json
from clips.common.tensors import build_for, read_weights, write_weights
from clips.config import Activation, ModelConfig, PositionTable, TextConfig, VisionConfig
from clips.data.images import IMAGENET_MEAN, IMAGENET_STD
from clips.data.tokenizer import CaptionTokenizer, build_tokenizer
from clips.model.clips import MAX_LOGIT_SCALE, CLIPSModel
from clips.model.layers import LAYER_NORM_EPS
from clips.model.vision import sincos_positions
from clips.weights.foreign import NORMALISED, Source, fold_normalisation, positions_with_bias
from clips.weights.layouts import OPEN_CLIP_TEXT, OPEN_CLIP_VISION

STOCK_EPS = 1e-5
"""LayerNorm's eps where open_clip's configuration names none."""
POSITION_TOLERANCE = 1e-4
"""How far positions in fp32 may be from a sin-cos table plus a constant to count as that."""
NO_PATCH_BIAS = 1e-5
"""Up to here that constant is the rounding of a table that was computed in fp32, and no patch bias."""
CLIPA_CONTEXT = 32
"""Slots of CLIPA's text towers, by which alone their configurations differ from those of CLIPS."""
BERT_NAMES = ("bert-base-uncased", "google-bert/bert-base-uncased")
"""Values of `hf_tokenizer_name` that mean this project's BERT tokenizer."""
VISION_FIELDS = {"image_size": 224, "patch_size": 16, "width": 768, "layers": 12, "mlp_ratio": 4.0}
TEXT_FIELDS = {"width": 512, "heads": 8, "layers": 12, "vocab_size": 49_408, "mlp_ratio": 4.0}
"""Fields of the same name and meaning in both configurations → open_clip's default."""
KNOWN = {
    "model_cfg": {
        *("embed_dim", "vision_cfg", "text_cfg", "custom_text", "quick_gelu"),
        *("init_logit_scale", "nonscalar_logit_scale", "output_dict"),
    },
    "vision_cfg": {
        *VISION_FIELDS,
        *("head_width", "no_ln_pre", "pos_embed_type", "pool_type", "final_ln_after_pool", "norm_kwargs", "act_kwargs"),
        *("output_tokens", "attn_pooler_queries", "attn_pooler_heads"),
    },
    "text_cfg": {
        *TEXT_FIELDS,
        *("context_length", "embed_cls", "no_causal_mask", "pool_type", "norm_kwargs", "act_kwargs"),
        *("pad_id", "eos_id", "hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs"),
        *("output_tokens", "final_ln_after_pool"),
    },
}
"""Fields of open_clip's configuration that are read here, or change nothing of a plain tower. Others must be PLAIN."""
PLAIN = (None, False, 0, "linear", "default")
"""Values of fields such as `proj_type` and `block_type` that mean "nothing special"."""
NO_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask", "text.attn_mask")
"""Entries of OpenAI's and older files that are settings or fixed masks."""
TRANSPOSED = {"visual.proj.weight": "visual.proj", "text.proj.weight": "text.text_projection"}
"""Name here → open_clip's, of the tensors that are transposed there."""


def _names(config: ModelConfig) -> dict[str, str]:
    """Name here → open_clip's, of all tensors there but that of an `embed_cls`."""
    absent = ("patch_embed.bias",) if config.vision.pre_norm else ("patch_embed.bias", "pre_norm")
    vision = OPEN_CLIP_VISION.names(config.vision.layers)
    text = OPEN_CLIP_TEXT.names(config.text.layers)
    return {
        **{f"visual.{ours}": f"visual.{theirs}" for ours, (theirs,) in vision.items() if not ours.startswith(absent)},
        **{f"text.{ours}": f"text.{theirs}" for ours, (theirs,) in text.items()},
        **TRANSPOSED,
        "logit_scale": "logit_scale",
    }


def logit_scale_parameter(model: CLIPSModel) -> Tensor:
    """The temperature as training uses it (at most MAX_LOGIT_SCALE), a scalar as open_clip keeps it."""
    return model.logit_scale.clamp(max=math.log(MAX_LOGIT_SCALE)).reshape(())


def has_cls_parameter(text: TextConfig) -> bool:
    """Whether the CLS of a text is a parameter there (`embed_cls`), and no token."""
    return text.pool == "cls" and text.pad_mask


def open_clip_lacks(config: ModelConfig) -> str | None:
    """Why no class of open_clip computes this model; None if one does."""
    vision, text = config.vision, config.text
    if not vision.cls:
        return "open_clip's own image tower always has a CLS token, this one has none (vision.cls=false)"
    if (vision.activation == "quick_gelu") != (text.activation == "quick_gelu"):
        return f"quick_gelu is one switch for both towers there, here {vision.activation} and {text.activation}"
    if text.pool == "eos" and text.pad_mask and not text.causal:
        return "open_clip masks padding only beside a CLS slot or a causal mask (text.pad_mask, text.pool=eos)"
    return None


def open_clip_config(config: ModelConfig, tokenizer: CaptionTokenizer) -> dict[str, Any]:
    """The content of open_clip_config.json; `open_clip_lacks` must be None.

    Text with a CLS and without padding mask is open_clip's own CLIPS layout (`tokenizer_mode="clips"`, CLS as a token
    in the last slot). With padding mask it is `embed_cls`: CLS is a parameter appended after `context_length − 1`
    ordinary slots, and open_clip masks padding as clips/model/text.py does. Without CLS it is read at its eos.
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
    """Both towers for stock open_clip (≥ 3.3); the captioner has no place there."""
    state = model.state_dict()
    bias = state.get("visual.patch_embed.bias")
    prefix_tokens = model.config.vision.prefix_tokens
    state["visual.pos_embed"] = positions_with_bias(model.visual.positions(), bias, prefix_tokens)
    state["logit_scale"] = logit_scale_parameter(model)
    for name in TRANSPOSED:
        state[name] = state[name].T
    tensors = {theirs: state[ours] for ours, theirs in _names(model.config).items()}
    if has_cls_parameter(model.config.text):
        tensors["text.cls_emb"] = state["text.token_embed.weight"][tokenizer.cls_id]

    directory.mkdir(parents=True, exist_ok=True)
    if not tokenizer.is_clip:
        tokenizer.save(directory)
    config = open_clip_config(model.config, tokenizer)
    (directory / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write_weights(tensors, directory / "open_clip_model.safetensors")


def import_open_clip(directory: Path) -> tuple[CLIPSModel, CaptionTokenizer]:
    """Read a checkpoint in open_clip's format: an export, an official checkpoint, any plain model of open_clip.

    Positions that are a fixed sin-cos table plus a constant become that table and a patch bias. The mean and deviation
    of its pictures go into the patch convolution. Tokenizer files may be missing if the configuration names BERT's, or
    none: CLIP's. Raises UserError naming a field that no tower here has, and weights that are missing or too many.
    """
    directory = Path(directory)
    config = read_open_clip_config(directory)
    files = sorted(directory.glob("open_clip*.safetensors")) or sorted(directory.glob("open_clip*.bin"))
    if not files:
        raise UserError(f"{directory} holds no open_clip*.safetensors or open_clip*.bin")
    weights = {name: tensor for name, tensor in read_weights(files[0]).items() if name not in NO_WEIGHTS}
    if "positional_embedding" in weights:  # the layout of open_clip's class CLIP: text tensors are at the top
        weights = {n if n.startswith(("visual.", "logit_")) else f"text.{n}": t for n, t in weights.items()}
    tokenizer = _open_clip_tokenizer(directory, config.text)

    source = Source(weights, files[0])
    tensors = source.take({ours: (theirs,) for ours, theirs in _names(config).items()})
    for name in TRANSPOSED:
        tensors[name] = tensors[name].T
    tensors["logit_scale"] = tensors["logit_scale"].reshape(1)
    if has_cls_parameter(config.text):
        cls_embedding = source.take({"cls": ("text.cls_emb",)})["cls"]
        tensors["text.token_embed.weight"][tokenizer.cls_id] = cls_embedding
    source.left_over(OPEN_CLIP_VISION)

    positions = tensors.pop("visual.pos_embed")
    precision = weights["visual.positional_embedding"].dtype
    vision, bias = _recognise_positions(positions, precision, config.vision, files[0])
    if vision.pos_embed == "learned":
        tensors["visual.pos_embed"] = positions
    else:
        tensors["visual.cls_token"] += positions[0]  # the tables' first row is zero
    if vision.patch_bias:
        tensors["visual.patch_embed.bias"] = bias
    vision = _fold_preprocessing(directory, tensors, vision)

    config = dataclasses.replace(config, vision=vision)
    model = build_for(lambda: CLIPSModel(config, tokenizer.pad_id), tensors, files[0])
    return model.eval(), tokenizer


def _recognise_positions(
    positions: Tensor, precision: torch.dtype, vision: VisionConfig, path: Path
) -> tuple[VisionConfig, Tensor]:
    """Which table `positions` [1 + N, D] are, and the patch bias [D] that was added to it; `precision`: in the file.

    Returns `vision` with both; `patch_bias` is false if there is no bias, as with learned positions.
    """
    grid = vision.image_size // vision.patch_size
    if positions.shape != (1 + grid**2, vision.width):
        raise UserError(
            f"{path}: visual.positional_embedding has shape {tuple(positions.shape)}, but "
            f"{(1 + grid**2, vision.width)} follows from image_size, patch_size and width of open_clip_config.json"
        )
    # What a value of this size is rounded by in the file: up to 5e-4 in fp16, 4e-3 in bf16.
    rounding = torch.finfo(precision).eps * positions.abs().max().item()
    fits: list[tuple[float, Any, Any]] = []
    for table in typing.get_args(PositionTable) if vision.width % 4 == 0 else ():
        rest = positions[1:] - sincos_positions(vision.width, grid, table)[1:]
        bias = rest.mean(dim=0)
        fits.append(((rest - bias).abs().max().item(), table, bias))
    no_fit: tuple[float, Any, Any] = (math.inf, None, None)
    distance, table, bias = min(fits, key=lambda fit: fit[0], default=no_fit)
    if not distance <= max(POSITION_TOLERANCE, rounding):
        return dataclasses.replace(vision, pos_embed="learned", patch_bias=False), torch.zeros(vision.width)
    has_bias = bias.abs().max().item() > max(NO_PATCH_BIAS, rounding)
    return dataclasses.replace(vision, pos_embed=table, patch_bias=has_bias), bias


def _fold_preprocessing(directory: Path, tensors: dict[str, Tensor], vision: VisionConfig) -> VisionConfig:
    """Make `tensors` take pictures normalised as here; `vision` with the patch bias that this may need."""
    stock = read_json(directory / "open_clip_config.json").get("preprocess_cfg", {})
    mean, std = NORMALISED["clip"]  # open_clip's own default
    normalisation = tuple(stock.get("mean") or mean), tuple(stock.get("std") or std)
    names = ("patch_embed.weight", "patch_embed.bias", "pos_embed")
    tower = {name: tensors[f"visual.{name}"] for name in names if f"visual.{name}" in tensors}
    if normalisation != (tuple(IMAGENET_MEAN), tuple(IMAGENET_STD)) and vision.pos_embed != "learned":
        vision = dataclasses.replace(vision, patch_bias=True)  # a fixed table cannot take the constant
        tower.setdefault("patch_embed.bias", torch.zeros(vision.width))
    fold_normalisation(tower, vision, normalisation)
    tensors |= {f"visual.{name}": tensor for name, tensor in tower.items()}
    return vision


def _open_clip_tokenizer(directory: Path, tower: TextConfig) -> CaptionTokenizer:
    """The tokenizer in `directory`, or CLIP's or BERT's if the configuration means those and brings no files.

    UserError if it is missing or does not fit the text tower.
    """
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
        raise UserError(
            f"{directory}: tokenizer of {tokenizer.vocab_size} ids, text_cfg.vocab_size here is {tower.vocab_size}"
        )
    eos_id = {"eos": text.get("eos_id", 2), "argmax": tokenizer.vocab_size - 1}.get(text.get("pool_type", "argmax"))
    if tower.pool == "eos" and tokenizer.eos_id != eos_id:
        raise UserError(
            f"{directory}: text_cfg.pool_type and eos_id read a text at token {eos_id}, the tokenizer ends it with "
            f"{tokenizer.eos_id}"
        )
    return tokenizer


def read_open_clip_config(directory: Path) -> ModelConfig:
    """The model in `directory`/open_clip_config.json; UserError names a field that no tower here has.

    Only `import_open_clip` finds out which positions are fixed, `patch_bias`, and the normalisation of pictures.
    """
    path = directory / "open_clip_config.json"
    try:
        return _model_config(from_json(read_bytes(path))["model_cfg"])
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not an open_clip configuration of a model with two towers: {error!r}") from None


def _model_config(stock: Mapping[str, Any]) -> ModelConfig:
    """open_clip's `model_cfg` → ModelConfig, with open_clip's defaults."""
    vision, text = stock["vision_cfg"], stock["text_cfg"]
    for part, fields in (("model_cfg", stock), ("vision_cfg", vision), ("text_cfg", text)):
        for name, value in fields.items():
            _require(name in KNOWN[part] or value in PLAIN, part, name, value)
    has_cls_emb = bool(text.get("embed_cls"))
    pool_type = text.get("pool_type", "argmax")
    _require(not has_cls_emb or bool(stock.get("custom_text")), "text_cfg", "embed_cls", True)
    _require(has_cls_emb or pool_type in ("last", "argmax", "eos"), "text_cfg", "pool_type", pool_type)
    is_clips = pool_type == "last" and not has_cls_emb
    kwargs = text.get("tokenizer_kwargs") or {}
    _require(set(kwargs) <= ({"strip_sep_token"} if is_clips else set()), "text_cfg", "tokenizer_kwargs", kwargs)
    if is_clips and "tokenizer_mode" not in text and text.get("context_length") == CLIPA_CONTEXT:
        raise UserError(
            f"text_cfg.context_length is {CLIPA_CONTEXT} and there is no tokenizer_mode: this is a CLIPA model, whose "
            'texts are laid out in another way; a CLIPS model of this length says tokenizer_mode "clips"'
        )
    image_pool = vision.get("pool_type", "tok")
    _require(image_pool in ("tok", "avg"), "vision_cfg", "pool_type", image_pool)
    after_pool = bool(vision.get("final_ln_after_pool"))  # for one token it is the same
    _require(after_pool or image_pool == "tok", "vision_cfg", "final_ln_after_pool", after_pool)
    for name in ("image_size", "layers"):
        _require(isinstance(vision.get(name, 1), int), "vision_cfg", name, vision.get(name))
    # Files converted from the JAX original of CLIPS leave eps and the kind of GELU at open_clip's defaults, although
    # theirs are 1e-6 and, in text, tanh: that moves features by about 1e-3.
    eps = LAYER_NORM_EPS if is_clips else STOCK_EPS
    quick = bool(stock.get("quick_gelu"))
    of_vision = _same_fields("vision_cfg", vision, VISION_FIELDS, quick, "gelu", eps)
    of_text = _same_fields("text_cfg", text, TEXT_FIELDS, quick, "gelu_tanh" if is_clips else "gelu", eps)
    return ModelConfig(
        vision=VisionConfig(
            **of_vision,
            heads=of_vision["width"] // vision.get("head_width", 64),
            pre_norm=not vision.get("no_ln_pre", False),
            pos_embed="sincos" if vision.get("pos_embed_type") == "sin_cos_2d" else "learned",
            patch_bias=False,
            pool="cls" if image_pool == "tok" else "mean",
        ),
        text=TextConfig(
            **of_text,
            context_length=text.get("context_length", 77) + has_cls_emb,
            pad_mask=has_cls_emb,
            causal=not text.get("no_causal_mask", False),
            pool="cls" if has_cls_emb or is_clips else "eos",
        ),
        captioner=None,
        embed_dim=stock["embed_dim"],
    )


def _same_fields(
    part: str, fields: Mapping[str, Any], defaults: Mapping[str, float], quick: bool, activation: Activation, eps: float
) -> dict[str, Any]:
    """The fields that both towers have; `activation` and `eps` where the file names none."""
    act_kwargs = fields.get("act_kwargs") or {}
    norm_kwargs = fields.get("norm_kwargs") or {}
    _require(set(act_kwargs) <= (set() if quick else {"approximate"}), part, "act_kwargs", act_kwargs)
    _require(set(norm_kwargs) <= {"eps"}, part, "norm_kwargs", norm_kwargs)
    if quick:
        activation = "quick_gelu"
    elif act_kwargs:
        activation = "gelu_tanh" if act_kwargs["approximate"] == "tanh" else "gelu"
    same = {name: type(default)(fields.get(name, default)) for name, default in defaults.items()}
    return {**same, "activation": activation, "norm_eps": float(norm_kwargs.get("eps", eps))}


def _require(condition: bool, part: str, name: str, value: object) -> None:
    if not condition:
        raise UserError(f"{part}.{name} is {value!r}: no tower here has that")
