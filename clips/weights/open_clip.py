"""Both towers under the names of open_clip, both ways.

open_clip's and CLIP's patch convolutions have no bias. Ours, if there is one (`vision.patch_bias`), is added to the
positions of the patch tokens, which is the same sum. Padding: see clips/model/text.py and `open_clip_config`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from clips.common.errors import UserError
from clips.common.tensors import assign_weights, read_weights, write_weights
from clips.config import ModelConfig, PositionTable, TextConfig, VisionConfig
from clips.data.images import IMAGENET_MEAN, IMAGENET_STD
from clips.data.tokenizer import CaptionTokenizer, build_tokenizer
from clips.model.clips import MAX_LOGIT_SCALE, CLIPSModel
from clips.model.layers import LAYER_NORM_EPS
from clips.model.vision import sincos_positions
from clips.weights.hf_vit import positions_with_bias

POSITION_TOLERANCE = 1e-4
"""How far positions read from a file may be from a sin-cos table plus a constant."""
NO_PATCH_BIAS = 1e-5
"""Up to here that constant is the rounding of a table that was computed in fp32, and no patch bias."""
CLIPA_CONTEXT = 32
"""Slots of CLIPA's text towers, by which alone their configurations differ from those of CLIPS."""
BERT_NAMES = ("bert-base-uncased", "google-bert/bert-base-uncased")
"""What `hf_tokenizer_name` says where this project's BERT tokenizer is meant."""
#: our name → open_clip's, inside a block
OPEN_CLIP_BLOCK = {
    "norm1.weight": "ln_1.weight",
    "norm1.bias": "ln_1.bias",
    "attn.qkv.weight": "attn.in_proj_weight",
    "attn.qkv.bias": "attn.in_proj_bias",
    "attn.proj.weight": "attn.out_proj.weight",
    "attn.proj.bias": "attn.out_proj.bias",
    "norm2.weight": "ln_2.weight",
    "norm2.bias": "ln_2.bias",
    "mlp.fc1.weight": "mlp.c_fc.weight",
    "mlp.fc1.bias": "mlp.c_fc.bias",
    "mlp.fc2.weight": "mlp.c_proj.weight",
    "mlp.fc2.bias": "mlp.c_proj.bias",
}


def _open_clip_blocks(blocks: str, layers: int) -> dict[str, str]:
    """Our name → open_clip's for every tensor of one tower's blocks; `blocks` is "visual" or "text"."""
    return {
        f"{blocks}.blocks.{i}.{ours}": f"{blocks}.transformer.resblocks.{i}.{theirs}"
        for i in range(layers)
        for ours, theirs in OPEN_CLIP_BLOCK.items()
    }


def _open_clip_names(config: ModelConfig) -> dict[str, str]:
    """Our name → open_clip's, for the tensors that are copied as they are."""
    norms = {"visual.norm": "visual.ln_post", "text.norm": "text.ln_final"}
    if config.vision.pre_norm:
        norms["visual.pre_norm"] = "visual.ln_pre"
    return {
        "visual.patch_embed.weight": "visual.conv1.weight",
        "text.token_embed.weight": "text.token_embedding.weight",
        "text.pos_embed": "text.positional_embedding",
        **{f"{ours}.{kind}": f"{theirs}.{kind}" for ours, theirs in norms.items() for kind in ("weight", "bias")},
        **_open_clip_blocks("visual", config.vision.layers),
        **_open_clip_blocks("text", config.text.layers),
    }


#: our name → open_clip's, for the tensors that are transposed
OPEN_CLIP_TRANSPOSED = {"visual.proj.weight": "visual.proj", "text.proj.weight": "text.text_projection"}


def logit_scale_parameter(model: CLIPSModel) -> Tensor:
    """The temperature as training uses it (at most MAX_LOGIT_SCALE), a scalar as open_clip keeps it."""
    return model.logit_scale.clamp(max=math.log(MAX_LOGIT_SCALE)).reshape(())


def open_clip_lacks(config: ModelConfig) -> str | None:
    """Why no class of open_clip computes this model; None where one does."""
    vision, text = config.vision, config.text
    if not vision.cls:
        return "open_clip's own image tower always has a CLS token, this one has none (vision.cls=false)"
    if (vision.activation == "quick_gelu") != (text.activation == "quick_gelu"):
        return f"quick_gelu is one switch for both towers there, here {vision.activation} and {text.activation}"
    if text.pool == "eos" and text.pad_mask and not text.causal:
        return "open_clip masks padding only beside a CLS slot or a causal mask (text.pad_mask, text.pool=eos)"
    return None


