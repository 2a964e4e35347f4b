"""Model cards of exports and conversions. They show metrics of exactly these weights, and no path of this machine."""

from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import ModelCardData

from clips.common.model_card import result, write_card
from clips.common.plots import pretty
from clips.common.rundir import by_test_set
from clips.common.tensors import hash_weights
from clips.config import RunConfig
from clips.model.clips import CLIPSModel

LIBRARIES = {"native": "clips-mllm", "open_clip": "open_clip", "hf": "transformers", "hf_vit": "transformers"}
ABOUT = {
    "native": "A vision–language encoder in CLIPS-MLLM's own format, which is the most complete one.",
    "open_clip": "Both towers of a vision–language encoder in open_clip's format (`open_clip_torch` ≥ 3.3).",
    "official": "A vision–language encoder in the format of the authors of CLIPS, for their fork of open_clip.",
    "hf": "Both towers of a vision–language encoder as transformers' `CLIPModel`.",
    "hf_vit": "The image tower of a vision–language encoder for transformers, and its projection.",
}
_NATIVE = """\
from clips import CLIPS

source = "."
model = CLIPS.from_pretrained(source)
"""
CODE = {
    "native": _NATIVE + 'print(model.similarity(["image.png"], ["a cat", "two dogs"]))',
    "open_clip": """\
import open_clip
import torch
from PIL import Image

source = "local-dir:."
model, _, preprocess = open_clip.create_model_and_transforms(source)
tokenizer = open_clip.get_tokenizer(source)
with torch.no_grad():
    image = model.eval().encode_image(preprocess(Image.open("image.png"))[None], normalize=True)
    text = model.encode_text(tokenizer(["a cat", "two dogs"]), normalize=True)
print((model.logit_scale.exp() * image @ text.T).softmax(dim=-1))""",
    "hf": """\
from transformers import pipeline

source = "."
classify = pipeline("zero-shot-image-classification", source)
print(classify("image.png", candidate_labels=["cat", "dog"], hypothesis_template="a photo of a {}."))""",
    "hf_vit": """\
from transformers import AutoModel

source = "."
model = AutoModel.from_pretrained(source)""",
}
DRAWINGS = (
    "The demo's scenes are drawings of several artists (OpenMoji and others, some under CC BY-SA 4.0) with generated "
    "captions. A model of them shows that the path works and knows nothing of photographs."
)


def write_cards(
    directory: Path,
    model: CLIPSModel,
    run: RunConfig,
    *,
    name: str,
    evaluations: Iterable[dict[str, Any]],
    checkpoint: Mapping[str, Any] | None,
) -> None:
    """Write a README.md for each format below `directory`.

    `name` is the model's name. `evaluations` are the contents of `clips.evaluation.results.write_metrics`; those of
    other weights, of another resolution, of only part of a set or of training images are not shown. `checkpoint` is
    that of the weights (`clips.common.rundir.weights_of`), None if unknown.
    """
    weights = hash_weights(model.state_dict()).hexdigest()
    size = run.model.vision.image_size
    results = [
        result(test_set, name, pretty(name), round(metric["value"], 1), chance=metric["chance"], items=metric["items"])
        for evaluation in evaluations
        if (evaluation["weights"], evaluation["image_size"], evaluation["limit"]) == (weights, size, None)
        if not evaluation.get("trained_on")
        for test_set, metrics in by_test_set(evaluation["metrics"], evaluation["test_set"]).items()
        for name, metric in metrics.items()
        if name.endswith(("_r1", "_top1"))
    ]
    note = DRAWINGS if run.data.train == "demo" and run.recipe != "imported" else ""
    for kind in LIBRARIES:
        if not (directory / kind).is_dir():
            continue
        write_card(
            directory / kind,
            _header(kind, model_name=name, eval_results=results),
            name=name,
            about=f"{ABOUT[kind]} See [arXiv 2411.16828](https://arxiv.org/abs/2411.16828).",
            facts=_facts(run, (checkpoint or {}).get("samples"), weights),
            code=CODE[kind],
            note=note,
        )


def write_conversion_card(directory: Path, to: str, source: str, differences: Mapping[str, float]) -> None:
    """Write the README.md of a conversion into the format `to`; of the path `source` only the last part is shown."""
    kind = {"official": "open_clip", "transformers": "hf_vit"}.get(to, to)
    facts = {"Written by CLIPS-MLLM from": PurePosixPath(source.rstrip("/")).name}
    for feature, difference in differences.items():
        facts[f"Largest difference of {feature}"] = f"{difference:.1e}"
    write_card(
        directory,
        _header(kind),
        name=directory.name,
        about=f"{ABOUT.get(to, ABOUT[kind])} Their source names their data and license.",
        facts=facts,
        code=CODE[kind],
    )


def _header(kind: str, **options: Any) -> ModelCardData:
    is_tower = kind == "hf_vit"
    return ModelCardData(
        library_name=LIBRARIES[kind],
        pipeline_tag="image-feature-extraction" if is_tower else "zero-shot-image-classification",
        tags=["clips", "clips-mllm", "vision" if is_tower else "clip"],
        **options,
    )


def _facts(run: RunConfig, samples: int | None, weights: str) -> dict[str, str]:
    vision, text = run.model.vision, run.model.text
    towers = f"image {vision.width} × {vision.layers}, patch {vision.patch_size}, {vision.image_size} px"
    towers += f"; text {text.width} × {text.layers}, context {text.context_length}"
    facts = {"Towers": towers, "Tokenizer": run.captions.tokenizer}
    if run.recipe != "imported":
        phases = ", ".join(f"{phase.samples:,} at {phase.image_size} px" for phase in run.phases)
        seen = "" if samples is None else f"; these weights have seen {samples:,}"
        # A card shows no path of this machine.
        data = [PurePosixPath(urlsplit(part.strip()).path).name for part in run.data.train.split(";")]
        facts["Training"] = f"recipe {run.recipe} ({run.task.objective}), {run.samples:,} samples: {phases}{seen}"
        facts["Data"] = "; ".join(data)
        facts["Seed"] = str(run.train.seed)
    facts["SHA-256 of the trained weights"] = weights
    return facts
