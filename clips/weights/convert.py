"""A model from one format into another.

The model is written beside its target and opened there by the library of the format. It takes its place once random
images and real captions have equal features.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from clips.common.errors import UserError
from clips.common.tensors import read_weights
from clips.config import VisionConfig
from clips.data.tokenizer import CaptionTokenizer, build_tokenizer
from clips.model.clips import CLIPSModel
from clips.model.vision import VisionTower
from clips.weights.card import write_conversion_card
from clips.weights.export import Features, model_features, native_features, open_clip_features, write_native
from clips.weights.hf_vit import hf_features, hf_tokens, write_hf_vit
from clips.weights.initial import read_initial
from clips.weights.load import LoadedModel, load_model
from clips.weights.open_clip import CLIPA_CONTEXT, import_open_clip, open_clip_lacks, write_open_clip

LIMIT = 1e-5
"""Largest difference of an L2-normalised feature, fp32, that counts as none."""
IMAGES = 4
TEXTS = (
    "a red dog",
    "",
    "Tom & Jerry at the café, 25 cats and 3.50 dollars",
    "The image shows a wooden table with two cups of coffee. A cat sleeps on the chair behind it; it is raining. " * 6,
)
OFFICIAL_WEIGHTS = "open_clip_pytorch_model.bin"
Differences = dict[str, float]
"""Name of a feature → its largest difference."""


def convert_from_flags(flags: argparse.Namespace) -> None:
    """What scripts/convert.py does."""
    differences = convert(flags.source, Path(flags.target), flags.to, check_only=flags.check)
    for name, difference in differences.items():
        print(f"{name}: largest difference {difference:.1e}")
    print(f"{flags.source} can be converted; nothing was written" if flags.check else f"written: {flags.target}")


def convert(source: str, target: Path, to: str, *, check_only: bool = False) -> Differences:
    """Write the model `source` to the directory `target` in the format `to`, if it is the same there.

    `check_only` writes nothing. Raises UserError if `target` exists, if the format has no place for the model, and if a
    feature differs by more than LIMIT.
    """
    if target.exists():
        raise UserError(f"{target} exists; convert.py overwrites nothing: name another directory, or remove it")
    if not check_only:
        target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".convert-", dir=None if check_only else target.parent) as place:
        written = Path(place) / target.name
        differences = WRITERS[to](source, written)
        for name, difference in differences.items():
            if not difference <= LIMIT:  # also when it is NaN
                raise UserError(f"{source} as {to} is another model: {name} differ by {difference:.1e}, limit {LIMIT}")
        if not check_only:
            write_conversion_card(written, to, source, differences)
            written.rename(target)
    return differences


# -------------------------------------------------------------------------------------------------------- the formats
def _to_native(source: str, directory: Path) -> Differences:
    loaded = load_model(source)
    write_native(loaded.model, loaded.run, loaded.tokenizer, directory)
    images, wanted = _wanted(loaded)
    return _compared(wanted, native_features(directory, images, list(TEXTS)))


def _to_open_clip(source: str, directory: Path) -> Differences:
    loaded = load_model(source)
    if reason := open_clip_lacks(loaded.model.config):
        raise UserError(f"{source}: {reason}")
    write_open_clip(loaded.model, loaded.tokenizer, directory)
    images, wanted = _wanted(loaded)
    return _compared(wanted, open_clip_features(directory, images, list(TEXTS)))


def _to_official(source: str, directory: Path) -> Differences:
    """The format of the authors of CLIPS: open_clip's class CLIP, whose text tensors are at the top level,
    in a torch file, without tokenizer files. Their `CLIPTextCfg` takes no field that it does not know."""
    loaded = load_model(source)
    if reason := _official_lacks(loaded):
        raise UserError(f"{source} cannot be an official checkpoint: {reason}")
    with tempfile.TemporaryDirectory() as place:
        write_open_clip(loaded.model, loaded.tokenizer, Path(place))
        weights = read_weights(Path(place) / "open_clip_model.safetensors")
        config = json.loads((Path(place) / "open_clip_config.json").read_text())
    del config["model_cfg"]["custom_text"]
    for name in ("tokenizer_mode", "eos_id"):  # of stock open_clip alone; no tower that reads a CLS looks at its eos
        del config["model_cfg"]["text_cfg"][name]
    text = {"hf_tokenizer_name": "bert-base-uncased", "tokenizer_kwargs": {"strip_sep_token": True}}
    config["model_cfg"]["text_cfg"] |= text
    directory.mkdir()
    (directory / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    torch.save({name.removeprefix("text."): tensor for name, tensor in weights.items()}, directory / OFFICIAL_WEIGHTS)
    images, wanted = _wanted(loaded)
    ids = loaded.tokenizer.for_tower(list(TEXTS), loaded.model.config.text)
    stock = _compared(wanted, open_clip_features(directory, images, ids))
    again = _compared(wanted, _features(*import_open_clip(directory), images))
    return stock | {f"read back, {name}": difference for name, difference in again.items()}


def _official_lacks(loaded: LoadedModel) -> str | None:
    text = loaded.model.config.text
    tokenizers = (loaded.tokenizer, build_tokenizer("bert"))
    mine, bert = ((t.pad_id, t.bos_id, t.eos_id, t.cls_id, t.vocab_size, t.encode(list(TEXTS))) for t in tokenizers)
    if text.pad_mask or text.causal or text.pool != "cls":
        reason = "their text towers attend to everything, padding included, and read a CLS (pad_mask, causal, pool)"
    elif mine != bert:
        reason = "their tokenizer is BERT's (bert-base-uncased), this model has another"
    elif text.context_length == CLIPA_CONTEXT:
        reason = f"a context of {CLIPA_CONTEXT} slots is taken for a CLIPA model's there"
    else:
        reason = None
    return open_clip_lacks(loaded.model.config) or reason


@torch.no_grad()
def _to_transformers(source: str, directory: Path) -> Differences:
    """The image tower alone, which may be all that there is."""
    initial = read_initial(source, "FROM")
    embed_dim = initial.architecture.get("model.embed_dim", 0)
    vision = VisionConfig(**initial.architecture["model.vision"])
    tower = VisionTower(vision, embed_dim).eval()
    weights = {name.removeprefix("visual."): t for name, t in initial.tensors.items() if name.startswith("visual.")}
    tower.load_state_dict(weights)
    write_hf_vit(tower, directory)
    images = _images(vision)
    pooled, tokens = tower(images)
    stock, _ = hf_tokens(directory, images)
    found = {"image tokens": _difference(F.normalize(tokens, dim=-1), F.normalize(stock, dim=-1))}
    if embed_dim:
        _, embedding = hf_features(directory, images, vision.pool)
        features = F.normalize(tower.proj(pooled), dim=-1)
        found["image features"] = _difference(features, F.normalize(embedding, dim=-1))
    return found


WRITERS: dict[str, Callable[[str, Path], Differences]] = {
    "native": _to_native,
    "open_clip": _to_open_clip,
    "official": _to_official,
    "transformers": _to_transformers,
}


# ---------------------------------------------------------------------------------------------------------- comparing
def _images(vision: VisionConfig) -> Tensor:
    size = vision.image_size
    return torch.randn(IMAGES, 3, size, size, generator=torch.Generator().manual_seed(0))


def _wanted(loaded: LoadedModel) -> tuple[Tensor, Features]:
    """Images of the model's size, and its own features of them and of TEXTS."""
    images = _images(loaded.model.visual.config)
    loaded.model.visual.set_image_size(images.shape[-1])
    return images, _features(loaded.model, loaded.tokenizer, images)


@torch.no_grad()
def _features(model: CLIPSModel, tokenizer: CaptionTokenizer, images: Tensor) -> Features:
    return model_features(model, images, tokenizer.for_tower(list(TEXTS), model.config.text))


def _compared(wanted: Features, found: Features) -> Differences:
    names = ("image features", "text features", "temperature")
    pairs = zip(wanted, found, strict=True)
    return {name: _difference(a, b) for name, (a, b) in zip(names, pairs, strict=False)}


def _difference(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()
