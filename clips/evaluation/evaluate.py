"""Measure an encoder on test sets: retrieval, zero-shot classification, captions, a linear probe, and the command.

Every metric is in percent or in nats, and comes with its chance level and the number of samples it was measured on.
"""

import argparse
import hashlib
import os
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from clips.common.errors import UserError
from clips.common.files import check_target, sha256
from clips.common.live import say
from clips.common.page import Card, print_table, thumbnail
from clips.common.report import IMAGES, SIDE
from clips.config import Fields, RunConfig, check_image_size, parse_fields
from clips.data.dataset import open_data
from clips.data.images import decode_image
from clips.data.importing.layouts import TABLES, in_folder
from clips.data.splits import held_out_sets, split_spec
from clips.data.tokenizer import CaptionTokenizer
from clips.evaluation.encode import ImageSet, encode_images, encode_texts, prompt_features
from clips.evaluation.metrics import Metric, linear_probe, retrieval_metrics, token_accuracy, zero_shot_metrics
from clips.evaluation.results import metrics_table, missing_of, write_metrics
from clips.evaluation.testsets import (
    PROTOCOLS,
    Classes,
    FolderSet,
    SourceSet,
    TestSet,
    classes_of,
    count_trained_on,
    load_classes,
    open_test_set,
)
from clips.model.clips import MAX_LOGIT_SCALE, CLIPSModel

TestSetAndClasses = tuple[TestSet, Classes | None]
PROBE_SAMPLES = 5000
"""Number of training images that are encoded for the linear probe; it is fitted on those with a label."""
POOL, NEAREST = 1000, 5
"""Number of test images whose texts are searched for the nearest ones, and number of texts shown for an image."""


def measure(
    model: CLIPSModel,
    tokenizer: CaptionTokenizer,
    images: ImageSet,
    classes: Classes | None = None,
    *,
    batch_size: int,
    sharded: bool = False,
) -> dict[str, Metric]:
    """Return all metrics that `images` allow: `PROTOCOL_i2t_r1` …, `zero_shot_top1` … and `caption_token_top1`.

    If only some images have a label, these are used for classification and the others for retrieval (the demo).
    Without `classes` the labels are the classes, in open_clip's general templates.
    If `sharded` (collective), the ranks share the texts and only rank 0 returns metrics.
    """
    metrics: dict[str, Metric] = {}
    here = not sharded or dist.get_rank() == 0
    scale = float(model.logit_scale.detach().exp().clamp(max=MAX_LOGIT_SCALE))
    for protocol in PROTOCOLS:
        rows = retrieval_rows(images, protocol)
        if len(rows) < 2:
            continue
        texts = [text for row in rows for text in images.captions[row][protocol]]
        owners = [i for i, row in enumerate(rows) for _ in images.captions[row][protocol]]
        features = encode_texts(model, tokenizer, texts, batch_size=batch_size, sharded=sharded)
        measured = retrieval_metrics(images.features[rows], features, owners, texts, scale) if here else {}
        metrics |= {f"{protocol}_{name}": metric for name, metric in measured.items()}
    labelled = labelled_rows(images)
    if labelled and (classes := classes or classes_of(labelled.values())):
        prompts = prompt_features(model, tokenizer, classes, batch_size=batch_size, sharded=sharded)
        truth = classes.index(list(labelled.values()))
        measured = zero_shot_metrics(images.features[list(labelled)], prompts, truth) if here else {}
        metrics |= {f"zero_shot_{name}": metric for name, metric in measured.items()}
    if here and images.caption_tokens is not None:
        metrics["caption_token_top1"] = token_accuracy(*images.caption_tokens)
    return metrics


def labelled_rows(images: ImageSet) -> dict[int, str]:
    """Return the labels of the images that have one, by row."""
    return {row: label for row, label in enumerate(images.labels) if label is not None}


def retrieval_rows(images: ImageSet, protocol: str) -> list[int]:
    """Return the rows of the images on which retrieval by `protocol` is measured (see `measure`)."""
    unlabelled = [row for row, label in enumerate(images.labels) if label is None] or range(len(images.labels))
    rows = [row for row in unlabelled if images.captions[row].get(protocol)]
    # A few images have several captions only because a table lists them twice by accident.
    return rows if protocol != "sentence" or 2 * len(rows) > len(unlabelled) else []


