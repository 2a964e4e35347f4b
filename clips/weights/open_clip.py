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
from clips.common.tensors import build_for, listed, read_weights, write_weights
from clips.config import Activation, ModelConfig, PositionTable, TextConfig, VisionConfig
from clips.data.images import IMAGENET_MEAN, IMAGENET_STD
from clips.data.tokenizer import CaptionTokenizer, build_tokenizer
from clips.model.clips import MAX_LOGIT_SCALE, CLIPSModel
from clips.model.layers import LAYER_NORM_EPS
from clips.model.vision import sincos_positions
from clips.weights.foreign import NORMALISED, fold_normalisation
from clips.weights.layouts import OPEN_CLIP_TEXT, OPEN_CLIP_VISION
from clips.weights.plain_vit import positions_with_bias

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
READ = {
    "model_cfg": {"embed_dim", "vision_cfg", "text_cfg", "custom_text", "quick_gelu"},
    "vision_cfg": {
        *VISION_FIELDS,
        *("head_width", "no_ln_pre", "pos_embed_type", "pool_type", "final_ln_after_pool", "norm_kwargs", "act_kwargs"),
    },
    "text_cfg": {
        *TEXT_FIELDS,
        *("context_length", "embed_cls", "no_causal_mask", "pool_type", "norm_kwargs", "act_kwargs"),
        *("pad_id", "eos_id", "hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs"),
    },
}
"""The fields of open_clip's configuration that mean something here."""
SAYS_NOTHING = {
    "model_cfg": {"init_logit_scale", "nonscalar_logit_scale", "output_dict"},
    "vision_cfg": {"output_tokens", "attn_pooler_queries", "attn_pooler_heads"},
    "text_cfg": {"output_tokens", "final_ln_after_pool"},
}
"""Fields that change nothing of what a plain tower computes. Every other field must be unset or plain."""
PLAIN = (None, False, 0, "linear", "default")
"""Values of fields such as `proj_type` and `block_type` that mean "nothing special"."""
NO_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask", "text.attn_mask")
"""Entries of OpenAI's and older files that are settings or fixed masks."""
TRANSPOSED = {"visual.proj.weight": "visual.proj", "text.proj.weight": "text.text_projection"}
"""Name here → open_clip's, of the tensors that are transposed there."""
CHANGED = ("visual.cls_token", "visual.pos_embed", "visual.patch_embed.bias")
"""Tensors that open_clip keeps in another form, or in another tensor."""


def _names(config: ModelConfig) -> dict[str, str]:
    """Name here → open_clip's, of the tensors that are the same there."""
    vision, text = OPEN_CLIP_VISION.names(config.vision.layers), OPEN_CLIP_TEXT.names(config.text.layers)
    absent = (*CHANGED, *(() if config.vision.pre_norm else ("visual.pre_norm",)))
    towers = (("visual", vision), ("text", text))
    found = {f"{tower}.{ours}": f"{tower}.{theirs}" for tower, names in towers for ours, (theirs,) in names.items()}
    return {ours: theirs for ours, theirs in found.items() if not ours.startswith(absent)}


def logit_scale_parameter(model: CLIPSModel) -> Tensor:
    """The temperature as training uses it (at most MAX_LOGIT_SCALE), a scalar as open_clip keeps it."""
    return model.logit_scale.clamp(max=math.log(MAX_LOGIT_SCALE)).reshape(())


def open_clip_lacks(config: ModelConfig) -> str | None:
    """Why no class of open_clip computes this model; None if one does."""
    vision, text = config.vision, config.text
    if not config.embed_dim:
        return "a model of open_clip has features of texts, and this one was trained without a contrastive loss"
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
    if text.pool == "cls" and text.pad_mask:
        fields |= {"context_length": text.context_length - 1, "embed_cls": True}
    elif text.pool == "cls":
        fields["tokenizer_mode"] = "clips"
    return stock


