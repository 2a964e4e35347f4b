"""What an encoder is worth: retrieval both ways, zero-shot classification, a linear probe.

Every figure is a percentage and comes with the number of items it was measured on and its chance level
(`Figure`). Ties are broken at random, in expectation: equal scores never help, and a model whose features
are all the same scores exactly chance.

Shapes: I images · T texts · C classes · P prompts per class · E embedding width · D width of the image tower.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clips.captions import CaptionTokenizer, split_sentences
from clips.config import RunConfig, SentenceSplitter
from clips.data.images import decode_image, eval_transform, normalise
from clips.data.sample import BrokenSample
from clips.data.sources import Source
from clips.data.splits import Split, open_split
from clips.errors import NotFiniteError, UserError
from clips.model import CLIPS

RECALL_AT = (1, 5, 10)
TIE = 1e-6
"""Cosines closer than this are equal: kernels round equal features differently at the edge of a block."""
PROBE_SAMPLES = 5000
"""Labelled training images of the linear probe."""


@dataclass(frozen=True)
class Figure:
    """One measured number, in percent."""

    value: float
    chance: float
    items: int


# ---------------------------------------------------------------------------------------------- metrics


def expected_hits(better: Tensor, tied: Tensor, positives: Tensor, k: int) -> Tensor:
    """Chance that one of the `positives` is among the first k, when they and `tied` negatives score the same.

    `better` negatives score above them. All [N]; float64 [N] in [0, 1]. Hypergeometric: the k − better slots
    left are filled without replacement from positives + tied items.
    """
    miss = torch.ones(len(better), dtype=torch.float64)
    for j in range(k):
        draw = (tied - j).clamp(min=0).double() / (tied + positives - j).clamp(min=1)
        miss *= torch.where(j < k - better, draw, 1.0)
    return 1 - miss


def _hits(scores: Tensor, positive: Tensor, ks: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Expected hits of each row at every k and their chance level, both [len(ks), N], in [0, 1].

    `scores` [N, M] of N queries against M candidates, `positive` [N, M] marks the right ones (≥ 1 in each row).
    """
    best = scores.masked_fill(~positive, -torch.inf).amax(dim=1, keepdim=True)
    above = scores > best + TIE
    near = (scores >= best - TIE) & ~above
    better, near_right = above.sum(1), (near & positive).sum(1)
    tied, right = near.sum(1) - near_right, positive.sum(1)
    counts = [count.cpu() for count in (better, tied, near_right)]
    chance = [torch.zeros(len(scores)), (scores.shape[1] - right).cpu(), right.cpu()]
    return (
        torch.stack([expected_hits(*counts, k) for k in ks]),
        torch.stack([expected_hits(*chance, k) for k in ks]),
    )


def _figures(names: Sequence[str], hits: list[tuple[Tensor, Tensor]]) -> dict[str, Figure]:
    values, chances = (torch.cat([part[i] for part in hits], dim=1) for i in (0, 1))
    return {
        name: Figure(round(100 * value.mean().item(), 4), round(100 * chance.mean().item(), 4), values.shape[1])
        for name, value, chance in zip(names, values, chances, strict=True)
    }


@torch.no_grad()
def retrieval_metrics(
    image_features: Tensor, text_features: Tensor, text_to_image: Sequence[int], texts: Sequence[str], chunk: int = 512
) -> dict[str, Figure]:
    """Recall at 1, 5, 10 both ways: `i2t_r1` … `t2i_r10`. Features [I, E] and [T, E] are L2-normalised.

    Text t belongs to image `text_to_image[t]`; every image needs at least one. An identical string counts as the
    same caption: image → text is a hit if any of the image's captions, or an equal string, is among the first k;
    text → image if the image is the caption's own or has an equal caption.
    """
    from scipy.sparse import csr_array

    for name, features in (("image", image_features), ("text", text_features)):
        if not torch.isfinite(features).all():
            raise NotFiniteError(f"evaluation: {name} features hold NaN or infinity")
    images, T = len(image_features), len(text_features)
    if not len(texts) == len(text_to_image) == T or set(text_to_image) != set(range(images)):
        raise ValueError("every text needs one image and every image at least one text")
    string_of = np.unique(np.asarray(texts, dtype=object), return_inverse=True)[1]
    owns = csr_array((np.ones(T, dtype=bool), (np.asarray(text_to_image), string_of)))  # image × string
    owned_by = owns.T.tocsr()
    image_features, text_features = image_features.float(), text_features.float()
    device = image_features.device

    i2t, t2i = [], []
    for start in range(0, images, chunk):
        rows = slice(start, start + chunk)
        positive = torch.from_numpy(owns[rows].toarray()[:, string_of]).to(device)
        i2t.append(_hits(image_features[rows] @ text_features.T, positive, RECALL_AT))
    for start in range(0, T, chunk):
        rows = slice(start, start + chunk)
        positive = torch.from_numpy(owned_by[string_of[rows]].toarray()).to(device)
        t2i.append(_hits(text_features[rows] @ image_features.T, positive, RECALL_AT))
    return _figures([f"i2t_r{k}" for k in RECALL_AT], i2t) | _figures([f"t2i_r{k}" for k in RECALL_AT], t2i)


