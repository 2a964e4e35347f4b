"""Both towers as transformers' CLIPModel, with its processor and tokenizer: `export/hf`.

CLIPModel reads an image off its CLS token and a text at its eos, under a causal mask. `--tower clip_model` trains such
towers. SiglipModel pools an image by attention after the last LayerNorm; no tower here does.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clips.common.files import read_json, write_json
from clips.common.tensors import write_weights
from clips.config import ModelConfig
from clips.data.images import IMAGENET_MEAN, IMAGENET_STD
from clips.data.tokenizer import CaptionTokenizer, clean
from clips.model.clips import CLIPSModel
from clips.weights.foreign import plain_vit
from clips.weights.hf_vit import stock_fields, transformers_vit
from clips.weights.layouts import CLIP_TEXT
from clips.weights.open_clip import logit_scale_parameter

OLD_EOS = 2
"""If eos has this id, CLIPModel reads a text at its largest id instead."""


def clip_model_lacks(config: ModelConfig) -> str | None:
    """Return why transformers' CLIPModel does not compute this model and how to train one that it does, else None."""
    vision, text = config.vision, config.text
    parts = {
        "a LayerNorm before the image tower's blocks (vision.pre_norm=true)": vision.pre_norm,
        "images that are read off a CLS token (vision.pool=cls)": vision.cls and vision.pool == "cls",
        "texts that are read at their eos (text.pool=eos)": text.pool == "eos",
        "words that see only the words before them (text.causal=true)": text.causal,
    }
    lacks = [part for part, is_present in parts.items() if not is_present]
    return f"CLIPModel needs {'; '.join(lacks)}. `--tower clip_model` trains such towers" if lacks else None


def write_hf_clip(model: CLIPSModel, tokenizer: CaptionTokenizer, directory: Path) -> None:
    """Write the model, its image processor and its tokenizer; `clip_model_lacks` must be None."""
    from transformers import CLIPConfig, CLIPImageProcessor

    _, vision, tensors = transformers_vit(plain_vit(model.visual))
    text, state = model.config.text, model.state_dict()
    towards = (
        {OLD_EOS: tokenizer.vocab_size - 1, tokenizer.vocab_size - 1: OLD_EOS} if tokenizer.eos_id == OLD_EOS else {}
    )
    tower = {name.removeprefix("text."): tensor for name, tensor in state.items() if name.startswith("text.")}
    tower["token_embed.weight"] = _moved(tower["token_embed.weight"], towards)
    tensors |= CLIP_TEXT.write(tower, text.layers)
    tensors |= {"visual_projection.weight": state["visual.proj.weight"], "text_projection.weight": tower["proj.weight"]}
    tensors["logit_scale"] = logit_scale_parameter(model)
    settings: dict[str, Any] = {
        **stock_fields(text),
        "max_position_embeddings": text.context_length,
        "vocab_size": text.vocab_size,
        "pad_token_id": tokenizer.pad_id,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": towards.get(tokenizer.eos_id, tokenizer.eos_id),
        "projection_dim": model.config.embed_dim,
    }
    config = CLIPConfig(
        text_config=settings,
        vision_config=vision.to_dict() | {"projection_dim": model.config.embed_dim},
        projection_dim=model.config.embed_dim,
        architectures=["CLIPModel"],
    )
    directory.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(directory)
    write_weights({name: tensor.detach().float() for name, tensor in tensors.items()}, directory / "model.safetensors")
    side = {"height": vision.image_size, "width": vision.image_size}
    CLIPImageProcessor(
        size=side, do_center_crop=False, resample=2, image_mean=list(IMAGENET_MEAN), image_std=list(IMAGENET_STD)
    ).save_pretrained(directory)
    tokenizer.save(directory)
    _exchange(directory / "tokenizer.json", towards)
    facts = {"processor_class": "CLIPProcessor", "model_max_length": text.context_length}
    for name in ("tokenizer_config.json", "preprocessor_config.json"):
        write_json(directory / name, read_json(directory / name) | facts)


def _moved(table_VD: Tensor, towards: dict[int, int]) -> Tensor:
    """The table with the rows of the ids in `towards` exchanged."""
    rows = torch.arange(len(table_VD))
    for old, new in towards.items():
        rows[new] = old
    return table_VD[rows]


def _exchange(file: Path, towards: dict[int, int]) -> None:
    """Give the tokens of `towards` each other's ids in a tokenizer.json."""
    content = read_json(file)
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {token: towards.get(number, number) for token, number in vocabulary.items()}
    for token in content["added_tokens"]:
        token["id"] = towards.get(token["id"], token["id"])
    for token in (content["post_processor"] or {}).get("special_tokens", {}).values():
        token["ids"] = [towards.get(number, number) for number in token["ids"]]
    write_json(file, content)


@torch.no_grad()
def hf_clip_features(directory: Path, images: Tensor, texts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
    """Return features of images [B, 3, S, S] and texts, L2-normalised, and ln(1 / temperature) by stock transformers.

    Texts are cleaned as in training, because transformers does not unescape HTML.
    """
    from transformers import AutoTokenizer, CLIPModel

    from clips.common.opening import NO_CODE, load_weights, loading

    with loading("export hf", directory):
        stock, _ = load_weights(CLIPModel, "export hf", directory)
    words: Any = AutoTokenizer.from_pretrained(directory, **NO_CODE)
    ids = words(list(map(clean, texts)), padding=True, truncation=True, return_tensors="pt")
    output = stock.eval()(pixel_values=images, **ids)
    return output.image_embeds, output.text_embeds, stock.logit_scale.detach()
