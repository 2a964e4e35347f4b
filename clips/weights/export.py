"""A trained model in the formats that others load: native, open_clip and transformers.

`export/native`     config.json (the full RunConfig), model.safetensors, tokenizer/: everything, the captioner too.
`export/open_clip`  `open_clip.create_model_and_transforms("local-dir:…")`, stock open_clip ≥ 3.3: both towers.
`export/hf`         `transformers.CLIPModel` with processor and tokenizer: both towers, if they are CLIP's.
`export/hf_vit`     the image tower as the transformers class that computes it, its image processor and projection.

Each is loaded back with the stock library and compared with the trained weights in fp32 before it counts. A model that
open_clip has no classes for is exported without that format (`open_clip_lacks`).
"""

import argparse
import contextlib
import dataclasses
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clips.common.errors import UserError
from clips.common.files import check_target, lock, replacing, write_json
from clips.common.rundir import MADE_OF, read_evaluations
from clips.common.tensors import listed, write_weights
from clips.config import RunConfig, check_image_size
from clips.data.dataset import Dataset
from clips.data.images import decode_image, eval_transform
from clips.data.sample import BrokenSample
from clips.data.splits import open_split, split_spec
from clips.data.tokenizer import CaptionTokenizer
from clips.model.clips import CLIPSModel
from clips.model.vision import resample_positions
from clips.weights.card import write_cards
from clips.weights.hf_clip import clip_model_lacks, hf_clip_features, write_hf_clip
from clips.weights.hf_vit import hf_features, write_hf_vit
from clips.weights.load import load_model, load_native
from clips.weights.open_clip import logit_scale_parameter, open_clip_lacks, write_open_clip

TOLERANCE = 1e-4
"""Largest allowed difference of an L2-normalised fp32 feature between an export and the trained model."""
FORMATS = ("native", "open_clip", "hf", "hf_vit")


class ExportError(Exception):
    """An export does not give the trained model's features: a defect of this project, not the user's mistake."""


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
    checkpoint: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """Write and check all formats under `directory`; return the largest feature difference of each.

    Fixed positions are recomputed for `image_size` (default: the configured size), learned positions are resampled.
    `sample_images` [B, 3, S, S] are normalised and of that size. An old export is replaced only when the new one is
    complete and right. `evaluations` are for the model cards, see `write_cards`. `checkpoint` is written as
    checkpoint.json (`clips.common.rundir.weights_of`). Raises ExportError if a format differs.
    """
    size = image_size or run.model.vision.image_size
    vision = dataclasses.replace(run.model.vision, image_size=size)
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, vision=vision))
    trained = CLIPSModel(run.model, tokenizer.pad_id)
    weights = {name: value.float().cpu() for name, value in model.state_dict().items()}
    if vision.pos_embed == "learned":
        grid = size // vision.patch_size
        weights["visual.pos_embed"] = resample_positions(weights["visual.pos_embed"], grid, vision.prefix_tokens)
    trained.load_state_dict(weights)
    trained.eval()

    directory = Path(directory)
    name = directory.resolve().parent.name if directory.name == "export" else directory.name
    directory.parent.mkdir(parents=True, exist_ok=True)
    held = lock(directory.with_name(f".{directory.name}.lock"), wait=True)  # another process may export the same run
    with held, replacing(directory) as partial:
        write_native(trained, run, tokenizer, partial / "native")
        if open_clip_lacks(run.model) is None:
            write_open_clip(trained, tokenizer, partial / "open_clip")
        if clip_model_lacks(run.model) is None:
            write_hf_clip(trained, tokenizer, partial / "hf")
        write_hf_vit(trained.visual, partial / "hf_vit")
        differences = check_exports(trained, tokenizer, partial, sample_images.float().cpu(), list(sample_texts))
        write_cards(partial, trained, run, name=name, evaluations=evaluations, checkpoint=checkpoint)
        if checkpoint is not None:
            write_json(partial / MADE_OF, checkpoint)
    return differences


@torch.no_grad()
def check_exports(
    trained: CLIPSModel, tokenizer: CaptionTokenizer, directory: Path, images: Tensor, texts: list[str]
) -> dict[str, float]:
    """Load the formats in `directory`, and return the largest difference of each from `trained` (fp32, on the CPU).

    Raises ExportError if one is above TOLERANCE.
    """
    expected = model_features(trained, images, tokenizer.for_tower(texts, trained.config.text))
    tokens = trained.visual(images)[1]
    differences: dict[str, float] = {}
    for name, read in (("native", native_features), ("open_clip", open_clip_features), ("hf", hf_clip_features)):
        if (directory / name).is_dir():
            differences[name] = _largest_difference(read(directory / name, images, texts), expected)
    tower = [F.normalize(x, dim=-1) for x in hf_features(directory / "hf_vit", images, trained.config.vision.pool)]
    differences["hf_vit"] = _largest_difference(tower, (F.normalize(tokens, dim=-1), expected[0]))
    for name, difference in differences.items():
        if not difference <= TOLERANCE:  # also when it is NaN
            raise ExportError(f"export {name} differs from the trained model by {difference:.2e} (limit {TOLERANCE})")
    return differences


