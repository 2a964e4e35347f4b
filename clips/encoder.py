"""A trained encoder for users: images and texts in, vectors of one space out.

    from clips import CLIPS

    model = CLIPS.from_pretrained("runs/demo")  # a run, an export, or nothing: the newest run here
    model.similarity(["cat.jpg", "dog.jpg"], ["a photo of a cat", "a photo of a dog"])
    model.classify("cat.jpg", ["cat", "dog"])
    model.index("images/").search("two dogs", k=10)

Shapes: B images · T texts · C labels · S side of an image in pixels · E width of a feature.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
from collections.abc import Iterable, Iterator
from functools import cached_property, lru_cache
from itertools import islice, repeat
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from clips.common.errors import UserError, reason
from clips.common.escape import printable
from clips.common.files import check_target, read_bytes
from clips.common.live import say
from clips.common.paths import cache_root, is_remote
from clips.common.runtime import choose_device
from clips.common.tensors import hash_weights
from clips.data.demo import PROMPTS
from clips.data.images import ENDINGS, MAX_BYTES, decode_image, eval_transform, to_rgb
from clips.data.remote import read_range, remote_facts
from clips.data.sample import BrokenSample
from clips.evaluation.encode import encode_images, encode_texts, prompt_features
from clips.evaluation.testsets import Classes, ImageTestSet, check_templates, default_templates
from clips.model.clips import MAX_LOGIT_SCALE
from clips.search import Index, load_index, write_page
from clips.weights.load import LoadedModel, load_model

log = logging.getLogger("clips.encoder")
BATCH = 64
"""Images or texts of one forward pass."""
ImageLike = Image.Image | str | Path | np.ndarray | Tensor
"""A PIL image of any mode, a path, a URL, an array uint8 [H, W, 3], or pixels [3, S, S] of `CLIPS.preprocess`."""
Images = ImageLike | Iterable[ImageLike]
"""One image or several: a folder, a list, a generator, a tensor [B, 3, S, S], an array [B, H, W, 3]."""
SENTENCE_WORDS = 4
"""A text of at least this many words is encoded as it is; a shorter one is a name and goes into the prompts."""


class CLIPS:
    """A trained model with its tokenizer and preprocessing; fp32, in eval mode, safe to use from several threads."""

    def __init__(self, loaded: LoadedModel, device: torch.device) -> None:
        self.model = loaded.model.to(device).eval().requires_grad_(False)
        self.tokenizer = loaded.tokenizer
        self.path = loaded.path
        self.data = loaded.run.data.train
        """What the model was trained on: "demo", files, or nothing if the checkpoint does not say."""
        self.device = device
        self._transform = eval_transform(self.image_size)
        self.templates = tuple(PROMPTS) if self.data == "demo" else default_templates()
        """Default templates of `encode_labels`: open_clip's general ones, or the demo's."""
        self._class_features = lru_cache(maxsize=64)(self._encode_classes)

    @classmethod
    def from_pretrained(cls, path: str | Path | None = None, *, device: str = "auto") -> CLIPS:
        """Open a run, an export (native or open_clip), or an official CLIPS or OpenVision checkpoint of open_clip.

        `path` is a directory or a hub id (owner/name); None is the newest run in runs/. `device` is auto, cpu, cuda or
        cuda:N. Raises UserError if there is no trained model.

        >>> CLIPS.from_pretrained("runs/demo")
        CLIPS('runs/demo': 60 px, image tower 128×4, text tower 128×2, features of 128, captioner, …, on cpu)
        """
        return cls(load_model(path), choose_device(device))

    def __repr__(self) -> str:
        vision, text = self.model.config.vision, self.model.config.text
        parts = [
            f"{self.image_size} px, image tower {vision.width}×{vision.layers}",
            f"text tower {text.width}×{text.layers}, features of {self.embed_dim}",
        ]
        if self.model.captioner is not None:
            parts.append("captioner")
        size = sum(parameter.numel() for parameter in self.model.parameters())
        return f"CLIPS({str(self.path)!r}: {', '.join(parts)}, {size / 1e6:.1f} M parameters, on {self.device})"

    @property
    def image_size(self) -> int:
        """Side in pixels of the square that the image tower reads."""
        return self.model.visual.image_size

    @property
    def embed_dim(self) -> int:
        """Width of a feature."""
        return self.model.config.embed_dim

    @property
    def logit_scale(self) -> float:
        """The learned inverse temperature: the factor of cosines before a softmax."""
        return float(self.model.logit_scale.exp().clamp(max=MAX_LOGIT_SCALE))

    def preprocess(self, image: ImageLike) -> Tensor:
        """Return normalised pixels, float32 [3, S, S] on the CPU; a tensor of this form is returned as it is.

        Raises UserError for an unreadable file, and TypeError or ValueError for something that is not an image.
        """
        if not isinstance(image, Tensor):
            return self._transform(_open(image))
        size = self.image_size
        if image.shape != (3, size, size) or not image.is_floating_point():
            raise ValueError(f"expected floats [3, {size}, {size}] of `preprocess`: {image.dtype} {list(image.shape)}")
        return image.to("cpu", torch.float32)

    def tokenize(self, texts: Iterable[str] | str) -> Tensor:
        """Return token ids [T, L], padded to the longest text."""
        return self.tokenizer.for_tower(_texts(texts), self.model.config.text)

    @torch.no_grad()
    def encode_image(self, images: Images) -> Tensor:
        """Return L2-normalised features [B, E] on the CPU.

        >>> model.encode_image(["cat.jpg", "dog.jpg"]).shape
        torch.Size([2, 128])
        """
        features = [self.model.encode_image(batch).cpu() for batch in self._batches(images)]
        return torch.cat(features) if features else torch.empty(0, self.embed_dim)

    def _batches(self, images: Images) -> Iterator[Tensor]:
        """Yield pixels [≤ BATCH, 3, S, S] on the model's device; only one batch is held at a time."""
        if isinstance(images, (str, Path)) and Path(images).is_dir():
            folder = ImageTestSet(Path(images))
            images = [folder.root / name for name in folder.files]
        if isinstance(images, (Image.Image, str, Path)) or (
            isinstance(images, (np.ndarray, Tensor)) and images.ndim < 4
        ):
            images = [images]
        left = iter(images)
        while batch := list(islice(left, BATCH)):
            yield torch.stack([self.preprocess(image) for image in batch]).to(self.device)

    def encode_text(self, texts: Iterable[str] | str) -> Tensor:
        """Return L2-normalised features [T, E] on the CPU; one text gives [1, E]."""
        texts = _texts(texts)
        if not texts:
            return torch.empty(0, self.embed_dim)
        return encode_texts(self.model, self.tokenizer, texts, batch_size=BATCH)

    def encode_labels(self, labels: Iterable[str] | str, templates: Iterable[str] | str | None = None) -> Tensor:
        """Return L2-normalised features [C, E] of class names, such as ["cat", "dog"].

        Each is the normalised mean of the features of its prompts, which are the `templates` (default:
        `self.templates`) with the name in place of `{}`. The results of recent calls are cached.
        """
        chosen = self.templates if templates is None else check_templates(_texts(templates), "templates")
        return self._class_features(Classes(tuple(_texts(labels)), chosen))

    def _encode_classes(self, classes: Classes) -> Tensor:
        if not classes.names:
            return torch.empty(0, self.embed_dim)
        features = prompt_features(self.model, self.tokenizer, classes, batch_size=256)
        return F.normalize(features.mean(dim=1), dim=-1)

    def classify(
        self, images: Images, labels: Iterable[str] | str, templates: Iterable[str] | str | None = None
    ) -> list[dict[str, float]]:
        """Classify images without training (zero-shot): return each image's probabilities by label, likeliest first.

        The probabilities are the softmax of `logit_scale` × cosine over the labels, as in CLIP. `templates` are those
        of `encode_labels`, such as "a sprite of a {}.".

            >>> model.classify("cat.jpg", ["cat", "dog"])
            [{'cat': 0.97, 'dog': 0.03}]
        """
        names = list(dict.fromkeys(_texts(labels)))
        cosines = self.encode_image(images) @ self.encode_labels(names, templates).T
        rows = (self.logit_scale * cosines).softmax(dim=-1).tolist()
        return [dict(sorted(zip(names, row, strict=True), key=lambda pair: -pair[1])) for row in rows]

    def encode_query(self, query: str | ImageLike) -> Tensor:
        """Return the feature [E] of an image or a text.

        A string is an image if it is a URL or ends like an image's file name (`a/25.gif`), because no encoder was
        trained on file names. A text below SENTENCE_WORDS words is a name and goes through `encode_labels`.
        """
        if not isinstance(query, str) or is_remote(query) or query.lower().endswith(ENDINGS):
            return self.encode_image(query)[0]
        text = " ".join(query.split())
        is_name = len(text.split()) < SENTENCE_WORDS
        return (self.encode_labels(text) if is_name else self.encode_text(text))[0]

    def index(self, folder: str | Path, pattern: str = "**/*", *, workers: int = 0) -> Index:
        """Encode the images in `folder` and its subfolders, and return their index for `Index.search`.

        >>> model.index("photos/").search("two dogs on a beach", k=1)[0].path
        '/data/photos/0412.jpg'

        `pattern` selects files. Unreadable images are skipped and counted, and the first three are logged. `workers` is
        the number of processes that read images. Raises UserError if no image can be read.
        """
        items = ImageTestSet(Path(folder), pattern)
        encoded = encode_images(self.model, items, batch_size=BATCH, workers=workers, bar="images")
        for why in encoded.skipped[:3]:
            log.warning("%s", printable(why))
        paths = [str(items.root / items.files[i]) for i in encoded.indices]
        return Index(paths, encoded.features, self.encode_query, self._weights, len(encoded.skipped))

    def load_index(self, path: str | Path) -> Index:
        """Open the index that `Index.save` wrote. Raises UserError if it was made with other weights."""
        return load_index(path, self.encode_query, self._weights, self.embed_dim)

    def kept_index(self, folder: str | Path, *, file: str | Path | None = None, workers: int = 0) -> tuple[Index, Path]:
        """Return the index of `folder` and the `file` that stores it (default: one in the cache).

        The folder is indexed again if the file is missing, or if the files in `folder` have changed since. Raises
        UserError, before that, if the file cannot be written.
        """
        folder = Path(folder).resolve()
        name = hashlib.sha256(f"{folder} {self._weights}".encode()).hexdigest()[:24]
        path = Path(file or cache_root() / "search" / f"{name}.safetensors").resolve()  # as `_listing` meets it
        listing = _listing(folder, path)
        index = self.load_index(path) if path.exists() else None
        if index is None or index.listing != listing:
            check_target(path.parent)
            index = self.index(folder, workers=workers)
            index.listing = listing
            index.save(path)
        return index, path

    @cached_property
    def _weights(self) -> str:
        """A name of the weights by their hash; for a large model it takes seconds."""
        return hash_weights(self.model.state_dict()).hexdigest()[:12]

    def similarity(self, images: Images, texts: Iterable[str] | str) -> Tensor:
        """Return the cosines [B, T] of images and texts.

        >>> model.similarity("cat.jpg", ["a photo of a cat", "a photo of a dog"])
        tensor([[0.41, 0.13]])
        """
        return self.encode_image(images) @ self.encode_text(texts).T

    @torch.no_grad()
    def caption(self, images: Images, web: Iterable[str] | str = "") -> list[str]:
        """Return a long caption for each image by greedy decoding, given one web caption for all or one for each.

        Raises UserError if the model has no captioner (an open_clip export has none), ValueError if web captions and
        images differ in number.
        """
        if self.model.captioner is None:
            raise UserError(f"{self.path} has no captioner: open a run of a CLIPS recipe, or its native export")
        webs = repeat(web) if isinstance(web, str) else iter(_texts(web))
        bos_id, eos_id = self.tokenizer.bos_id, self.tokenizer.eos_id
        captions: list[str] = []
        for pixels in self._batches(images):
            texts = list(islice(webs, len(pixels)))
            if len(texts) < len(pixels):
                raise ValueError("there are fewer web captions than images")
            ids = self.model.caption(pixels, self.tokenize(texts).to(self.device), bos_id=bos_id, eos_id=eos_id)
            captions += map(self.tokenizer.decode, ids.tolist())
        if not isinstance(web, str) and next(webs, None) is not None:
            raise ValueError(f"there are more web captions than the {len(captions)} images")
        return captions


