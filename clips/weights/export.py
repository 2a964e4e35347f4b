"""A trained model in the formats that others load: native, open_clip and transformers.

`export/native`     config.json (the whole RunConfig), model.safetensors, tokenizer/: everything, the captioner too.
`export/open_clip`  `open_clip.create_model_and_transforms("local-dir:…")`, stock open_clip ≥ 3.3: both towers.
`export/hf_vit`     the image tower as transformers `ViTModel` (`CLIPVisionModel` when `vision.pre_norm`), and its
                    image processor. Image embedding = `embedding.safetensors` applied to what the model gives.

Each has a model card, README.md (clips/weights/card.py).
Each one is loaded back with the stock library and compared with the trained weights in fp32 before it counts.
How names and layouts correspond is in clips/weights/formats.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clips.common.errors import UserError
from clips.common.rundir import read_evaluations
from clips.common.tensors import write_weights
from clips.config import RunConfig, check_image_size
from clips.data.images import decode_image, eval_transform
from clips.data.sample import BrokenSample
from clips.data.sources import Source, open_source
from clips.data.splits import Split, open_split, split_spec
from clips.data.tokenizer import CaptionTokenizer
from clips.model.clips import CLIPSModel
from clips.weights.card import write_cards
from clips.weights.formats import logit_scale_parameter, write_hf_vit, write_open_clip
from clips.weights.load import load_model, load_native
from clips.weights.push import check_target, push

TOLERANCE = 1e-4
"""Largest difference of an L2-normalised feature, fp32, between an export and the trained model."""
FORMATS = ("native", "open_clip", "hf_vit")


class ExportError(Exception):
    """An export does not give the trained model's features: a defect of this project, never of the user."""


def export_all(
    model: CLIPSModel,
    run: RunConfig,
    tokenizer: CaptionTokenizer,
    directory: Path,
    sample_images: Tensor,
    sample_texts: Sequence[str],
    *,
    image_size: int | None = None,
    evaluations: Iterable[dict[str, Any]] = (),
    samples: int | None = None,
) -> dict[str, float]:
    """Write and check the three formats under `directory`; returns each one's largest feature difference.

    `image_size` (default: the configured one) is the resolution the exports are for; the fixed positions are
    recomputed for it. `sample_images` [B, 3, S, S] are normalised and of that size. The old export, if any, is
    replaced only once the new one is complete and right. Raises ExportError when a format differs.
    `evaluations` and `samples` are for the model cards, see `write_cards`.
    """
    size = image_size or run.model.vision.image_size
    vision = dataclasses.replace(run.model.vision, image_size=size)
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, vision=vision))
    if sample_images.shape[2:] != (size, size):
        raise ValueError(f"sample images are {tuple(sample_images.shape[2:])}, the export is for {size} pixels")
    trained = CLIPSModel(run.model, tokenizer.pad_id)
    trained.load_state_dict({name: value.float().cpu() for name, value in model.state_dict().items()})
    trained.eval()
    images, texts = sample_images.float().cpu(), list(sample_texts)

    directory = Path(directory)
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    write_native(trained, run, tokenizer, partial / "native")
    write_open_clip(trained, tokenizer, partial / "open_clip")
    write_hf_vit(trained, partial / "hf_vit")
    differences = check_exports(trained, tokenizer, partial, images, texts)
    name = directory.resolve().parent.name if directory.name == "export" else directory.name
    write_cards(partial, trained, run, name=name, evaluations=evaluations, samples=samples)
    shutil.rmtree(directory, ignore_errors=True)
    partial.rename(directory)
    return differences


@torch.no_grad()
def check_exports(
    trained: CLIPSModel, tokenizer: CaptionTokenizer, directory: Path, images: Tensor, texts: list[str]
) -> dict[str, float]:
    """Load the three formats of `directory` and compare them with `trained` (fp32, CPU); see `export_all`."""
    import open_clip

    ids = tokenizer(texts, trained.config.text.context_length, trim=trained.config.text.pad_mask)
    image_features, text_features = trained.encode_image(images), trained.encode_text(ids)
    pooled, tokens = trained.visual(images)

    native, _, native_tokenizer = load_native(directory / "native")
    native_ids = native_tokenizer(texts, trained.config.text.context_length, trim=False)
    source = f"local-dir:{directory / 'open_clip'}"
    stock = open_clip.create_model_and_transforms(source)[0].eval()
    stock_ids = open_clip.get_tokenizer(source)(texts)
    hf_tokens, hf_pooled = hf_features(directory / "hf_vit", images)

    pairs = {
        "native": [(native.encode_image(images), image_features), (native.encode_text(native_ids), text_features)],
        "open_clip": [
            (stock.encode_image(images, normalize=True), image_features),
            (stock.encode_text(stock_ids, normalize=True), text_features),
            (stock.logit_scale, logit_scale_parameter(trained)),
        ],
        "hf_vit": [
            (F.normalize(hf_tokens, dim=-1), F.normalize(tokens, dim=-1)),
            (F.normalize(hf_pooled, dim=-1), F.normalize(pooled, dim=-1)),
        ],
    }
    differences = {name: max((a - b).abs().max().item() for a, b in both) for name, both in pairs.items()}
    for name, difference in differences.items():
        if not difference <= TOLERANCE:  # also when it is NaN
            raise ExportError(f"export {name} differs from the trained model by {difference:.2e} (limit {TOLERANCE})")
    return differences