def _largest_difference(features: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    differences = [(a - b).abs().max() for a, b in zip(features, expected, strict=True)]
    return torch.stack(differences).max().item()  # NaN if one is


Features = tuple[Tensor, ...]
"""Features of images [B, E] and of texts [T, E], both L2-normalised, and ln(1 / temperature), a scalar."""


def model_features(model: CLIPSModel, images: Tensor, ids: Tensor) -> Features:
    """Return the features of `images` [B, 3, S, S] and of texts as `ids` [T, L], and the logit scale (`Features`)."""
    return model.encode_image(images), model.encode_text(ids), logit_scale_parameter(model)


@torch.no_grad()
def native_features(directory: Path, images: Tensor, texts: list[str]) -> Features:
    """Return the features that a native export gives for `images` [B, 3, S, S] and `texts`, padded to full context."""
    model, _, tokenizer = load_native(directory)
    text = model.config.text
    ids = tokenizer(texts, text.context_length, trim=False, cls=text.pool == "cls")
    return model_features(model, images, ids)


@torch.no_grad()
def open_clip_features(directory: Path, images: Tensor, texts: list[str] | Tensor) -> Features:
    """Return the features that stock open_clip gives; `texts` are ids if the directory has no tokenizer."""
    import open_clip

    source = f"local-dir:{directory}"
    stock = open_clip.create_model_and_transforms(source)[0].eval()
    ids = texts if isinstance(texts, Tensor) else open_clip.get_tokenizer(source)(texts)
    image_features = stock.encode_image(images, normalize=True)
    return image_features, stock.encode_text(ids, normalize=True), stock.logit_scale.detach()


def write_native(model: CLIPSModel, run: RunConfig, tokenizer: CaptionTokenizer, directory: Path) -> None:
    """Write config.json, model.safetensors and tokenizer/ for `load_native`."""
    directory.mkdir(parents=True, exist_ok=True)
    run.save(directory / "config.json")
    write_weights(model.state_dict(), directory / "model.safetensors")
    tokenizer.save(directory / "tokenizer")


def sample_inputs(dataset: Dataset, image_size: int) -> tuple[Tensor, list[str]]:
    """Return up to 8 readable images of `dataset`, normalised [B, 3, S, S], and their web captions.

    Raises UserError if no image can be read.
    """
    transform = eval_transform(image_size)
    images: list[Tensor] = []
    texts: list[str] = []
    for index in range(len(dataset)):
        with contextlib.suppress(BrokenSample):
            sample = dataset.read(index)
            images.append(transform(decode_image(sample.image)))
            texts.append(sample.web)
        if len(images) == 8:
            break
    if not images:
        raise UserError("the export cannot be checked, because none of the images in the data can be read")
    return torch.stack(images), texts


def check_replaceable(out: Path) -> None:
    """Raise UserError if `out` cannot be written, or holds anything but an export: an export replaces all of it."""
    check_target(out)
    others = sorted({path.name for path in out.iterdir()} - {*FORMATS, MADE_OF}) if out.is_dir() else []
    if others or out.name in ("", ".."):
        held = f", which holds {listed(others)}" if others else ""
        raise UserError(f"an export would replace all of {out}{held}: move that away, or give a new folder as --output")


def export_from_flags(flags: argparse.Namespace) -> None:
    """Run scripts/export_clips.py: write a trained model in every format that can hold it, checked on real images.

    Raises UserError if the target holds anything but an export.
    """
    if flags.output:
        check_replaceable(Path(flags.output))
    loaded = load_model(flags.model)
    run = loaded.run
    out = Path(flags.output or loaded.home / (f"export-{loaded.path.name}" if loaded.is_checkpoint else "export"))
    check_replaceable(out)
    size = flags.image_size or loaded.model.visual.image_size
    check_image_size(size, run.model.vision.patch_size)
    if flags.data is not None:
        dataset = open_split(dataclasses.replace(run.data, train=flags.data, mix=()), "train", need_long=False)
    else:
        split = next((name for name in ("test", "val") if split_spec(run.data, name)), "train")
        dataset = open_split(run.data, split, need_long=False)
    images, texts = sample_inputs(dataset, size)
    differences = export_all(
        loaded.model, run, loaded.tokenizer, out, images, texts,
        image_size=size, evaluations=read_evaluations(loaded.home).values(), checkpoint=loaded.checkpoint,
    )  # fmt: skip
    for name, difference in differences.items():
        print(f"{out / name}: equal to the trained model within {difference:.1e} on {len(images)} images at {size} px")
    if reason := open_clip_lacks(run.model):
        print(f"{out / 'open_clip'}: not written: {reason}")
    if lacks := clip_model_lacks(run.model):
        print(f"{out / 'hf'}: not written: {lacks}")
    print("\nEach README.md has the lines that load its format. Measure them by")
    print(f"  python scripts/evaluate_clips.py --model {shlex.quote(f'{out}/native')}")
