"""Measuring an encoder: images and texts through the towers, figures out (metrics in clips/evaluation/metrics.py).

Every figure is a percentage and comes with the number of items it was measured on and its chance level.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clips.common.errors import UserError
from clips.common.escape import for_rich
from clips.common.files import write_json
from clips.common.ranks import all_shares, my_share
from clips.common.rundir import by_test_set
from clips.common.tensors import hash_weights
from clips.common.workers import start_worker
from clips.config import RunConfig
from clips.data.demo import MISSING, is_by_one
from clips.data.images import decode_image, eval_transform, normalise, stacked
from clips.data.sample import BrokenSample
from clips.data.sources import open_source
from clips.data.splits import held_out_sets, is_demo
from clips.data.tokenizer import CaptionTokenizer
from clips.evaluation.metrics import Figure, linear_probe, retrieval_metrics, token_accuracy, zero_shot_metrics
from clips.evaluation.testsets import (
    PROTOCOLS,
    Classes,
    FolderSet,
    Item,
    KarpathySet,
    SourceSet,
    TestSet,
    classes_of,
    load_classes,
    open_test_set,
)
from clips.model.clips import NO_SHARED_SPACE, CLIPSModel
from clips.model.text import word_slots

NOT_MEASURED = f"retrieval and zero-shot classification are not measured: {NO_SHARED_SPACE}"
PROBE_SAMPLES = 5000
"""Training images whose labelled ones the linear probe is fitted on."""


class _Pixels(Dataset):
    """Items of a test set with their image decoded and squashed; a broken one is its reason, a string."""

    def __init__(self, items: TestSet, indices: Sequence[int], image_size: int) -> None:
        self.items, self.indices, self.transform = items, indices, eval_transform(image_size)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[np.ndarray, Item, int] | str:
        index = self.indices[position]
        try:
            item = self.items.read(index)
            return self.transform.pixels(decode_image(item.image)), replace(item, image=b""), index
        except BrokenSample as broken:
            return str(broken)


@dataclass
class ImageSet:
    """A test set after the image tower."""

    features: Tensor
    """[I, E], L2-normalised, on the CPU."""
    pooled: Tensor
    """[I, D] before the projection: what a linear probe reads."""
    captions: list[dict[str, list[str]]]
    labels: list[str | None]
    indices: list[int]
    """Each image's place in the test set."""
    skipped: list[str]
    """Why items were left out."""
    caption_tokens: tuple[Tensor, Tensor] | None = None
    """Predicted and true tokens [N] of all long captions, on the CPU; None where none is predicted."""


class _Encoded(NamedTuple):
    """What is kept of a batch, on the CPU."""

    towers: list[tuple[Tensor, Tensor]]
    """`features` and `pooled`; none where every image of the batch is broken."""
    caption_tokens: list[tuple[Tensor, Tensor]]
    """Predicted and true; none where no caption is predicted."""
    found: list[tuple[Item, int]]
    skipped: list[str]


@torch.no_grad()
def encode_images(
    model: CLIPSModel,
    items: TestSet,
    *,
    image_size: int | None = None,
    batch_size: int,
    workers: int = 0,
    limit: int | None = None,
    sharded: bool = False,
    tokenizer: CaptionTokenizer | None = None,
) -> ImageSet:
    """Run `items` (the first `limit` of a fixed shuffle, in order) through the image tower, on the model's device.

    `image_size`: the resolution to work at, the one that the tower is set to by default. `sharded`: each rank encodes
    some of the batches, which are those of a single rank, so that every figure is the same; collective. With a
    `tokenizer` the captioner, where there is one, predicts the long captions in the same pass: an image is read and
    goes through the tower once, and its tokens are gone with its batch.
    """
    image_size = image_size or model.visual.image_size
    indices: Sequence[int] = range(len(items))
    if limit is not None and limit < len(items):
        indices = sorted(torch.randperm(len(items), generator=torch.Generator().manual_seed(0))[:limit].tolist())
    positions = range(len(indices))
    batches = [list(positions[i : i + batch_size]) for i in positions[::batch_size]]
    loader = DataLoader(
        _Pixels(items, indices, image_size), batch_sampler=my_share(batches, sharded=sharded), num_workers=workers,
        collate_fn=list, worker_init_fn=start_worker,
    )  # fmt: skip
    with evaluating(model, image_size):
        mine = [_encode(model, tokenizer, batch) for batch in loader]
    whole = all_shares(mine, sharded=sharded)
    towers = [pair for batch in whole for pair in batch.towers]
    tokens = [pair for batch in whole for pair in batch.caption_tokens]
    found = [entry for batch in whole for entry in batch.found]
    skipped = [reason for batch in whole for reason in batch.skipped]
    if not found:
        raise UserError(f"no image of the test set can be read, for example {skipped[0] if skipped else 'it is empty'}")
    return ImageSet(
        features=torch.cat([features for features, _ in towers]),
        pooled=torch.cat([pooled for _, pooled in towers]),
        captions=[item.captions for item, _ in found],
        labels=[item.label for item, _ in found],
        indices=[index for _, index in found],
        skipped=skipped,
        caption_tokens=(torch.cat([p for p, _ in tokens]), torch.cat([t for _, t in tokens])) if tokens else None,
    )


