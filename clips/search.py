"""Search among images: the features of a folder's images, in memory and in one file.

Shapes: N images · E width of a feature. An index holds 4 · N · E bytes and the names of its files. 100,000 images
take 205 MB with E = 512. A search reads these features once.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clips.common.errors import UserError
from clips.common.files import read_regular
from clips.common.page import Card, Cards, Page, Section, as_html, thumbnail
from clips.common.tensors import read_safetensors, write_weights
from clips.data.images import MAX_BYTES, decode_image
from clips.data.sample import BrokenSample

THUMBNAIL = 240
"""Longest side in pixels of an image on the page."""


@dataclass(frozen=True)
class Match:
    """An image that was found."""

    path: str
    score: float
    """Cosine of the image and the query."""


class Index:
    """The features of images, float32 [N, E]; `clips.encoder.CLIPS` makes and opens an index.

    `encode` returns the feature [E] of a query, and `weights` identifies the model's weights.
    """

    def __init__(
        self, paths: Sequence[str], features: Tensor, encode: Callable[[Any], Tensor], weights: str, skipped: int = 0
    ) -> None:
        self.paths = list(paths)
        self.features = features.numpy()
        self.encode = encode
        self.weights = weights
        self.skipped = skipped
        """Number of images that could not be read."""
        self.listing = ""
        """A hash of the folder's listing before it was read, if the index is stored in a file."""

    def __len__(self) -> int:
        return len(self.paths)

    def __repr__(self) -> str:
        return f"Index({len(self):,} images, {self.features.nbytes / 1e6:.1f} MB)"

    def search(self, query: Any, k: int = 10) -> list[Match]:
        """Return the `k` images nearest to a text or an image (a PIL image, a path, a URL, an array), nearest first.

        >>> model.index("photos/").search("two dogs on a beach", k=1)
        [Match(path='/data/photos/0412.jpg', score=0.31)]
        """
        cosines = self.features @ self.encode(query).numpy()
        rows = np.argsort(-cosines, kind="stable")[:k]
        return [Match(self.paths[row], float(cosines[row])) for row in rows]

    def save(self, path: str | Path) -> None:
        """Write the index as one safetensors file; `CLIPS.load_index` opens it."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        facts = {"paths": json.dumps(self.paths), "weights": self.weights}
        facts |= {"skipped": str(self.skipped), "listing": self.listing}
        write_weights({"features": torch.from_numpy(self.features)}, Path(path), **facts)


def load_index(path: str | Path, encode: Callable[[Any], Tensor], weights: str, width: int) -> Index:
    """Open the index that `Index.save` wrote. Raises UserError for another file, and for an index of other weights."""
    tensors, facts = read_safetensors(Path(path))
    try:
        paths, features = json.loads(facts["paths"]), tensors["features"]
        index = Index(paths, features, encode, facts["weights"], int(facts["skipped"]))
    except (KeyError, TypeError, ValueError, RecursionError):
        raise UserError(f"{path} is not an index of images: choose another file, or remove it") from None
    if index.weights != weights:
        raise UserError(f"{path} was made with another model's weights: remove it, and the images are indexed again")
    are_paths = isinstance(paths, list) and all(isinstance(name, str) and "\0" not in name for name in paths)
    are_features = features.dtype == torch.float32 and features.shape == (len(paths), width)
    if not are_paths or not are_features or index.skipped < 0 or not ((features.norm(dim=1) - 1).abs() < 0.01).all():
        raise UserError(f"{path} is damaged: remove it, and the images are indexed again")
    index.listing = facts.get("listing", "")
    return index


def write_page(path: Path, query: str, matches: Sequence[Match]) -> None:
    """Write the images that were found as one self-contained HTML page.

    Raises UserError if an image cannot be decoded, and OSError if it cannot be read.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    cards = []
    for rank, match in enumerate(matches, start=1):
        try:
            image = decode_image(read_regular(match.path, MAX_BYTES + 1), match.path)
        except BrokenSample as broken:
            raise UserError(f"{broken}: remove the index, and the images are indexed again") from None
        images = [thumbnail(image, THUMBNAIL)]
        cards.append(Card(f"{rank} · {match.score:.3f}", images, [("file", match.path, None)]))
    section = Section("Nearest first", [Cards(cards)], "With the cosine of image and query.")
    path.write_text(as_html(Page(f"Images nearest to “{query}”", "", [section])), encoding="utf-8")