@torch.no_grad()
def zero_shot_metrics(image_features: Tensor, prompt_features: Tensor, labels: Sequence[int]) -> dict[str, Figure]:
    """Accuracy of the nearest class. Images [I, E], prompts [C, P, E], both L2-normalised; `labels` are class indices.

    `top1`, `top5`: a class is the normalised mean of its prompts (the usual ensemble). `single_prompt_top1/5`: each
    prompt alone, averaged over the prompts.
    """
    C, P, _ = prompt_features.shape
    ks = (1, min(5, C))
    right = F.one_hot(torch.as_tensor(labels), C).bool().to(image_features.device)
    classes = F.normalize(prompt_features.float().mean(dim=1), dim=-1)
    ensemble = _hits(image_features.float() @ classes.T, right, ks)
    single = [_hits(image_features.float() @ prompt_features[:, p].float().T, right, ks) for p in range(P)]
    averaged = tuple(torch.stack([hits[i] for hits in single]).mean(dim=0) for i in (0, 1))
    return _figures(["top1", "top5"], [ensemble]) | _figures(["single_prompt_top1", "single_prompt_top5"], [averaged])


def linear_probe(train: Tensor, train_labels: Sequence[int], test: Tensor, test_labels: Sequence[int]) -> Figure:
    """Accuracy of a logistic regression on frozen features [N, D], standardised by the training features."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000, C=0.1))
    probe.fit(train.float().cpu().numpy(), train_labels)
    accuracy = probe.score(test.float().cpu().numpy(), test_labels)
    most_common = np.mean(np.asarray(test_labels) == np.bincount(train_labels).argmax())
    return Figure(round(100 * accuracy, 4), round(100 * float(most_common), 4), len(test_labels))


# ---------------------------------------------------------------------------------------------- test sets


@dataclass(frozen=True)
class Item:
    """One test image: its captions by protocol (see PROTOCOLS) and its class, where known."""

    image: bytes
    captions: dict[str, list[str]] = field(default_factory=dict)
    label: str | None = None


PROTOCOLS = {
    "caption": "the set's own test captions: Karpathy's five, or `captions` of the JSON member",
    "sentence": "single sentences of the long caption (at most five): `sentences` of the JSON member, or split here",
    "web": "the web caption",
}
SENTENCES_PER_IMAGE = 5


class TestSet(Protocol):
    def __len__(self) -> int: ...
    def read(self, index: int) -> Item:
        """May raise BrokenSample: the item is left out and counted."""
        ...


class SourceSet:
    """Any training source (shards, tables, demo) as a test set; `label` or `cls` of its JSON member is the class."""

    def __init__(self, source: Source, splitter: SentenceSplitter = "smart") -> None:
        self.source, self.splitter = source, splitter

    def __len__(self) -> int:
        return len(self.source)

    def read(self, index: int) -> Item:
        sample = self.source.read(index)
        sentences = _strings(sample.extra.get("sentences")) or split_sentences(sample.long or "", self.splitter)
        captions = {
            "caption": _strings(sample.extra.get("captions")),
            "sentence": sentences[:SENTENCES_PER_IMAGE],
            "web": [sample.web],
            "long": [sample.long] if sample.long else [],
        }
        label = sample.extra.get("label", sample.extra.get("cls"))
        return Item(sample.image, captions, None if label is None else str(label))


def _strings(value: Any) -> list[str]:
    return [text for text in value if isinstance(text, str) and text] if isinstance(value, list) else []


class KarpathySet:
    """COCO or Flickr30K as in A. Karpathy's split files: the first five captions of each image of one split."""

    captions_per_image = 5

    def __init__(self, path: Path, image_root: Path, split: str = "test") -> None:
        try:
            images = json.loads(Path(path).read_text())["images"]
            splits = sorted({entry["split"] for entry in images})
            self.entries = [
                (
                    str(PurePosixPath(entry.get("filepath", "")) / entry["filename"]),
                    [sentence["raw"] for sentence in entry["sentences"]][: self.captions_per_image],
                )
                for entry in images
                if entry["split"] == split
            ]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is not a Karpathy split file (images, split, sentences): {error!r}") from None
        if not self.entries:
            raise UserError(f"{path} has no images of the split {split!r}; splits there: {', '.join(splits)}")
        self.root = Path(image_root).resolve()
        if not (self.root / self.entries[0][0]).is_file():
            raise UserError(f"no image {self.entries[0][0]} under --image-root {image_root}: give the folder it is in")

    def __len__(self) -> int:
        return len(self.entries)

    def read(self, index: int) -> Item:
        name, captions = self.entries[index]
        return Item(image=_read_inside(self.root, name), captions={"caption": captions})


