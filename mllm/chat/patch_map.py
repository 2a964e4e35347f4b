"""What an image says to a CLIPS encoder: zero-shot labels, and which patches match a word.

The similarity s of an image and a text is a mean over patches, and the map shows its terms. The tower averages its
patch tokens x_i to m, normalises and projects: f = P(γ (m − mean(m)) / σ(m) + β), and s = f·t / |f|. With σ(m) and |f|
as the whole image gives them, this is linear in m, so

    s_i = P(γ (x_i − mean(x_i)) / σ(m) + β)·t / |f|      and      mean_i s_i = s, exactly.

(The cosine of each patch's own normalised projection, the usual shortcut, does not add up to s and names places less
well: in demo scenes with several things, its best patch was nearest to the named one in 51 % of 504 cases, chance being
41 %.) Much of each term says only "there is something here", so that of the labels' average text is subtracted: 90 %.

The map is therefore what each token adds to the encoder's score, beyond what it adds for any label. It is no
segmentation, and no proof that the encoder looked there: tokens have exchanged information in the tower, so a token may
speak of another place, and hiding a patch would change all the others.

Shapes: B images · N patches, a grid of G × G · D width of a token · E width of a feature · C labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from clips.common.errors import UserError
from clips.common.runtime import choose_device
from clips.data.demo import PROMPTS
from clips.data.images import eval_transform
from clips.evaluation.evaluate import encode_texts, prompt_features, tower_size
from clips.evaluation.testsets import Classes, default_templates
from clips.weights.load import LoadedModel, load_model

MAX_LABELS = 200
"""Labels asked about at once; each one is encoded in several prompts."""
SENTENCE_WORDS = 4
"""From so many words on a text is taken as it is, not put into the prompts made for names."""
COLOUR = (255, 122, 0)
"""Of patches that match."""
PICTURE_SIDE = 512
"""Longest side of the picture with the map, pixels."""


@dataclass(frozen=True)
class Match:
    """How well the patches of one image match a text."""

    patches: np.ndarray
    """[G, G], rows from the top: what each patch adds to `similarity` − `usual`; their mean is that difference."""
    similarity: float
    """Cosine of image and text."""
    usual: float
    """Cosine of the image with the average of the labels."""


class Look:
    """A trained encoder, opened for looking; safe to use from several threads."""

    def __init__(self, loaded: LoadedModel, device: torch.device) -> None:
        self.model = loaded.model.to(device)
        self.tokenizer = loaded.tokenizer
        self.device = device
        self.transform = eval_transform(tower_size(self.model))
        demo = loaded.run.data.train == "demo"
        self.templates = tuple(PROMPTS) if demo else default_templates()
        self._text_features = lru_cache(maxsize=64)(self._encode_names)

    @staticmethod
    def load(path: str | Path, *, device: str = "auto") -> Look:
        """Open a run directory, an export, or an open_clip export of CLIPS; UserError when there is none."""
        return Look(load_model(path), choose_device(device))

    @torch.no_grad()
    def zero_shot(self, image: Image.Image, labels: Sequence[str]) -> dict[str, float]:
        """Probability of each label, largest first: softmax over cosines times the trained scale.

        UserError for fewer than two labels or more than MAX_LABELS.
        """
        names = _unique(labels)
        if not 2 <= len(names) <= MAX_LABELS:
            raise UserError(
                f"labels: {len(names)} different ones are given, between 2 and {MAX_LABELS} can be compared"
            )
        features = self.model.encode_image(self._pixels(image)).cpu()
        scale = self.model.logit_scale.exp().clamp(max=100).cpu()
        odds = (scale * features @ self._text_features(names).T).softmax(dim=-1)[0]
        order = odds.argsort(descending=True).tolist()
        return {names[i]: float(odds[i]) for i in order}

    @torch.no_grad()
    def match(self, image: Image.Image, text: str, labels: Sequence[str] = ()) -> Match:
        """Which patches of `image` match `text`, a name or a sentence (see the top of this file).

        `labels` are what the text is compared with; without any, nothing is subtracted. UserError for an empty text.
        """
        text = " ".join(text.split())
        if not text:
            raise UserError("type a word or a sentence to look for")
        if len(text.split()) < SENTENCE_WORDS:
            t_E = self._text_features((text,))[0]
        else:
            t_E = encode_texts(self.model, self.tokenizer, [text], batch_size=1)[0]
        names = _unique(labels)[:MAX_LABELS]
        usual_E = self._text_features(names).mean(dim=0) if names else torch.zeros_like(t_E)
        terms_NE, feature_E = self._terms(self._pixels(image))
        patches = terms_NE @ (t_E - usual_E)
        grid = self._grid()
        return Match(patches.view(grid, grid).numpy(), float(feature_E @ t_E), float(feature_E @ usual_E))

    def _terms(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """What each patch adds to the image's feature [N, E], whose mean it is, and that feature [E], L2-normalised."""
        tower = self.model.visual
        x_ND = tower(pixels)[1][0, 1:].float()
        m_D = x_ND.mean(dim=0)
        sigma = (m_D.var(unbiased=False) + tower.norm.eps).sqrt()
        centred_ND = (x_ND - x_ND.mean(dim=-1, keepdim=True)) / sigma
        length = tower.proj(tower.norm(m_D)).norm()
        terms_NE = tower.proj(centred_ND * tower.norm.weight + tower.norm.bias) / length
        return terms_NE.cpu(), terms_NE.mean(dim=0).cpu()

    def _encode_names(self, names: tuple[str, ...]) -> Tensor:
        """[C, E]: of each name the normalised mean over the prompts."""
        features = prompt_features(self.model, self.tokenizer, Classes(names, self.templates), batch_size=256)
        return F.normalize(features.mean(dim=1), dim=-1)

    def _pixels(self, image: Image.Image) -> Tensor:
        return self.transform(image)[None].to(self.device)

    def _grid(self) -> int:
        return tower_size(self.model) // self.model.config.vision.patch_size


def _unique(labels: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for label in labels if (name := " ".join(label.split()))))


def overlay(image: Image.Image, patches: np.ndarray) -> Image.Image:
    """`image`, pale, with its colours back and a tint where patches [G, G] match.

    The tint goes with the square of a patch's share of the largest entry; negative ones have none. The encoder sees
    the image squashed to a square, so patches are rectangles where it is not one.
    """
    scale = PICTURE_SIDE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    picture = np.asarray(image.resize(size, Image.Resampling.BICUBIC), dtype=np.float32)
    strength = (np.clip(patches, 0, None) / max(float(patches.max()), 1e-9)) ** 2
    rows = np.arange(size[1]) * len(patches) // size[1]
    columns = np.arange(size[0]) * len(patches) // size[0]
    strength = strength[rows][:, columns, None].astype(np.float32)
    grey = 255 - 0.45 * (255 - picture.mean(axis=-1, keepdims=True))
    shown = grey + strength * (0.6 * picture + 0.4 * np.float32(COLOUR) - grey)
    return Image.fromarray(shown.clip(0, 255).astype(np.uint8))
