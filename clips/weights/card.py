"""Model cards of exports: a README.md with the hub's header, from templates/card.md.j2.

A card shows only figures that were measured on these weights, and names no place of this machine.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import ModelCardData
from markupsafe import Markup

from clips.common.page import Table, render
from clips.common.plots import pretty
from clips.common.rundir import by_test_set
from clips.common.tensors import hash_weights
from clips.config import ModelConfig, RunConfig
from clips.model.clips import CLIPSModel

HEADERS: dict[str, dict[str, Any]] = {
    "native": {"library_name": "clips-mllm", "pipeline_tag": "zero-shot-image-classification"},
    "open_clip": {"library_name": "open_clip", "pipeline_tag": "zero-shot-image-classification"},
    "hf": {"library_name": "transformers", "pipeline_tag": "zero-shot-image-classification"},
    "hf_vit": {"library_name": "transformers", "pipeline_tag": "image-feature-extraction"},
}
"""Format → what the hub's header says of it."""
_OPEN_CLIP = """import open_clip

source = "local-dir:."
model, _, preprocess = open_clip.create_model_and_transforms(source)"""
CONVERSIONS = {
    "native": (
        "native",
        "A vision–language encoder in CLIPS-MLLM's own format.",
        'from clips import CLIPS\n\nsource = "."\nmodel = CLIPS.from_pretrained(source)',
    ),
    "open_clip": ("open_clip", "A vision–language encoder in open_clip's format.", _OPEN_CLIP),
    "official": (
        "open_clip",
        "A vision–language encoder in the format of the authors of CLIPS, for their fork of open_clip and for stock.",
        _OPEN_CLIP,
    ),
    "transformers": (
        "hf_vit",
        "An image tower for transformers.",
        'from transformers import AutoModel\n\nsource = "."\nmodel = AutoModel.from_pretrained(source)',
    ),
}
"""Format of a conversion → its header's key in HEADERS, a sentence, and the code that opens it."""
SHOWN = ("_r1", "_top1")
"""Ends of the names of the figures that a card shows."""


def write_cards(
    directory: Path,
    model: CLIPSModel,
    run: RunConfig,
    *,
    name: str,
    evaluations: Iterable[dict[str, Any]],
    samples: int | None,
) -> None:
    """Write a README.md for each format below `directory`.

    `name` is the model's name. `evaluations` are the contents of `clips.evaluation.figures.write_figures`; those of
    other weights, of another resolution or of a part of a set are left out. `samples`: how many the weights have seen;
    None if unknown.
    """
    weights = hash_weights(model.state_dict()).hexdigest()
    size = run.model.vision.image_size
    asked = (weights, size, None)
    of_these = [one for one in evaluations if tuple(map(one.get, ("weights", "image_size", "limit"))) == asked]
    shown = {
        "name": name,
        "model": run.model,
        "facts": Table(("", ""), _facts(run, samples, weights)),
        "figures": {
            test_set: _figures(figures)
            for one in of_these
            for test_set, figures in by_test_set(one["figures"], one["test_set"]).items()
        },
        "has_sizes": any(phase.sizes for phase in run.phases),
        "is_demo": run.data.train == "demo",
        "is_imported": run.recipe == "imported",
    }
    for kind, header in HEADERS.items():
        if not (directory / kind).is_dir():
            continue
        if not run.model.embed_dim:
            header = header | {"pipeline_tag": "image-feature-extraction"}
        data = ModelCardData(**header, tags=["clips", "clips-mllm", *({"vision"} if kind == "hf_vit" else {"clip"})])
        classes = _transformers_classes(directory / kind) if kind == "hf_vit" else {}
        card = render("clips.weights", "card.md.j2", kind=kind, header=Markup(data.to_yaml()), **shown, **classes)
        (directory / kind / "README.md").write_text(card, encoding="utf-8")


def write_conversion_card(directory: Path, to: str, source: str, differences: Mapping[str, float]) -> None:
    """Write the README.md of a conversion into the format `to`; of `source` only the last part of its name is said."""
    kind, about, code = CONVERSIONS[to]
    header = Markup(ModelCardData(**HEADERS[kind], tags=["clips-mllm"]).to_yaml())
    rows = [(name, f"{difference:.1e}") for name, difference in differences.items()]
    card = render(
        "clips.weights", "conversion.md.j2", header=header, name=directory.name, about=about, code=Markup(code),
        source=PurePosixPath(source.rstrip("/")).name, differences=Table(("", "largest difference"), rows),
    )  # fmt: skip
    (directory / "README.md").write_text(card, encoding="utf-8")


def _facts(run: RunConfig, samples: int | None, weights: str) -> list[tuple[str, str]]:
    rows = [("Towers", _towers(run.model)), ("Tokenizer", run.captions.tokenizer)]
    if run.recipe != "imported":
        planned = f"recipe {run.recipe} ({run.task.objective}), {run.samples:,} samples"
        phases = ", ".join(f"{phase.samples:,} at {phase.pixels}" for phase in run.phases)
        seen = "" if samples is None else f"; these weights have seen {samples:,}"
        rows += [("Training", f"{planned}: {phases}{seen}"), ("Data", _data(run)), ("Seed", str(run.train.seed))]
    return [*rows, ("SHA-256 of the trained weights", weights)]


def _towers(model: ModelConfig) -> str:
    vision, text, captioner = model.vision, model.text, model.captioner
    return (
        f"image {vision.width} × {vision.layers}, patch {vision.patch_size}, {vision.image_size} px; "
        + (f"text {text.width} × {text.layers}, context {text.context_length}; " if model.has_text_tower else "")
        + (f"captioner {captioner.width} × {captioner.layers}; " if captioner else "")
        + f"features of {model.embed_dim or vision.width}"
    )


def _data(run: RunConfig) -> str:
    """The training data by the last part of its name: a card names no place of this machine."""
    if run.data.train == "demo":
        return "the demo's drawn scenes"
    return "; ".join(PurePosixPath(urlsplit(part.strip()).path).name for part in run.data.train.split(";"))


def _figures(figures: dict[str, dict[str, float]]) -> Table:
    rows = [
        (pretty(name), f"{figure['value']:.1f}", f"{figure['chance']:.2f}", f"{figure['items']:,}")
        for name, figure in figures.items()
        if name.endswith(SHOWN)
    ]
    return Table(("figure", "%", "chance %", "items"), rows)


def _transformers_classes(directory: Path) -> dict[str, Any]:
    """The class that reads `directory`, and where it keeps the norm that comes after the mean over the patches."""
    (cls,) = json.loads((directory / "config.json").read_text(encoding="utf-8"))["architectures"]
    is_vit = cls == "ViTModel"
    return {
        "cls": Markup(cls),
        "norm": Markup("model.layernorm" if is_vit else 'getattr(model, "vision_model", model).post_layernorm'),
    }