def _encode(
    model: CLIPSModel, tokenizer: CaptionTokenizer | None, batch: Sequence[tuple[np.ndarray, Item, int] | str]
) -> _Encoded:
    skipped = [entry for entry in batch if isinstance(entry, str)]
    good = [entry for entry in batch if not isinstance(entry, str)]
    if not good:
        return _Encoded([], [], [], skipped)
    images = normalise(stacked([pixels for pixels, _, _ in good]).to(model.visual.patch_embed.weight.device))
    pooled, tokens = model.visual(images)
    features = F.normalize(model.visual.proj(pooled).float(), dim=-1)
    return _Encoded(
        towers=[(features.cpu(), pooled.float().cpu())],
        caption_tokens=[] if tokenizer is None else _predict(model, tokenizer, tokens, [item for _, item, _ in good]),
        found=[(item, index) for _, item, index in good],
        skipped=skipped,
    )


def _predict(
    model: CLIPSModel, tokenizer: CaptionTokenizer, image_tokens: Tensor, items: Sequence[Item]
) -> list[tuple[Tensor, Tensor]]:
    """Predicted and true tokens [N] of the long captions of those `items` that have one, from all their image tokens.

    With `captioner.inputs = "tokens"` each is predicted from those before it, as in training. Nothing without a
    captioner or long captions. `image_tokens` are what the tower gives, CLS among them.
    """
    rows = [row for row, item in enumerate(items) if item.captions.get("long")]
    if model.captioner is None or not rows:
        return []
    encoded = tokenizer.encode([items[row].captions["long"][0] for row in rows])
    caption = tokenizer.caption_ids(encoded, model.captioner.config.length).to(image_tokens.device)
    web = tokenizer.for_tower([items[row].captions["web"][0] for row in rows], model.config.text)
    prefix = model.caption_prefix(image_tokens[rows], web.to(image_tokens.device))
    states = model.captioner(*prefix, caption[:, :-1])
    there = word_slots(caption, model.pad_id)[:, 1:]
    return [(model.captioner.head(states[there]).argmax(-1).cpu(), caption[:, 1:][there].cpu())]


@torch.no_grad()
def encode_texts(
    model: CLIPSModel, tokenizer: CaptionTokenizer, texts: Sequence[str], *, batch_size: int, sharded: bool = False
) -> Tensor:
    """L2-normalised features [T, E] on the CPU; equal strings are encoded once, similar lengths together.

    `sharded`: as in `encode_images`; every rank passes the same texts and gets all features. UserError where the model
    has no features of texts.
    """
    if not model.config.embed_dim:
        raise UserError(NO_SHARED_SPACE)
    config = model.config.text
    unique = sorted(set(texts), key=lambda text: (len(text), text))
    row = {text: i for i, text in enumerate(unique)}
    batches = [unique[i : i + batch_size] for i in range(0, len(unique), batch_size)]
    with evaluating(model) as device:
        mine = [
            model.encode_text(tokenizer.for_tower(batch, config).to(device)).cpu()
            for batch in my_share(batches, sharded=sharded)
        ]
    return torch.cat(all_shares(mine, sharded=sharded))[[row[text] for text in texts]]