def hf_features(directory: Path, images: Tensor) -> tuple[Tensor, Tensor]:
    """Load `hf_vit` with stock transformers: (tokens before the final norm [B, 1 + N, D], pooled [B, D]).

    The two correspond to what `VisionTower` returns. Raises ExportError when a tensor was not taken.
    """
    from transformers import CLIPVisionModel, ViTModel
    from transformers.utils import logging

    logging.disable_progress_bar()  # "Loading weights" would break the training line
    loaded: Any  # a pair, which transformers' annotation does not say
    if json.loads((directory / "config.json").read_text())["model_type"] == "clip_vision_model":
        loaded = CLIPVisionModel.from_pretrained(directory, output_loading_info=True)
        norm = getattr(loaded[0], "vision_model", loaded[0]).post_layernorm
    else:
        loaded = ViTModel.from_pretrained(directory, add_pooling_layer=False, output_loading_info=True)
        norm = loaded[0].layernorm
    model, info = loaded
    if left := {kind: names for kind, names in info.items() if names}:
        raise ExportError(f"{directory}: transformers did not take the weights one to one: {left}")
    logging.enable_progress_bar()
    tokens = model.eval()(images, output_hidden_states=True).hidden_states[-1]
    return tokens, norm(tokens[:, 1:].mean(dim=1))


def write_native(model: CLIPSModel, run: RunConfig, tokenizer: CaptionTokenizer, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    run.save(directory / "config.json")
    write_weights(model.state_dict(), directory / "model.safetensors")
    tokenizer.save(directory / "tokenizer")


SAMPLES_CHECKED = 8
"""Images and captions on which each export is compared with the trained model."""


def sample_inputs(source: Source, image_size: int) -> tuple[Tensor, list[str]]:
    """The first few readable images of `source`, normalised [B, 3, S, S], and their web captions."""
    transform, images, texts = eval_transform(image_size), [], []
    for index in range(len(source)):
        try:
            sample = source.read(index)
            images.append(transform(decode_image(sample.image)))
        except BrokenSample:
            continue
        texts.append(sample.web)
        if len(images) == SAMPLES_CHECKED:
            return torch.stack(images), texts
    if not images:
        raise UserError("none of the images can be read on which the export would be checked")
    return torch.stack(images), texts


def export_from_flags(flags: argparse.Namespace) -> None:
    """What scripts/export_clips.py does: a trained model in all three formats, checked on real images."""
    if flags.push_to_hub:
        check_target(flags.push_to_hub)
    loaded = load_model(flags.model)
    run = loaded.run
    size = flags.image_size or math.isqrt(len(loaded.model.visual.pos_embed) - 1) * run.model.vision.patch_size
    check_image_size(size, run.model.vision.patch_size)
    if flags.data is not None:
        source = open_source(flags.data, run.data.fields, image_root=run.data.image_root, need_long=False)
    else:
        splits: tuple[Split, ...] = ("test", "val", "train")
        split = next((name for name in splits if split_spec(run.data, name)), splits[-1])
        source = open_split(run.data, split, need_long=False)
    images, texts = sample_inputs(source, size)
    out = Path(flags.output or loaded.path / "export")
    differences = export_all(
        loaded.model, run, loaded.tokenizer, out, images, texts,
        image_size=size, evaluations=read_evaluations(loaded.path).values(), samples=loaded.samples,
    )  # fmt: skip
    kind = "CLIPVisionModel" if run.model.vision.pre_norm else "ViTModel"
    for name, difference in differences.items():
        print(f"{out / name}: equal to the trained model within {difference:.1e} on {len(images)} images at {size} px")
    print(
        f'\nload them with\n  open_clip.create_model_and_transforms("local-dir:{out}/open_clip")\n'
        f'  transformers.{kind}.from_pretrained("{out}/hf_vit")\n'
        f"  python scripts/evaluate_clips.py --model {out}/native"
    )
    if flags.push_to_hub:
        push(out / "open_clip", flags.push_to_hub)