class FolderSet:
    """One folder of images per class; the folder's name is the class."""

    suffixes = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})

    def __init__(self, root: Path) -> None:
        self.root = Path(root).resolve()
        self.files = [
            (path.relative_to(self.root).as_posix(), path.parent.name)
            for path in sorted(self.root.glob("*/*"))
            if path.suffix.lower() in self.suffixes
        ]
        if not self.files:
            raise UserError(f"{root} holds no images: expected one folder per class, with images in it")

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> Item:
        name, label = self.files[index]
        return Item(image=_read_inside(self.root, name), label=label)


def _read_inside(root: Path, name: str) -> bytes:
    path = (root / name).resolve()
    if not path.is_relative_to(root):
        raise BrokenSample(name, "the path leads out of the image folder")
    try:
        return path.read_bytes()
    except OSError as error:
        raise BrokenSample(name, f"cannot be read: {error.strerror}") from None


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


# ---------------------------------------------------------------------------------------------- features


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


@torch.no_grad()
def encode_images(
    model: CLIPS,
    items: TestSet,
    *,
    image_size: int | None = None,
    batch_size: int,
    workers: int = 0,
    limit: int | None = None,
) -> ImageSet:
    """Run `items` (the first `limit` of a fixed shuffle, in order) through the image tower, on the model's device.

    `image_size`: the resolution to work at, the one that the tower is set to by default.
    """
    image_size = image_size or tower_size(model)
    indices: Sequence[int] = range(len(items))
    if limit is not None and limit < len(items):
        indices = sorted(torch.randperm(len(items), generator=torch.Generator().manual_seed(0))[:limit].tolist())
    loader = DataLoader(
        _Pixels(items, indices, image_size), batch_size=batch_size, num_workers=workers, collate_fn=list
    )
    features, pooled, found, skipped = [], [], [], []
    with evaluating(model, image_size) as device:
        for batch in loader:
            skipped += [entry for entry in batch if isinstance(entry, str)]
            if good := [entry for entry in batch if not isinstance(entry, str)]:
                states, _ = model.visual(normalise([pixels for pixels, _, _ in good]).to(device))
                features.append(F.normalize(model.visual.proj(states).float(), dim=-1).cpu())
                pooled.append(states.float().cpu())
                found += [(item, index) for _, item, index in good]
    if not found:
        raise UserError(f"no image of the test set can be read, for example {skipped[0] if skipped else 'it is empty'}")
    return ImageSet(
        features=torch.cat(features),
        pooled=torch.cat(pooled),
        captions=[item.captions for item, _ in found],
        labels=[item.label for item, _ in found],
        indices=[index for _, index in found],
        skipped=skipped,
    )


@torch.no_grad()
def encode_texts(model: CLIPS, tokenizer: CaptionTokenizer, texts: Sequence[str], *, batch_size: int) -> Tensor:
    """L2-normalised features [T, E] on the CPU; equal strings are encoded once, similar lengths together."""
    config = model.config.text
    unique = sorted(set(texts), key=lambda text: (len(text), text))
    row = {text: i for i, text in enumerate(unique)}
    with evaluating(model) as device:
        parts = [
            model.encode_text(
                tokenizer(unique[i : i + batch_size], config.context_length, trim=config.pad_mask).to(device)
            ).cpu()
            for i in range(0, len(unique), batch_size)
        ]
    return torch.cat(parts)[[row[text] for text in texts]]