@contextmanager
def evaluating(model: CLIPSModel, image_size: int | None = None) -> Iterator[torch.device]:
    """Evaluation mode at `image_size`, and the model as it was afterwards; yields the model's device."""
    training, tower, before = model.training, model.visual, model.visual.image_size
    model.eval()
    if image_size is not None and image_size != before:
        tower.set_image_size(image_size)
    try:
        yield tower.patch_embed.weight.device
    finally:
        model.train(training)
        if image_size is not None and image_size != before:
            tower.set_image_size(before)


def prompt_features(
    model: CLIPSModel, tokenizer: CaptionTokenizer, classes: Classes, *, batch_size: int, sharded: bool = False
) -> Tensor:
    """L2-normalised features [C, P, E] of every class in every template."""
    features = encode_texts(model, tokenizer, classes.prompts(), batch_size=batch_size, sharded=sharded)
    return features.view(len(classes.names), len(classes.templates), -1)


def measure(
    model: CLIPSModel,
    tokenizer: CaptionTokenizer,
    images: ImageSet,
    classes: Classes | None = None,
    *,
    batch_size: int,
    sharded: bool = False,
) -> dict[str, Figure]:
    """Everything that `images` allow: `PROTOCOL_i2t_r1` … for each protocol, `zero_shot_top1` … where labels are, and
    `caption_token_top1`, the share of `caption_tokens` that the captioner predicts.

    Where only some images carry a label, these are for classification and the others for retrieval (the demo).
    Without `classes` the labels themselves are the classes, in open_clip's general templates. `sharded`: the ranks
    share the texts, and rank 0 alone computes figures, the others return none; collective. Neither retrieval nor
    classification of a model without a space that images and texts share.
    """
    figures: dict[str, Figure] = {}
    here = not sharded or dist.get_rank() == 0
    shared_space = model.config.embed_dim > 0
    for protocol in PROTOCOLS if shared_space else ():
        rows = retrieval_rows(images, protocol)
        if len(rows) < 2:
            continue
        texts = [text for row in rows for text in images.captions[row][protocol]]
        owners = [i for i, row in enumerate(rows) for _ in images.captions[row][protocol]]
        features = encode_texts(model, tokenizer, texts, batch_size=batch_size, sharded=sharded)
        found = retrieval_metrics(images.features[rows], features, owners, texts) if here else {}
        figures |= {f"{protocol}_{name}": figure for name, figure in found.items()}
    if shared_space and (labelled := labelled_rows(images)):
        labels = list(labelled.values())
        classes = classes or classes_of(labels)
        prompts = prompt_features(model, tokenizer, classes, batch_size=batch_size, sharded=sharded)
        truth = classes.index(labels)
        found = zero_shot_metrics(images.features[list(labelled)], prompts, truth) if here else {}
        figures |= {f"zero_shot_{name}": figure for name, figure in found.items()}
    if here and images.caption_tokens is not None:
        figures["caption_token_top1"] = token_accuracy(*images.caption_tokens)
    return figures


def labelled_rows(images: ImageSet) -> dict[int, str]:
    """The images that carry a label, row → label."""
    return {row: label for row, label in enumerate(images.labels) if label is not None}


def retrieval_rows(images: ImageSet, protocol: str) -> list[int]:
    """The images that retrieval by `protocol` is measured on (see `measure`)."""
    unlabelled = [row for row, label in enumerate(images.labels) if label is None]
    return [row for row in unlabelled or range(len(images.labels)) if images.captions[row].get(protocol)]


