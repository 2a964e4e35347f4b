"""An encoder's view of an image: a map of the patches that match a word.

The similarity s of an image and a text is a mean over patches, and the map shows its terms. The tower averages its
patch tokens x_i to m, normalises and projects: f = P(γ (m − mean(m)) / σ(m) + β), and s = f·t / |f|. With σ(m) and |f|
as the whole image gives them, this is linear in m, so

    s_i = P(γ (x_i − mean(x_i)) / σ(m) + β)·t / |f|      and      mean_i s_i = s, exactly.

(The usual shortcut, the cosine of each patch's own normalised projection, does not add up to s.) Much of each term says
only "there is something here", so the term of the labels' average text is subtracted.

The map shows what each token adds to the encoder's score beyond an average label. It is no segmentation, and no proof
that the encoder looked there: tokens have exchanged information in the tower.

Shapes: N patches, a grid of G × G · E width of a feature.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from clips import CLIPS
from clips.common.errors import UserError

COLOUR = (255, 122, 0)
"""Tint of patches that match."""
SIDE = 512
"""Longest side of the image with the map, pixels."""


@dataclass(frozen=True)
class PatchMap:
    """How well the patches of one image match a text."""

    patches: np.ndarray
    """[G, G], rows from the top: what each patch adds to `similarity` − `usual`; their mean is that difference."""
    similarity: float
    """Cosine of image and text."""
    usual: float
    """Cosine of the image with the average of the labels."""


def patch_map(encoder: CLIPS, image: Image.Image, text: str, labels: Sequence[str] = ()) -> PatchMap:
    """The match of each patch of `image` with `text`, a name or a sentence (see the top of this file).

    The average of `labels` is subtracted, if there are any. Raises UserError for an empty text.
    """
    text = " ".join(text.split())
    if not text:
        raise UserError("type a word or a sentence to look for")
    t_E = encoder.encode_query(text)
    usual_E = encoder.encode_labels(tuple(labels)).mean(dim=0) if labels else torch.zeros_like(t_E)
    terms_NE, feature_E = encoder.patch_terms(image)
    side = math.isqrt(len(terms_NE))
    patches = (terms_NE @ (t_E - usual_E)).view(side, side).numpy()
    return PatchMap(patches, float(feature_E @ t_E), float(feature_E @ usual_E))


def overlay(image: Image.Image, patches: np.ndarray) -> Image.Image:
    """`image` in pale grey, with its colours and a tint on matching patches [G, G].

    The tint grows with the square of a patch's share of the largest entry; negative patches have no tint. The encoder
    squashes the image to a square, so patches of other images are rectangles.
    """
    scale = SIDE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    picture = np.asarray(image.resize(size, Image.Resampling.BICUBIC), dtype=np.float32)
    strength = (np.clip(patches, 0, None) / max(float(patches.max()), 1e-9)) ** 2
    rows = np.arange(size[1]) * len(patches) // size[1]
    columns = np.arange(size[0]) * len(patches) // size[0]
    strength = strength[rows][:, columns, None].astype(np.float32)
    grey = 255 - 0.45 * (255 - picture.mean(axis=-1, keepdims=True))
    shown = grey + strength * (0.6 * picture + 0.4 * np.array(COLOUR, dtype=np.float32) - grey)
    return Image.fromarray(shown.clip(0, 255).astype(np.uint8))
