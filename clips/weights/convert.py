"""Convert a model from one format into another.

The model is written next to its target and loaded there by the library of the format. It is moved to its target once
random images and real captions have equal features.
"""

import argparse
import io
import json
import shutil
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from clips.common.errors import UserError
from clips.common.tensors import read_weights
from clips.config import VisionConfig
from clips.data.tokenizer import build_tokenizer
from clips.model.vision import VisionTower
from clips.weights.card import write_conversion_card
from clips.weights.export import Features, model_features, native_features, open_clip_features, write_native
from clips.weights.hf_vit import hf_features, write_hf_vit
from clips.weights.initial import read_initial
from clips.weights.load import LoadedModel, load_model
from clips.weights.open_clip import CLIPA_CONTEXT, open_clip_lacks, write_open_clip

LIMIT = 1e-5
"""Largest difference of an L2-normalised fp32 feature that counts as equal."""
TEXTS = (
    "a red dog",
    "",
    "Tom & Jerry at the café, 25 cats and 3.50 dollars",
    "The image shows a wooden table with two cups of coffee. A cat sleeps on the chair behind it; it is raining. " * 6,
)
OFFICIAL_WEIGHTS = "open_clip_pytorch_model.bin"


def convert_from_flags(flags: argparse.Namespace) -> None:
    """Run scripts/convert.py: convert a model, and print the largest differences between its features."""
    differences = convert(flags.source, Path(flags.target), flags.to, check_only=flags.check)
    for name, difference in differences.items():
        print(f"{name}: largest difference {difference:.1e}")
    print(f"{flags.source} can be converted; nothing was written" if flags.check else f"written: {flags.target}")


def convert(source: str, target: Path, to: str, *, check_only: bool = False) -> dict[str, float]:
    """Convert the model `source` to the format `to`, check that its features stay equal, and write it to `target`.

    Return the largest difference for each kind of feature. With `check_only` nothing is left on disk. Raises UserError
    if `target` exists, if the format cannot hold the model, or if a difference is above LIMIT.
    """
    if target.exists():
        raise UserError(f"{target} exists; convert.py overwrites nothing: name another directory, or remove it")
    if not check_only:
        target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".convert-", dir=None if check_only else target.parent) as place:
        written = Path(place) / target.name
        differences = _write(source, written, to)
        for name, difference in differences.items():
            if not difference <= LIMIT:  # also when it is NaN
                raise UserError(f"{source} as {to} is another model: {name} differ by {difference:.1e}, limit {LIMIT}")
        if not check_only:
            write_conversion_card(written, to, source, differences)
            written.rename(target)
    return differences


@torch.no_grad()
def _write(source: str, directory: Path, to: str) -> dict[str, float]:
    """Write the model `source` in the format `to`, and compare what the library of the format computes with it."""
    if to == "transformers":
        return _write_tower(source, directory)
    loaded = load_model(source)
    model, tokenizer = loaded.model, loaded.tokenizer
    size = model.config.vision.image_size
    model.visual.set_image_size(size)
    images = _images(size)
    ids = tokenizer.for_tower(list(TEXTS), model.config.text)
    expected = model_features(model, images, ids)

    if to == "native":
        write_native(model, loaded.run, tokenizer, directory)
        return _compared(expected, native_features(directory, images, list(TEXTS)))
    if reason := open_clip_lacks(model.config) or (_official_lacks(loaded) if to == "official" else None):
        raise UserError(f"{source} cannot be converted: {reason}")
    write_open_clip(model, tokenizer, directory)
    if to == "open_clip":
        return _compared(expected, open_clip_features(directory, images, list(TEXTS)))

    _make_official(directory)
    differences = _compared(expected, open_clip_features(directory, images, ids))
    again = load_model(directory)
    features = model_features(again.model, images, again.tokenizer.for_tower(list(TEXTS), again.model.config.text))
    return differences | {f"read back, {name}": value for name, value in _compared(expected, features).items()}


def _make_official(directory: Path) -> None:
    """Rewrite an open_clip model as the authors of CLIPS store one: open_clip's class CLIP, whose text tensors are at
    the top level, in a torch file, without tokenizer files. Their `CLIPTextCfg` takes no field that it does not know.
    """
    config = json.loads((directory / "open_clip_config.json").read_text(encoding="utf-8"))
    weights = read_weights(directory / "open_clip_model.safetensors")
    shutil.rmtree(directory)
    directory.mkdir()
    del config["model_cfg"]["custom_text"]
    text = config["model_cfg"]["text_cfg"]
    for name in ("tokenizer_mode", "eos_id"):  # of stock open_clip alone; no tower that reads a CLS looks at its eos
        del text[name]
    text |= {"hf_tokenizer_name": "bert-base-uncased", "tokenizer_kwargs": {"strip_sep_token": True}}
    (directory / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    file = io.BytesIO()  # writing to the disk itself, `torch.save` reports a full one as a RuntimeError
    torch.save({name.removeprefix("text."): tensor for name, tensor in weights.items()}, file)
    (directory / OFFICIAL_WEIGHTS).write_bytes(file.getbuffer())


def _official_lacks(loaded: LoadedModel) -> str | None:
    text = loaded.model.config.text
    tokenizers = (loaded.tokenizer, build_tokenizer("bert"))
    ours, bert = ((t.pad_id, t.bos_id, t.eos_id, t.cls_id, t.vocab_size, t.encode(list(TEXTS))) for t in tokenizers)
    if text.pad_mask or text.causal or text.pool != "cls":
        return "their text towers attend to everything, padding included, and read a CLS (pad_mask, causal, pool)"
    if ours != bert:
        return "their tokenizer is BERT's (bert-base-uncased), this model has another"
    if text.context_length == CLIPA_CONTEXT:
        return f"their code would take a context of {CLIPA_CONTEXT} slots for a CLIPA model's"
    return None


def _write_tower(source: str, directory: Path) -> dict[str, float]:
    """Write only the image tower; the source may have no other."""
    initial = read_initial(source, "FROM")
    embed_dim = initial.architecture.get("model.embed_dim", 0)
    vision = VisionConfig(**initial.architecture["model.vision"])
    tower = VisionTower(vision, embed_dim).eval()
    weights = {name.removeprefix("visual."): t for name, t in initial.tensors.items() if name.startswith("visual.")}
    tower.load_state_dict(weights)
    write_hf_vit(tower, directory)
    images = _images(vision.image_size)
    pooled, tokens = tower(images)
    stock, embedding = hf_features(directory, images, vision.pool)
    differences = {"image tokens": _difference(F.normalize(tokens, dim=-1), F.normalize(stock, dim=-1))}
    if embed_dim:
        features = F.normalize(tower.proj(pooled), dim=-1)
        differences["image features"] = _difference(features, F.normalize(embedding, dim=-1))
    return differences


def _images(size: int) -> Tensor:
    return torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0))


def _compared(expected: Features, features: Features) -> dict[str, float]:
    names = ("image features", "text features", "logit scale")
    return {name: _difference(a, b) for name, a, b in zip(names, expected, features, strict=True)}


def _difference(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()
