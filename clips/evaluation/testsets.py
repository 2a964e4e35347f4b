"""Test sets, whose samples have captions and a class, and class lists with prompts."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from clips.common.errors import CommandError, UserError
from clips.common.files import from_json, read_bytes, read_regular
from clips.common.paths import inside, is_remote
from clips.common.tensors import listed
from clips.config import DataConfig
from clips.data.dataset import Dataset
from clips.data.demo import demo_split
from clips.data.images import ENDINGS, MAX_BYTES
from clips.data.importing.index import image_hash
from clips.data.importing.layouts import OF_HUB, warn_once
from clips.data.sample import BrokenSample
from clips.data.sentences import split_sentences
from clips.data.splits import open_split, split_spec

PROTOCOLS = {
    "sentence": "the set's own sentences, at most five: several captions of an image, or `captions` of its JSON",
    "part": "sentences of the long caption (at most five), which may fit other images too: `sentences`, or split here",
    "web": "the web caption",
    "long": "the whole long caption, as far as the text tower reads",
}
SENTENCES_PER_IMAGE = 5
MOST_COMPARED = 100_000
"""Largest number of training images that `count_trained_on` reads, if their table only names them."""


@dataclass(frozen=True)
class Item:
    """One test image: its captions by protocol (see PROTOCOLS) and its class, if known."""

    image: bytes
    captions: dict[str, list[str]] = field(default_factory=dict)
    label: str | None = None
    key: str = "image"
    """Its name in messages."""


class TestSet(Protocol):
    """What can be evaluated on: a length, and samples by index."""

    def __len__(self) -> int: ...
    def read(self, index: int) -> Item:
        """Read a sample. If it raises BrokenSample, the sample is skipped and counted."""
        ...


class SourceSet:
    """Any training source (shards, tables, demo) as a test set; the class is `label` or `cls` of the JSON member."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, index: int) -> Item:
        """Read image, captions by protocol and label of a sample. Raises BrokenSample."""
        sample = self.dataset.read(index)
        sentences = _strings(sample.extra.get("sentences")) or split_sentences(sample.long or "")
        several = list(sample.texts.web) if len(sample.texts.web) > 1 else _strings(sample.extra.get("captions"))
        captions = {
            "sentence": several[:SENTENCES_PER_IMAGE],
            "part": [] if sample.texts.others else sentences[:SENTENCES_PER_IMAGE],
            "web": [sample.web],
            "long": [sample.long] if sample.long else [],
        }
        label = sample.extra.get("label", sample.extra.get("cls"))
        return Item(sample.image, captions, None if label is None else str(label), sample.key)


def _strings(value: Any) -> list[str]:
    return [text for text in value if isinstance(text, str) and text] if isinstance(value, list) else []


class ImageTestSet:
    """The images of a folder and of the folders in it, in the order of their names.

    Raises UserError if there are none.
    """

    pattern, expected = "**/*", "files in it or in its folders"

    def __init__(self, root: Path, pattern: str | None = None) -> None:
        self.root = Path(root).resolve()
        paths = (path for path in sorted(self.root.glob(pattern or self.pattern)) if path.suffix.lower() in ENDINGS)
        self.files = [path.relative_to(self.root).as_posix() for path in paths]
        if not self.files:
            raise UserError(f"{root} holds no images: expected {self.expected}, named {', '.join(ENDINGS)}")

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> Item:
        """Read an image file; its name is the key. Raises BrokenSample."""
        name = self.files[index]
        return Item(image=_read_inside(self.root, name), key=name)


class FolderSet(ImageTestSet):
    """One folder of images per class; the folder's name is the class."""

    pattern, expected = "*/*", "one folder per class, with images in it"

    def read(self, index: int) -> Item:
        """Read an image file, labelled by its folder. Raises BrokenSample."""
        return replace(super().read(index), label=Path(self.files[index]).parent.name)


def _read_inside(root: Path, name: str) -> bytes:
    try:
        return read_regular(inside(root, name), MAX_BYTES + 1)
    except ValueError:
        raise BrokenSample(name, "the path is outside the image folder") from None
    except OSError as error:
        raise BrokenSample(name, f"cannot be read: {error.strerror}") from None


def open_test_set(data: DataConfig, split: str) -> tuple[SourceSet, Classes | None]:
    """Open a split of a run's data as a test set, and load its classes if it has a list of them (the demo does)."""
    items = SourceSet(open_split(data, split, need_long=False))
    demo = split_spec(data, split) == demo_split(data.demo_dir, split)
    return items, load_classes(Path(data.demo_dir) / "concepts.json") if demo else None