def write_open_clip(model: CLIPSModel, tokenizer: CaptionTokenizer, directory: Path) -> None:
    """Both towers for stock open_clip (≥ 3.3); the captioner has no place there."""
    state, text = model.state_dict(), model.config.text
    tensors = {theirs: state[ours] for ours, theirs in _names(model.config).items()}
    tensors |= {theirs: state[ours].T for ours, theirs in TRANSPOSED.items()}
    tensors["logit_scale"] = logit_scale_parameter(model)
    tensors["visual.class_embedding"] = state["visual.cls_token"]
    bias = state.get("visual.patch_embed.bias")
    positions = positions_with_bias(model.visual.positions(), bias, model.config.vision.prefix_tokens)
    tensors["visual.positional_embedding"] = positions
    if text.pool == "cls" and text.pad_mask:
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
    source = {name: tensor for name, tensor in read_weights(files[0]).items() if name not in NO_WEIGHTS}
    if "positional_embedding" in source:  # the layout of open_clip's class CLIP: text tensors are at the top
        source = {n if n.startswith(("visual.", "logit_")) else f"text.{n}": t for n, t in source.items()}
    tokenizer = _open_clip_tokenizer(directory, config.text)

    copied = _names(config)
    wanted = {*copied.values(), *TRANSPOSED.values()}
    wanted |= {"logit_scale", "visual.class_embedding", "visual.positional_embedding"}
    has_cls_emb = config.text.pool == "cls" and config.text.pad_mask
    wanted |= {"text.cls_emb"} if has_cls_emb else set()
    problems = {"lacks": wanted - source.keys(), "holds besides": source.keys() - wanted}
    if found := [f"{what} {listed(sorted(names))}" for what, names in problems.items() if names]:
        raise UserError(f"{files[0]} {' and '.join(found)}: it is not the model that open_clip_config.json describes")
    tensors = {ours: source[theirs].float() for ours, theirs in copied.items()}
    tensors |= {ours: source[theirs].float().T for ours, theirs in TRANSPOSED.items()}
    stored, cls_token = source["visual.positional_embedding"], source["visual.class_embedding"].float()
    vision, bias = _recognise_positions(stored, config.vision, files[0])
    if vision.pos_embed == "learned":
        tensors |= {"visual.pos_embed": stored.float(), "visual.cls_token": cls_token}
    else:
        tensors["visual.cls_token"] = cls_token + stored[0].float()  # the tables' first row is zero
    if vision.patch_bias:
        tensors["visual.patch_embed.bias"] = bias
    vision = _fold_preprocessing(directory, tensors, vision)
    if has_cls_emb:
        tensors["text.token_embed.weight"] = tensors["text.token_embed.weight"].clone()
        tensors["text.token_embed.weight"][tokenizer.cls_id] = source["text.cls_emb"].float()
    tensors["logit_scale"] = source["logit_scale"].reshape(1)
    config = dataclasses.replace(config, vision=vision)
    model = build_for(lambda: CLIPSModel(config, tokenizer.pad_id), tensors, files[0])
    return model.eval(), tokenizer


def _recognise_positions(stored: Tensor, vision: VisionConfig, path: Path) -> tuple[VisionConfig, Tensor]:
    """Which table `stored` [1 + N, D] is, and the patch bias [D] that was added to it.

    Returns `vision` with both; `patch_bias` is false if there is no bias, as with learned positions.
    """
    grid = vision.image_size // vision.patch_size
    if stored.shape != (1 + grid**2, vision.width):
        raise UserError(
            f"{path}: visual.positional_embedding has shape {tuple(stored.shape)}, but {(1 + grid**2, vision.width)} "
            "follows from image_size, patch_size and width of open_clip_config.json"
        )
    if not stored.isfinite().all():
        raise UserError(f"{path}: visual.positional_embedding is not finite: the file is damaged")
    # What a value of this size is rounded by in the file: up to 5e-4 in fp16, 4e-3 in bf16.
    rounding = torch.finfo(stored.dtype).eps * stored.abs().max().item()
    found: dict[PositionTable, tuple[float, Tensor]] = {}
    for table in typing.get_args(PositionTable) if vision.width % 4 == 0 else ():
        rest = stored[1:].float() - sincos_positions(vision.width, grid, table)[1:]
        bias = rest.mean(dim=0)
        found[table] = (rest - bias).abs().max().item(), bias
    table = min(found, key=lambda name: found[name][0], default=None)
    if table is None or found[table][0] > max(POSITION_TOLERANCE, rounding):
        return dataclasses.replace(vision, pos_embed="learned", patch_bias=False), torch.zeros(vision.width)
    bias = found[table][1]
    has_bias = bias.abs().max().item() > max(NO_PATCH_BIAS, rounding)
    return dataclasses.replace(vision, pos_embed=table, patch_bias=has_bias), bias