def open_clip_config(config: ModelConfig, pad_id: int, eos_id: int) -> dict[str, Any]:
    """The content of open_clip_config.json.

    Text without padding mask is open_clip's own CLIPS layout (`tokenizer_mode="clips"`, CLS as a token in the last
    slot). With padding mask it is `embed_cls`: CLS is a parameter appended after `context_length − 1` ordinary slots,
    and open_clip masks padding as clips/model/text.py does.
    """
    vision, text = config.vision, config.text
    masked = {"context_length": text.context_length - 1, "embed_cls": True}
    unmasked = {"context_length": text.context_length, "tokenizer_mode": "clips"}
    return {
        "model_cfg": {
            "embed_dim": config.embed_dim,
            "custom_text": True,
            "vision_cfg": {
                "image_size": vision.image_size,
                "patch_size": vision.patch_size,
                "width": vision.width,
                "layers": vision.layers,
                "head_width": vision.width // vision.heads,
                "mlp_ratio": vision.mlp_ratio,
                "pos_embed_type": "sin_cos_2d",
                "no_ln_pre": not vision.pre_norm,
                "final_ln_after_pool": True,
                "pool_type": "avg",
                "norm_kwargs": {"eps": LAYER_NORM_EPS},
            },
            "text_cfg": {
                "vocab_size": text.vocab_size,
                "hf_tokenizer_name": "local",
                "width": text.width,
                "heads": text.heads,
                "layers": text.layers,
                "mlp_ratio": text.mlp_ratio,
                "pad_id": pad_id,
                "eos_id": eos_id,
                "no_causal_mask": True,
                "pool_type": "last",
                "norm_kwargs": {"eps": LAYER_NORM_EPS},
                "act_kwargs": {"approximate": "tanh"},
                **(masked if text.pad_mask else unmasked),
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


def write_open_clip(model: CLIPSModel, tokenizer: CaptionTokenizer, directory: Path) -> None:
    """Both towers for stock open_clip (≥ 3.3); the captioner has no place there."""
    state = model.state_dict()
    tensors = {theirs: state[ours] for ours, theirs in _open_clip_names(model.config).items()}
    tensors |= {theirs: state[ours].T for ours, theirs in OPEN_CLIP_TRANSPOSED.items()}
    tensors["logit_scale"] = logit_scale_parameter(model)
    tensors["visual.class_embedding"] = state["visual.cls_token"]
    tensors["visual.positional_embedding"] = positions_with_bias(model.visual)
    if model.config.text.pad_mask:
        tensors["text.cls_emb"] = state["text.token_embed.weight"][tokenizer.cls_id]
    tokenizer.save(directory)
    config = open_clip_config(model.config, tokenizer.pad_id, tokenizer.eos_id)
    (directory / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    write_weights(tensors, directory / "open_clip_model.safetensors")


def import_open_clip(directory: Path) -> tuple[CLIPSModel, CaptionTokenizer]:
    """Read a CLIPS checkpoint in open_clip's format (config, weights and tokenizer files in `directory`).

    Works for the exports written here, for the checkpoints of CLIPS and OpenVision as their authors publish them, and
    for others of the same architecture whose positions are one of the fixed sin-cos tables plus a constant; anything
    else is refused with a UserError. There is no captioner in such a file.
    LayerNorm's eps and the kind of GELU are always CLIPS' own (1e-6, tanh in text): files converted from the JAX
    original leave them at open_clip's defaults, which moves features by about 1e-3.
    Tokenizer files may be missing where the configuration names BERT's.
    """
    directory = Path(directory)
    config = read_open_clip_config(directory)
    files = sorted(directory.glob("open_clip*.safetensors")) or sorted(directory.glob("open_clip*.bin"))
    if not files:
        raise UserError(f"{directory} holds no open_clip*.safetensors or open_clip*.bin")
    source = read_weights(files[0])
    if "positional_embedding" in source:  # the layout of open_clip's class CLIP: text tensors stand at the top
        source = {n if n.startswith(("visual.", "logit_")) else f"text.{n}": t for n, t in source.items()}
    tokenizer = _open_clip_tokenizer(directory, config.text.vocab_size)

    copied = _open_clip_names(config)
    special = {"logit_scale", "visual.class_embedding", "visual.positional_embedding"} | (
        {"text.cls_emb"} & set(source)
    )
    missing = sorted((set(copied.values()) | set(OPEN_CLIP_TRANSPOSED.values()) | special) - set(source))
    if missing:
        raise UserError(f"{files[0]} lacks {', '.join(missing[:5])}: not a CLIPS model as its configuration says")
    tensors = {ours: source[theirs] for ours, theirs in copied.items()}
    tensors |= {ours: source[theirs].T for ours, theirs in OPEN_CLIP_TRANSPOSED.items()}
    stored = source["visual.positional_embedding"].float()
    vision, bias = _recognise_positions(stored, config.vision, files[0])
    if bias is not None:
        tensors["visual.patch_embed.bias"] = bias
    tensors["visual.cls_token"] = source["visual.class_embedding"] + stored[0]  # the tables' first row is zero
    if "text.cls_emb" in source:
        tensors["text.token_embed.weight"] = tensors["text.token_embed.weight"].clone()
        tensors["text.token_embed.weight"][tokenizer.cls_id] = source["text.cls_emb"]
    model = CLIPSModel(dataclasses.replace(config, vision=vision), tokenizer.pad_id)
    tensors["logit_scale"] = source["logit_scale"].reshape(model.logit_scale.shape)
    assign_weights(model, tensors, files[0])
    return model.eval(), tokenizer


def _recognise_positions(stored: Tensor, vision: VisionConfig, path: Path) -> tuple[VisionConfig, Tensor | None]:
    """Which table `stored` [1 + N, D] is, and the patch bias [D] that was added to it (None: no bias).

    Returns `vision` with both; raises UserError where no table fits.
    """
    grid = vision.image_size // vision.patch_size
    if stored.shape != (1 + grid**2, vision.width):
        raise UserError(
            f"{path}: visual.positional_embedding has shape {tuple(stored.shape)}, but {grid} × {grid} patches of "
            f"width {vision.width} need {(1 + grid**2, vision.width)}: image_size, patch_size or width of "
            "open_clip_config.json are not those of the weights"
        )
    found: dict[PositionTable, tuple[float, Tensor]] = {}
    for table in typing.get_args(PositionTable):
        rest = stored[1:] - sincos_positions(vision.width, grid, table)[1:]
        bias = rest.mean(dim=0)
        found[table] = (rest - bias).abs().max().item(), bias
    table = min(found, key=lambda name: found[name][0])
    difference, bias = found[table]
    if not difference <= POSITION_TOLERANCE:  # also when it is NaN
        differences = ", ".join(f"{largest:.1e} from {name}" for name, (largest, _) in found.items())
        raise UserError(
            f"{path}: the image positions are learned, not a fixed sin-cos table of CLIPS: visual.positional_embedding "
            f"differs by up to {differences}"
        )
    has_bias = bias.abs().max().item() > NO_PATCH_BIAS
    return dataclasses.replace(vision, pos_embed=table, patch_bias=has_bias), bias if has_bias else None


def _open_clip_tokenizer(directory: Path, vocab_size: int) -> CaptionTokenizer:
    """The tokenizer in `directory`, or this project's own BERT where the configuration names it and brings no files.

    UserError where there is neither, or more ids than the text tower's `vocab_size`.
    """
    text = json.loads((directory / "open_clip_config.json").read_text())["model_cfg"]["text_cfg"]
    has_files = any((directory / name).is_file() for name in ("tokenizer.json", "vocab.txt"))
    if text.get("hf_tokenizer_name") in BERT_NAMES and not has_files:
        tokenizer = build_tokenizer("bert")
    else:
        tokenizer = CaptionTokenizer.load(directory)
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"{directory}: the tokenizer has {tokenizer.vocab_size} ids, text_cfg.vocab_size of open_clip_config.json "
            f"is {vocab_size}: they are not of one model"
        )
    return tokenizer


def read_open_clip_config(directory: Path) -> ModelConfig:
    """What `directory`/open_clip_config.json says of a CLIPS model; UserError where it is another architecture.

    `pos_embed` and `patch_bias` are not in it but in the weights (`import_open_clip`).
    """
    path = directory / "open_clip_config.json"
    try:
        return _model_config(json.loads(path.read_text())["model_cfg"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not an open_clip configuration of a CLIPS model: {error!r}") from None


def _model_config(stock: Mapping[str, Any]) -> ModelConfig:
    """open_clip's `model_cfg` → ModelConfig; UserError names what CLIPS does not have."""
    vision, text = stock["vision_cfg"], stock["text_cfg"]
    pad_mask = bool(text.get("embed_cls", False))
    config = ModelConfig(
        vision=VisionConfig(
            width=vision["width"],
            layers=vision["layers"],
            heads=vision["width"] // vision.get("head_width", 64),
            image_size=vision["image_size"],
            patch_size=vision["patch_size"],
            mlp_ratio=float(vision.get("mlp_ratio", 4.0)),
            pre_norm=not vision.get("no_ln_pre", False),
        ),
        text=TextConfig(
            width=text["width"],
            layers=text["layers"],
            heads=text["heads"],
            context_length=text["context_length"] + pad_mask,
            vocab_size=text["vocab_size"],
            mlp_ratio=float(text.get("mlp_ratio", 4.0)),
            pad_mask=pad_mask,
        ),
        captioner=None,
        embed_dim=stock["embed_dim"],
    )
    ours = open_clip_config(config, text.get("pad_id", 0), text.get("eos_id", 2))["model_cfg"]
    for part in ("vision_cfg", "text_cfg"):
        for key in ("pool_type", "final_ln_after_pool", "no_causal_mask"):
            if stock[part].get(key) != ours[part].get(key):
                raise UserError(
                    f"{part}.{key} is {stock[part].get(key)!r}, a CLIPS model has {ours[part].get(key)!r}: "
                    "this is another architecture"
                )
    if not pad_mask and "tokenizer_mode" not in text and config.text.context_length == CLIPA_CONTEXT:
        raise UserError(
            f"text_cfg.context_length is {CLIPA_CONTEXT} and there is no tokenizer_mode: this is a CLIPA model, whose "
            'texts are laid out in another way; a CLIPS model of this length says tokenizer_mode "clips"'
        )
    return config