def evaluate(
    model: CLIPSModel,
    tokenizer: CaptionTokenizer,
    run: RunConfig,
    split: str = "val",
    *,
    full: bool = False,
    image_size: int | None = None,
    out: Path | None = None,
    checkpoint: Mapping[str, Any] | None = None,
    sharded: bool = False,
) -> dict[str, Figure]:
    """Measure `model` on a split of its run's data (names as in `measure`); "test" stands for all its test sets.

    The figures of the first test set have those plain names, those of a further one are called NAME/FIGURE. During
    training at most `eval.max_images` images are used; `full` uses all and adds `caption_token_top1` where there
    is a captioner and `linear_probe_top1` where the training data has labels. Without a shared space the former is
    measured during training too: there is nothing else. `out` receives the figures with their items and chance levels,
    and which `checkpoint` of the run the weights are (`clips.common.rundir.weights_of`). The weights must be whole on
    this process (ZeRO-3: gather them first). The model's mode, resolution and device stay as they are. `sharded`: the
    ranks share the work, rank 0 has the figures, the others none; collective, and not with `full`, whose probe is one
    rank's.
    """
    if full and sharded:
        raise ValueError("the full evaluation is one rank's: see clips/training/loop.py")
    options: dict[str, Any] = {
        "image_size": image_size,
        "batch_size": run.eval.batch_size,
        "workers": run.data.workers,
    }
    figures: dict[str, Figure] = {}
    skipped: list[str] = []
    train: ImageSet | None = None
    limit = None if full else run.eval.max_images
    captioned = full or not run.model.embed_dim
    for name in held_out_sets(run.data) if split == "test" else [split]:
        items, classes = open_test_set(run.data, name, run.captions.splitter)
        images = encode_images(
            model, items, limit=limit, sharded=sharded, tokenizer=tokenizer if captioned else None, **options
        )
        found = measure(model, tokenizer, images, classes, batch_size=run.eval.batch_size, sharded=sharded)
        if full and labelled_rows(images):
            if train is None:
                train = encode_images(model, open_test_set(run.data, "train")[0], limit=PROBE_SAMPLES, **options)
            if (probe := probe_images(train, images)) is not None:
                found["linear_probe_top1"] = probe
        figures |= named(found, name, split)
        skipped += images.skipped
    if out is not None:
        write_figures(
            out, figures, test_set=split, skipped=skipped, model=model, checkpoint=checkpoint,
            image_size=image_size, missing=missing_of(run, split),
        )  # fmt: skip
    return figures


def named(figures: Mapping[str, Figure], test_set: str, first: str) -> dict[str, Figure]:
    """The figures of one of several test sets: NAME/FIGURE, but for the `first`, whose names stay plain."""
    return dict(figures) if test_set == first else {f"{test_set}/{key}": figure for key, figure in figures.items()}


def missing_of(run: RunConfig, split: str) -> str | None:
    """What the evaluation of a split lacks, in words, where the demo had to be drawn by one artist."""
    return MISSING if split == "test" and is_demo(run.data, "test") and is_by_one(run.data.demo_dir) else None


def probe_images(train: ImageSet, test: ImageSet) -> Figure | None:
    """Linear probe from the labelled images of one set to those of another; None when there is nothing to separate."""
    fit = labelled_rows(train)
    number = {name: i for i, name in enumerate(sorted(set(fit.values())))}
    check = {row: label for row, label in labelled_rows(test).items() if label in number}
    if len(number) < 2 or not check:
        return None
    return linear_probe(
        train.pooled[list(fit)],
        [number[label] for label in fit.values()],
        test.pooled[list(check)],
        [number[label] for label in check.values()],
    )


def write_figures(
    path: Path,
    figures: dict[str, Figure],
    *,
    test_set: str,
    skipped: Sequence[str],
    model: CLIPSModel,
    checkpoint: Mapping[str, Any] | None = None,
    image_size: int | None = None,
    missing: str | None = None,
) -> None:
    """JSON with each figure's value, chance level (percent) and number of items, and which weights they are of.

    `weights` is their hash by names and values; `checkpoint` as in `evaluate`, null where no run is known to hold them;
    `missing`: a test that could not be made.
    """
    content = {
        "test_set": test_set,
        "weights": hash_weights(model.state_dict()).hexdigest(),
        "checkpoint": checkpoint,
        "image_size": image_size or model.visual.image_size,
        "unit": "percent",
        "figures": {name: asdict(figure) for name, figure in figures.items()},
        "skipped_images": len(skipped),
        "skipped": list(skipped[:20]),
        **({"missing": missing} if missing else {}),
    }
    write_json(Path(path), content)


def figures_table(figures: dict[str, Figure], title: str, first: str = "test", missing: str | None = None) -> Table:
    """For people: each figure, on every test set, beside the first's chance level and number of items.

    `first`: the name of the set whose figures have plain names. `missing`: as in `write_figures`.
    """
    sets = by_test_set(figures, first)
    table = Table(title=for_rich(title), title_justify="left", caption=missing, caption_justify="left")
    table.add_column("figure")
    for column in (*([f"{test_set} %" for test_set in sets] if len(sets) > 1 else ["%"]), "chance %", "items"):
        table.add_column(for_rich(column), justify="right")
    for name in dict.fromkeys(key for found in sets.values() for key in found):
        of_sets = [found.get(name) for found in sets.values()]
        one = next(figure for figure in of_sets if figure is not None)
        values = ("" if figure is None else f"{figure.value:.1f}" for figure in of_sets)
        table.add_row(name, *values, f"{one.chance:.2f}", f"{one.items:,}")
    return table