def _texts(texts: Iterable[str] | str) -> list[str]:
    strings = [texts] if isinstance(texts, str) else list(texts)
    for text in strings:
        if not isinstance(text, str):
            raise TypeError(f"texts must be strings, found a {type(text).__name__}")
    return strings


def _open(image: Image.Image | str | Path | np.ndarray) -> Image.Image:
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8:
            raise ValueError(f"an array must be uint8 [H, W, 3] or [H, W], found {image.dtype} {list(image.shape)}")
        image = Image.fromarray(image)
    if isinstance(image, Image.Image):
        return to_rgb(image)
    if not is_remote(str(image)) and Path(image).is_dir():
        raise UserError(f"{image} is a folder: give only it, or a list of its images (Path(folder).glob('*.jpg'))")
    try:
        if is_remote(str(image)):
            return decode_image(read_range(str(image), 0, min(remote_facts(str(image))[0], MAX_BYTES + 1)))
        return decode_image(read_bytes(image, MAX_BYTES))
    except (OSError, ImportError, ValueError, BrokenSample) as error:
        raise UserError(f"{image}: {error.reason if isinstance(error, BrokenSample) else reason(error)}") from None


def search_from_flags(flags: argparse.Namespace) -> None:
    """Run scripts/search.py: index the folder or open its index, then print the nearest images."""
    model = CLIPS.from_pretrained(flags.model, device=flags.device)
    index, file = model.kept_index(flags.image_folder, file=flags.index, workers=flags.jobs)
    skipped = f"; {index.skipped:,} could not be read" if index.skipped else ""
    say(f"{len(index):,} images of {flags.image_folder}{skipped}, encoder {model.path}; index {file}")
    matches = index.search(flags.query, flags.k)
    for match in matches:
        print(printable(f"{match.score:.3f}  {match.path}"))
    if flags.output:
        write_page(Path(flags.output), flags.query, matches)
        print(f"the images are in {flags.output}")


def _listing(folder: Path, index: Path) -> str:
    """Return a hash of the names, sizes and times of the files in `folder`, without the `index`."""
    facts = []
    for path in folder.rglob("*"):
        if path != index and not path.is_dir():
            stat = path.lstat()
            facts.append((str(path), stat.st_size, stat.st_mtime_ns))
    return hashlib.sha256(repr(sorted(facts)).encode()).hexdigest()