@torch.no_grad()
def nearest_texts(
    model: CLIPSModel, tokenizer: CaptionTokenizer, items: TestSet, *, image_size: int, batch_size: int, workers: int
) -> list[Card]:
    """Return images of a test set, drawn at random, each with the texts of the set that are nearest to it."""
    images = encode_images(model, items, batch_size=batch_size, image_size=image_size, workers=workers, limit=POOL)
    rows_by_protocol = [(name, retrieval_rows(images, name)) for name in PROTOCOLS]
    protocol, rows = next(((name, rows) for name, rows in rows_by_protocol if rows), ("", []))
    texts = [images.captions[row][protocol][0] for row in rows]
    features = encode_texts(model, tokenizer, texts, batch_size=batch_size) if texts else None
    cards = []
    for i in random.Random(0).sample(range(len(rows)), min(IMAGES, len(rows))):
        assert features is not None
        cosines, nearest = (features @ images.features[rows[i]]).topk(min(NEAREST, len(rows)))
        found = [
            (f"cosine {cosine:.2f}", texts[j], True if texts[j] == texts[i] else None)
            for cosine, j in zip(cosines.tolist(), nearest.tolist(), strict=True)
        ]
        image = thumbnail(decode_image(items.read(images.indices[rows[i]]).image), SIDE)
        cards.append(Card(texts[i], [image], found))
    return cards


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
) -> dict[str, Metric]:
    """Measure `model` on a split of its run's data (names as in `measure`); "test" means all its test sets.

    Metrics of the first test set have plain names, those of another set are called NAME/METRIC. During training at most
    `eval.max_images` images are used. `full` uses all and adds `caption_token_top1` if there is a captioner and
    `linear_probe_top1` if the training data has labels. The metrics are written to the JSON file `out`, with the
    `checkpoint` of the weights (`clips.common.rundir.weights_of`). The weights must be complete in this process
    (ZeRO-3: gather them first). The model's mode, resolution and device stay as they are. `image_size` is the side of
    the square images (default: the tower's size). If `sharded` (collective, and not with `full`), the ranks share the
    work and only rank 0 returns metrics.
    """
    names = held_out_sets(run.data) if split == "test" else [split]
    metrics, skipped, _ = _measure_sets(
        model, tokenizer, {name: open_test_set(run.data, name) for name in names}, split,
        probe_train=(lambda: open_test_set(run.data, "train")[0]) if full else None, probe_limit=PROBE_SAMPLES,
        captioned=full, sharded=sharded, limit=None if full else run.eval.max_images,
        image_size=image_size, batch_size=run.eval.batch_size, workers=run.data.workers,
    )  # fmt: skip
    if out is not None:
        missing = missing_of(run.data, split)
        write_metrics(
            out, metrics, model, skipped,
            test_set=split, checkpoint=checkpoint, image_size=image_size, missing=missing,
        )  # fmt: skip
    return metrics


def _measure_sets(
    model: CLIPSModel,
    tokenizer: CaptionTokenizer,
    sets: Mapping[str, TestSetAndClasses],
    first: str,
    *,
    probe_train: Callable[[], TestSet] | None,
    probe_limit: int | None = None,
    captioned: bool = True,
    sharded: bool = False,
    limit: int | None,
    **options: Any,
) -> tuple[dict[str, Metric], list[str], int]:
    """Return the metrics of all sets, those of `first` under plain names, why images were skipped, and their number.

    Each image is read and encoded only once. If a set has labels, a linear probe is fitted on the labelled images of
    `probe_train`.
    """
    metrics: dict[str, Metric] = {}
    skipped: list[str] = []
    count = 0
    probe = None
    for name, (items, classes) in sets.items():
        read_by = tokenizer if captioned else None
        images = encode_images(model, items, sharded=sharded, tokenizer=read_by, limit=limit, **options)
        measured = measure(model, tokenizer, images, classes, batch_size=options["batch_size"], sharded=sharded)
        if probe_train is not None and labelled_rows(images):
            probe = probe or probe_images(encode_images(model, probe_train(), limit=probe_limit, **options))
            probed = probe(images)
            measured |= {"linear_probe_top1": probed} if probed else {}
        metrics |= measured if name == first else {f"{name}/{metric}": value for metric, value in measured.items()}
        skipped += images.skipped
        count += len(images.indices)
    return metrics, skipped, count


def probe_images(train: ImageSet) -> Callable[[ImageSet], Metric | None]:
    """Fit a linear probe to the labelled images of a set, and return a function that measures it on other sets.

    The function returns None if `train` has fewer than two classes, or if the other set has none of its labels.
    """
    fit = labelled_rows(train)
    number = {name: i for i, name in enumerate(sorted(set(fit.values())))}
    classes = [number[label] for label in fit.values()]
    probe = linear_probe(train.pooled[list(fit)], classes) if len(number) > 1 else None

    def measured(test: ImageSet) -> Metric | None:
        check = {row: label for row, label in labelled_rows(test).items() if label in number}
        if probe is None or not check:
            return None
        return probe(test.pooled[list(check)], [number[label] for label in check.values()])

    return measured