def evaluate_from_flags(flags: argparse.Namespace) -> None:
    """What scripts/evaluate_clips.py does: a trained model, a test set, a table and a JSON file."""
    from clips.common.runtime import choose_device
    from clips.weights.load import load_model

    loaded = load_model(flags.model)
    model, run = loaded.model.to(choose_device(flags.device)), loaded.run
    name, sets = _test_sets_of(flags, run)
    first = next(iter(sets))
    name += f"-{flags.limit}" if flags.limit else ""
    name += f"-{loaded.path.name}" if loaded.is_checkpoint else ""
    own_classes = load_classes(flags.classes) if flags.classes is not None else None
    options = {
        "image_size": flags.image_size,
        "batch_size": flags.batch_size or run.eval.batch_size,
        "workers": run.data.workers,
    }
    train = None
    if flags.probe_train is not None:
        train = encode_images(model, _open(flags.probe_train, flags, run), **options)
    figures: dict[str, Figure] = {}
    skipped: list[str] = []
    count = 0
    for test_set, (items, classes) in sets.items():
        images = encode_images(model, items, limit=flags.limit, tokenizer=loaded.tokenizer, **options)
        classes = own_classes or classes
        found = measure(model, loaded.tokenizer, images, classes, batch_size=options["batch_size"])
        if train is not None:
            probe = probe_images(train, images)
            if probe is None:
                raise UserError(f"--probe-train {flags.probe_train}: no labels there that the test images have too")
            found["linear_probe_top1"] = probe
        figures |= named(found, test_set, first)
        skipped += images.skipped
        count += len(images.indices)
    if not figures:
        raise UserError(
            "nothing to measure: the test set has neither captions nor labels"
            if model.config.embed_dim
            else f"nothing to measure: {NO_SHARED_SPACE}. Give --probe-train, or a test set with long captions"
        )
    out = Path(flags.out) if flags.out else loaded.home / f"evaluation-{name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    missing = missing_of(run, first)
    write_figures(
        out, figures, test_set=name, skipped=skipped, model=model, checkpoint=loaded.checkpoint,
        image_size=flags.image_size, missing=missing,
    )  # fmt: skip
    Console(emoji=False).print(figures_table(figures, f"{loaded.home} on {name}", first, missing))
    if not model.config.embed_dim:
        print(NOT_MEASURED)
    print(f"{count:,} images, {len(skipped)} skipped; written to {out}")


def _test_sets_of(flags: argparse.Namespace, run: RunConfig) -> tuple[str, dict[str, tuple[TestSet, Classes | None]]]:
    """What the measurement is called, and the sets to measure on by name, the first being that of the plain figures."""
    if flags.karpathy is not None:
        path = Path(flags.karpathy)
        items = KarpathySet(path, Path(flags.image_root or path.parent), flags.split)
        name = f"{path.stem}-{flags.split}"
        return name, {name: (items, None)}
    if flags.data is not None:
        name = Path(flags.data).stem.strip("*{}") or "data"
        return name, {name: (_open(flags.data, flags, run), None)}
    tests = held_out_sets(run.data) or ["test"]
    known = dict.fromkeys(("val", "test", *tests))
    if flags.split not in known:
        raise UserError(f"--split {flags.split!r} of the run's own data: choose one of {', '.join(known)}")
    names = tests if flags.split == "test" else [flags.split]
    return flags.split, {name: open_test_set(run.data, name, run.captions.splitter) for name in names}


def _open(spec: str, flags: argparse.Namespace, run: RunConfig) -> TestSet:
    """A folder with one folder of images per class, or whatever training data may be."""
    from clips.config import parse_fields

    if Path(spec).is_dir() and all(path.is_dir() for path in Path(spec).iterdir() if path.name[0] != "."):
        return FolderSet(Path(spec))
    fields = parse_fields(flags.fields, run.data.fields)
    return SourceSet(open_source(spec, fields, image_root=flags.image_root, need_long=False), run.captions.splitter)