def _fold_preprocessing(directory: Path, tensors: dict[str, Tensor], vision: VisionConfig) -> VisionConfig:
    """Make `tensors` take pictures normalised as here; `vision` with the patch bias that this may need."""
    stock = read_json(directory / "open_clip_config.json").get("preprocess_cfg", {})
    mean, std = NORMALISED["clip"]  # open_clip's own default
    there = tuple(stock.get("mean") or mean), tuple(stock.get("std") or std)
    names = ("patch_embed.weight", "patch_embed.bias", "pos_embed")
    tower = {name: tensors[f"visual.{name}"] for name in names if f"visual.{name}" in tensors}
    if there != (tuple(IMAGENET_MEAN), tuple(IMAGENET_STD)) and vision.pos_embed != "learned":
        vision = dataclasses.replace(vision, patch_bias=True)  # a fixed table cannot take the constant
        tower.setdefault("patch_embed.bias", torch.zeros(vision.width))
    fold_normalisation(tower, vision, there)
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
    if tower.pool == "cls" and tokenizer.cls_id is None:
        raise UserError(f"{directory}: text_cfg.pool_type reads a CLS in the last slot, which its tokenizer has not")
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
            _require(name in READ[part] | SAYS_NOTHING[part] or value in PLAIN, part, name, value)
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
    of_vision = _same_fields(vision, VISION_FIELDS)
    return ModelConfig(
        vision=VisionConfig(
            **of_vision,
            heads=of_vision["width"] // vision.get("head_width", 64),
            pre_norm=not vision.get("no_ln_pre", False),
            pos_embed="sincos" if vision.get("pos_embed_type") == "sin_cos_2d" else "learned",
            patch_bias=False,
            activation=_activation("vision_cfg", vision, quick, "gelu"),
            pool="cls" if image_pool == "tok" else "mean",
            norm_eps=_norm_eps("vision_cfg", vision, eps),
        ),
        text=TextConfig(
            **_same_fields(text, TEXT_FIELDS),
            context_length=text.get("context_length", 77) + has_cls_emb,
            pad_mask=has_cls_emb,
            activation=_activation("text_cfg", text, quick, "gelu_tanh" if is_clips else "gelu"),
            causal=not text.get("no_causal_mask", False),
            pool="cls" if has_cls_emb or is_clips else "eos",
            norm_eps=_norm_eps("text_cfg", text, eps),
        ),
        captioner=None,
        embed_dim=stock["embed_dim"],
    )


def _same_fields(fields: Mapping[str, Any], defaults: Mapping[str, float]) -> dict[str, Any]:
    return {name: type(default)(fields.get(name, default)) for name, default in defaults.items()}


def _activation(part: str, fields: Mapping[str, Any], quick: bool, default: Activation) -> Activation:
    kwargs = fields.get("act_kwargs") or {}
    _require(set(kwargs) <= (set() if quick else {"approximate"}), part, "act_kwargs", kwargs)
    if quick or not kwargs:
        return "quick_gelu" if quick else default
    return "gelu_tanh" if kwargs["approximate"] == "tanh" else "gelu"


def _norm_eps(part: str, fields: Mapping[str, Any], default: float) -> float:
    kwargs = fields.get("norm_kwargs") or {}
    _require(set(kwargs) <= {"eps"}, part, "norm_kwargs", kwargs)
    return float(kwargs.get("eps", default))


def _require(condition: bool, part: str, name: str, value: object) -> None:
    if not condition:
        raise UserError(f"{part}.{name} is {value!r}: no tower here has that")