def evaluate_from_flags(flags: argparse.Namespace) -> None:
    """Run scripts/evaluate_clips.py: measure a trained model on test sets, print a table and write a JSON file.

    Raises UserError if nothing can be written at --output, and if the test images have neither captions nor labels, or
    none of the labels of --probe-train.
    """
    from clips.common.runtime import choose_device
    from clips.weights.load import load_model

    loaded = load_model(flags.model)
    model, run = loaded.model.to(choose_device(flags.device)), loaded.run
    name, sets = _test_sets_of(flags, run)
    first = next(iter(sets))
    name += f"-{flags.limit}" if flags.limit else ""
    size = model.visual.image_size if flags.image_size is None else flags.image_size
    check_image_size(size, run.model.vision.patch_size, "--image-size")
    name += f"-{size}px" if flags.image_size else ""
    name += f"-{loaded.path.name}" if loaded.is_checkpoint else ""
    if flags.classes is not None:
        sets = {key: (items, load_classes(flags.classes)) for key, (items, _) in sets.items()}
    batch_size = flags.batch_size or run.eval.batch_size
    out = Path(flags.output) if flags.output else loaded.home / f"evaluation-{name}.json"
    check_target(out.parent)
    fields = parse_fields(flags.fields, run.data.fields)
    metrics, skipped, count = _measure_sets(
        model, loaded.tokenizer, sets, first,
        probe_train=(lambda: _open(flags.probe_train, fields, flags.image_root)) if flags.probe_train else None,
        limit=flags.limit, image_size=size, batch_size=batch_size, workers=run.data.workers,
    )  # fmt: skip
    if not metrics:
        raise UserError("nothing to measure: the test set has neither captions nor labels; name its --fields")
    if flags.probe_train is not None and not any(metric.endswith("linear_probe_top1") for metric in metrics):
        raise UserError(
            f"--probe-train {flags.probe_train} has none of the labels of the test images: use the same class names"
        )
    missing = missing_of(run.data, first)
    if trained := sum(count_trained_on(run.data, items) for items, _ in sets.values()):
        total = sum(len(items) for items, _ in sets.values())
        missing = f"{name}: the model was trained on {trained:,} of these {total:,} images."
    print_table(metrics_table(metrics, f"{loaded.home} on {name}", first, missing))  # the disk may be full by now
    out.parent.mkdir(parents=True, exist_ok=True)
    write_metrics(
        out, metrics, model, skipped,
        test_set=name, checkpoint=loaded.checkpoint, image_size=size, missing=missing, limit=flags.limit,
        trained_on=trained,
    )  # fmt: skip
    print(f"{count:,} images, {len(skipped)} skipped; written to {out}")


def _test_sets_of(flags: argparse.Namespace, run: RunConfig) -> tuple[str, dict[str, TestSetAndClasses]]:
    """Return the name of the measurement, and the sets by name; metrics of the first set have plain names."""
    if flags.karpathy is not None:
        path = Path(flags.karpathy)
        split = flags.split or "test"
        items = SourceSet(open_data(f"{path}#{split}", Fields(), image_root=flags.image_root, need_long=False))
        name = f"{path.stem}-{split}-{_key(path)}"
        return name, {name: (items, None)}
    if flags.data is not None:
        name = f"{Path(flags.data).stem.strip('*{}') or 'data'}-{_key(Path(flags.data))}"
        return name, {name: (_open(flags.data, parse_fields(flags.fields, run.data.fields), flags.image_root), None)}
    tests = held_out_sets(run.data)
    known = dict.fromkeys(("val", "test", *tests))
    split = flags.split or ("test" if tests or not split_spec(run.data, "val") else "val")
    if split not in known:
        raise UserError(f"--split {split!r} of the run's own data: choose one of {', '.join(known)}")
    names = [name for name in (tests if split == "test" else [split]) if split_spec(run.data, name)]
    if not names:
        raise UserError(f"the model's run names no {split} data: give --data, in any format that training accepts")
    if split != flags.split and split == "val":
        say("the run has no test data: measuring on the validation images, which it did not train on")
    return split, {name: open_test_set(run.data, name) for name in names}


def _key(data: Path) -> str:
    """Return a hash that tells sets of one base name apart: of a file's bytes, or of the path of any other data."""
    return sha256(data)[:8] if data.is_file() else hashlib.sha256(os.fsencode(data.absolute())).hexdigest()[:8]


def _open(spec: str, fields: Fields, image_root: str | None) -> TestSet:
    """Open a folder with one folder of images per class, or data in any form that training takes."""
    if Path(spec).is_dir() and all(path.is_dir() for path in Path(spec).iterdir() if path.name[0] != "."):
        # The data/ or train/ of a set is no class of images.
        inner = [str(path) for path in map(Path(spec).joinpath, ("data", "train")) if path.is_dir()]
        if not any(in_folder(folder, (".tar", *TABLES)) for folder in inner):
            return FolderSet(Path(spec))
    return SourceSet(open_data(spec, fields, image_root=image_root, need_long=False))