def tower_size(model: CLIPS) -> int:
    """The image size, in pixels, that the image tower's positions are set to."""
    return math.isqrt(len(model.visual.pos_embed) - 1) * model.config.vision.patch_size


@contextmanager
def evaluating(model: CLIPS, image_size: int | None = None) -> Iterator[torch.device]:
    """Evaluation mode at `image_size`, and the model as it was afterwards; yields the model's device."""
    training, tower, before = model.training, model.visual, tower_size(model)
    model.eval()
    if image_size is not None and image_size != before:
        tower.set_image_size(image_size)
    try:
        yield tower.cls_token.device
    finally:
        model.train(training)
        if image_size is not None and image_size != before:
            tower.set_image_size(before)


# ---------------------------------------------------------------------------------------------- classes


@dataclass(frozen=True)
class Classes:
    names: tuple[str, ...]
    templates: tuple[str, ...]
    """Prompts with `{}` in the name's place."""

    def prompts(self) -> list[str]:
        """C × P prompts, class by class."""
        return [template.format(name) for name in self.names for template in self.templates]

    def index(self, labels: Sequence[str]) -> list[int]:
        """Class index of each label; UserError names those that are no class.

        ImageNet's folders are named by synset (n01440764 …): in sorted order they are ImageNet's classes.
        """
        known = {name: i for i, name in enumerate(self.names)}
        found = sorted(set(labels))
        if not set(found) <= known.keys() and len(found) == len(known) and all(_SYNSET.fullmatch(n) for n in found):
            known = {name: i for i, name in enumerate(found)}
        if unknown := [name for name in found if name not in known]:
            raise UserError(
                f"labels that are not in the class list: {', '.join(unknown[:5])}{' …' if len(unknown) > 5 else ''}; "
                f"classes there: {', '.join(self.names[:5])}{' …' if len(self.names) > 5 else ''}"
            )
        return [known[label] for label in labels]


_SYNSET = re.compile(r"n\d{8}")


def load_classes(spec: str | Path) -> Classes:
    """`imagenet`, or a file: one class per line, or JSON `{"classes": […], "templates": ["a photo of a {}.", …]}`."""
    from open_clip import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES

    if str(spec) == "imagenet":
        return Classes(tuple(IMAGENET_CLASSNAMES), tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES))
    path = Path(spec)
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else {"classes": text.split("\n")}
        names = tuple(name.strip() for name in content["classes"] if name.strip())
        templates = tuple(content.get("templates") or default_templates())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not a class list (one class per line, or JSON with classes and templates): {error!r}"
        ) from None
    if not names or len(set(names)) < len(names):
        raise UserError(f"{path} must name at least one class, and none twice")
    if wrong := [template for template in templates if "{}" not in template]:
        raise UserError(f"{path}: the template {wrong[0]!r} has no {{}} for the class name")
    return Classes(names, templates)


def default_templates() -> tuple[str, ...]:
    """open_clip's seven general templates."""
    from open_clip import SIMPLE_IMAGENET_TEMPLATES

    return tuple(template("{}") for template in SIMPLE_IMAGENET_TEMPLATES)


def prompt_features(model: CLIPS, tokenizer: CaptionTokenizer, classes: Classes, *, batch_size: int) -> Tensor:
    """L2-normalised features [C, P, E] of every class in every template."""
    features = encode_texts(model, tokenizer, classes.prompts(), batch_size=batch_size)
    return features.view(len(classes.names), len(classes.templates), -1)


# ---------------------------------------------------------------------------------------------- entry points