def count_trained_on(data: DataConfig, items: TestSet) -> int:
    """Return the number of images of a test set that the run has trained on, by their bytes.

    It is 0 if the training data is not on this machine, is the demo's, or has more than MOST_COMPARED images that no
    import has hashed.
    """
    specs = [data.train, *(part.data for part in data.mix)]
    if any(spec in ("", "demo") or is_remote(spec) or spec.startswith(OF_HUB) for spec in specs):
        return 0  # to open remote data would take long, or the network
    with contextlib.suppress(CommandError, OSError):  # the model may have been trained elsewhere
        train = SourceSet(open_split(data, "train", need_long=False))
        by_bytes = _are_bytes_hashed(train)
        if by_bytes or len(train) <= MOST_COMPARED:
            trained = set(_image_hashes(train, by_bytes))
            return sum(hashed in trained for hashed in _image_hashes(items, _are_bytes_hashed(items)))
    return 0


def _are_bytes_hashed(items: TestSet) -> bool:
    """Return True if the import has hashed the bytes of each image."""
    return isinstance(items, SourceSet) and all(part.facts["identity"] == "bytes" for part in items.dataset.parts)


def _image_hashes(items: TestSet, by_bytes: bool) -> Iterator[int]:
    """Yield the hash of the bytes of each image, from the index if it has them."""
    if by_bytes and isinstance(items, SourceSet):
        yield from items.dataset.hashes().tolist()
        return
    for index in range(len(items)):
        with contextlib.suppress(BrokenSample):
            yield image_hash(items.read(index).image)


@dataclass(frozen=True)
class Classes:
    """Class names for zero-shot classification, and the templates of their prompts."""

    names: tuple[str, ...]
    templates: tuple[str, ...]
    """Prompts with `{}` in place of the class name."""

    def prompts(self) -> list[str]:
        """Return the C × P prompts, class by class."""
        return [template.replace("{}", name) for name in self.names for template in self.templates]

    def index(self, labels: Sequence[str]) -> list[int]:
        """Return the class index of each label. Raises UserError with the labels that are no class.

        ImageNet's folders are named by synset (n01440764 …), and their sorted order is that of ImageNet's classes.
        Numbers are indices into the list, from 0, unless a class has a number as its name.
        """
        known = {name: i for i, name in enumerate(self.names)}
        names = sorted(set(labels))
        if not any(map(str.isdecimal, known)):
            known |= {str(i): i for i in range(len(self.names))}
        are_synsets = len(names) == len(self.names) and all(_SYNSET.fullmatch(name) for name in names)
        if are_synsets and not set(names) <= known.keys():
            known = {name: i for i, name in enumerate(names)}
        if unknown := [name for name in names if name not in known]:
            raise UserError(f"not in the class list: {listed(unknown)}; classes there: {listed(self.names)}")
        return [known[label] for label in labels]


_SYNSET = re.compile(r"n\d{8}")


def load_classes(spec: str | Path) -> Classes:
    """Load `imagenet`, or a file: a class per line, or JSON {"classes": […], "templates": ["a photo of a {}.", …]}.

    Raises UserError if the file is neither, has no class or one twice, or if a template has no place for the class.
    """
    if str(spec) == "imagenet":
        from open_clip import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES

        return Classes(tuple(IMAGENET_CLASSNAMES), tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES))
    path = Path(spec)
    try:
        text = read_bytes(path).decode()
        content = from_json(text) if path.suffix == ".json" else {"classes": text.split("\n")}
        names = tuple(name.strip() for name in content["classes"] if name.strip())
        templates = tuple(content.get("templates") or default_templates())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a class list (a class per line, or JSON with classes): {error!r}") from None
    if not names or len(set(names)) < len(names):
        raise UserError(f"{path} must list at least one class, and no class twice")
    return Classes(names, check_templates(templates, path))


def check_templates(templates: Iterable[str], where: str | Path) -> tuple[str, ...]:
    """Return the templates. Raises UserError if there are none, or if one has no place for the class name."""
    templates = tuple(templates)
    for template in templates or [""]:
        if not isinstance(template, str) or "{}" not in template:
            raise UserError(f"{where}: the template {template!r} has no {{}} for the class name")
    return templates


def classes_of(labels: Iterable[str]) -> Classes | None:
    """Return the labels themselves as classes, in general templates, or None if they are numbers instead of names."""
    names = tuple(sorted(set(labels)))
    if all(map(str.isdecimal, names)):
        warn_once("zero-shot is skipped: the labels are numbers; evaluate_clips.py --classes FILE names them in order")
        return None
    return Classes(names, default_templates())


def default_templates() -> tuple[str, ...]:
    """Return open_clip's seven general templates."""
    from open_clip import SIMPLE_IMAGENET_TEMPLATES

    return tuple(template("{}") for template in SIMPLE_IMAGENET_TEMPLATES)