def measure(
    model: CLIPS, tokenizer: CaptionTokenizer, images: ImageSet, classes: Classes | None = None, *, batch_size: int
) -> dict[str, Figure]:
    """Everything that `images` allow: `PROTOCOL_i2t_r1` … for each protocol, `zero_shot_top1` … where labels are.

    Where only some images carry a label, these are for classification and the others for retrieval (the demo).
    Without `classes` the labels themselves are the classes, in open_clip's general templates.
    """
    figures = {}
    labelled = [row for row, label in enumerate(images.labels) if label is not None]
    for protocol in PROTOCOLS:
        rows = retrieval_rows(images, protocol)
        if len(rows) < 2:
            continue
        texts = [text for row in rows for text in images.captions[row][protocol]]
        owners = [i for i, row in enumerate(rows) for _ in images.captions[row][protocol]]
        features = encode_texts(model, tokenizer, texts, batch_size=batch_size)
        found = retrieval_metrics(images.features[rows], features, owners, texts)
        figures |= {f"{protocol}_{name}": figure for name, figure in found.items()}
    if labelled:
        labels = [images.labels[row] for row in labelled]
        classes = classes or Classes(tuple(sorted(set(labels))), default_templates())
        prompts = prompt_features(model, tokenizer, classes, batch_size=batch_size)
        found = zero_shot_metrics(images.features[labelled], prompts, classes.index(labels))
        figures |= {f"zero_shot_{name}": figure for name, figure in found.items()}
    return figures


def retrieval_rows(images: ImageSet, protocol: str) -> list[int]:
    """The images that retrieval by `protocol` is measured on (see `measure`)."""
    unlabelled = [row for row, label in enumerate(images.labels) if label is None]
    return [row for row in unlabelled or range(len(images.labels)) if images.captions[row].get(protocol)]


def open_test_set(run: RunConfig, split: Split) -> tuple[SourceSet, Classes | None]:
    """A split of a run's data as a test set, and its classes where it names any (the demo does)."""
    items = SourceSet(open_split(run.data, split, need_long=False), run.captions.splitter)
    demo = run.data.train == "demo" and getattr(run.data, split) in (None, "demo")
    return items, load_classes(Path(run.data.demo_dir) / "concepts.json") if demo else None


def evaluate(
    model: CLIPS,
    tokenizer: CaptionTokenizer,
    run: RunConfig,
    split: Split = "val",
    *,
    full: bool = False,
    image_size: int | None = None,
    out: Path | None = None,
) -> dict[str, float]:
    """Measure `model` on a split of its run's data: flat figures in percent (names as in `measure`).

    During training at most `eval.max_images` images are used; `full` uses all and adds `linear_probe_top1` where the
    training data has labels. `out` receives the figures with their items and chance levels. The weights must be whole
    on this process (ZeRO-3: gather them first). The model's mode, resolution and device stay as they are.
    """
    items, classes = open_test_set(run, split)
    options = {
        "image_size": image_size,
        "batch_size": run.eval.batch_size,
        "workers": run.data.workers,
    }
    images = encode_images(model, items, limit=None if full else run.eval.max_images, **options)
    figures = measure(model, tokenizer, images, classes, batch_size=run.eval.batch_size)
    if full and any(label is not None for label in images.labels):
        train = encode_images(model, open_test_set(run, "train")[0], limit=PROBE_SAMPLES, **options)
        if (probe := probe_images(train, images)) is not None:
            figures["linear_probe_top1"] = probe
    if out is not None:
        write_figures(out, figures, test_set=f"{split} split", skipped=images.skipped)
    return {name: figure.value for name, figure in figures.items()}


def probe_images(train: ImageSet, test: ImageSet) -> Figure | None:
    """Linear probe from the labelled images of one set to those of another; None when there is nothing to separate."""
    names = sorted({label for label in train.labels if label is not None})
    number = {name: i for i, name in enumerate(names)}
    fit = [row for row, label in enumerate(train.labels) if label is not None]
    check = [row for row, label in enumerate(test.labels) if label in number]
    if len(names) < 2 or not check:
        return None
    return linear_probe(
        train.pooled[fit],
        [number[train.labels[row]] for row in fit],
        test.pooled[check],
        [number[test.labels[row]] for row in check],
    )


def write_figures(path: Path, figures: dict[str, Figure], *, test_set: str, skipped: Sequence[str]) -> None:
    """JSON with each figure's value, chance level (percent) and number of items."""
    content = {
        "test_set": test_set,
        "unit": "percent",
        "figures": {name: asdict(figure) for name, figure in figures.items()},
        "skipped_images": len(skipped),
        "skipped": list(skipped[:20]),
    }
    Path(path).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def print_figures(figures: dict[str, Figure], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("figure")
    for name in ("%", "chance %", "items"):
        table.add_column(name, justify="right")
    for name, figure in figures.items():
        table.add_row(name, f"{figure.value:.1f}", f"{figure.chance:.2f}", f"{figure.items:,}")
    Console().print(table)
