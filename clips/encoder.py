"""A trained encoder in a user's hands: pictures and texts in, vectors of one space out.

    from clips import CLIPS

    model = CLIPS.from_pretrained("runs/demo")  # a run, an export, or nothing: the newest run here
    model.similarity(["cat.jpg", "dog.jpg"], ["a photo of a cat", "a photo of a dog"])

Shapes: B images · T texts · C labels · N patches of an image, a grid of G × G · S side of an image in pixels ·
E width of a feature.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from clips.common.errors import UserError
from clips.common.runtime import choose_device
from clips.data.demo import PROMPTS
from clips.data.images import decode_image, eval_transform, normalise
from clips.data.sample import BrokenSample
from clips.evaluation.evaluate import encode_texts, prompt_features
from clips.evaluation.testsets import Classes, default_templates
from clips.model.clips import MAX_LOGIT_SCALE
from clips.weights.load import LoadedModel, load_model

BATCH = 64
"""Images or texts that go through a tower at once."""
Images = Sequence[Image.Image | str | Path] | Image.Image | str | Path | Tensor
"""Pictures, paths of pictures, or pixels [B, 3, S, S] as `CLIPS.preprocess` gives them."""


class CLIPS:
    """A trained model with its tokenizer and preprocessing; fp32, in eval mode, safe to use from several threads."""

    def __init__(self, loaded: LoadedModel, device: torch.device) -> None:
        self.model = loaded.model.to(device).eval().requires_grad_(False)
        self.tokenizer = loaded.tokenizer
        self.path = loaded.path
        self.device = device
        self._transform = eval_transform(self.image_size)
        self.templates = tuple(PROMPTS) if loaded.run.data.train == "demo" else default_templates()
        """What `encode_labels` puts names into: open_clip's general templates, on the demo its own."""
        self.encode_labels = lru_cache(maxsize=64)(self._encode_labels)

    @classmethod
    def from_pretrained(cls, path: str | Path | None = None, *, device: str = "auto") -> CLIPS:
        """Open a run, a native or open_clip export, an official CLIPS or OpenVision checkpoint in open_clip's layout,
        each a directory or a hub id (owner/name); with None the newest run under runs/.

        `device`: auto, cpu or cuda. UserError where there is no trained model.
        """
        return cls(load_model(path), choose_device(device))

    @property
    def image_size(self) -> int:
        """Side in pixels of the square that the image tower reads."""
        return self.model.visual.image_size

    @property
    def embed_dim(self) -> int:
        return self.model.config.embed_dim

    @property
    def logit_scale(self) -> float:
        """What cosines are multiplied with before a softmax: the learned inverse temperature."""
        return float(self.model.logit_scale.exp().clamp(max=MAX_LOGIT_SCALE))

    def preprocess(self, image: Image.Image | str | Path) -> Tensor:
        """[3, S, S], normalised. UserError for a file that cannot be read as a picture."""
        return self._transform(_open(image))

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Token ids [T, L], padded to the longest text."""
        return self.tokenizer.for_tower(list(texts), self.model.config.text)

    def count_tokens(self, texts: Sequence[str]) -> int:
        """Tokens of the texts that the text tower reads, its own special ones not counted."""
        longest = self.model.config.text.words
        return sum(min(len(ids), longest) for ids in self.tokenizer.encode(list(texts)))

    @torch.no_grad()
    def encode_image(self, images: Images) -> Tensor:
        """L2-normalised features [B, E] on the CPU."""
        if isinstance(images, Tensor):
            batches: Iterable[Tensor] = images.split(BATCH)
        else:
            pictures = _listed(images)
            starts = range(0, len(pictures), BATCH)
            batches = (
                normalise([self._transform.pixels(_open(image)) for image in pictures[start : start + BATCH]])
                for start in starts
            )
        found = [self.model.encode_image(batch.to(self.device)).cpu() for batch in batches]
        return torch.cat(found) if found else torch.empty(0, self.embed_dim)

    def encode_text(self, texts: Sequence[str] | str) -> Tensor:
        """L2-normalised features [T, E] on the CPU."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts:
            return torch.empty(0, self.embed_dim)
        return encode_texts(self.model, self.tokenizer, texts, batch_size=BATCH)

    def _encode_labels(self, names: tuple[str, ...]) -> Tensor:
        """[C, E]: of each name the normalised mean over the prompts. Kept for the last lists of names (a tuple)."""
        features = prompt_features(self.model, self.tokenizer, Classes(names, self.templates), batch_size=256)
        return F.normalize(features.mean(dim=1), dim=-1)

    def similarity(self, images: Images, texts: Sequence[str] | str) -> Tensor:
        """Cosines [B, T]."""
        return self.encode_image(images) @ self.encode_text(texts).T

    @torch.no_grad()
    def caption(self, images: Images, web: Sequence[str] | str = "") -> list[str]:
        """Greedy long captions, one an image, given their web captions (one for all, or one each).

        UserError where the model was trained without a captioner (an open_clip export has none).
        """
        captioner = self.model.captioner
        if captioner is None:
            raise UserError(f"{self.path} has no captioner: captions need a run or its native export of a CLIPS recipe")
        if not isinstance(images, Tensor):
            images = torch.stack([self.preprocess(image) for image in _listed(images)])
        webs = [web] * len(images) if isinstance(web, str) else list(web)
        ids = self.model.caption(
            images.to(self.device), self.tokenize(webs).to(self.device),
            bos_id=self.tokenizer.bos_id, eos_id=self.tokenizer.eos_id,
        )  # fmt: skip
        return [self.tokenizer.decode(row) for row in ids.tolist()]

    @torch.no_grad()
    def patch_terms(self, image: Image.Image | str | Path) -> tuple[Tensor, Tensor]:
        """What each patch adds to the image's feature, [N, E], and that feature, their mean, [E], L2-normalised.

        mllm/chat/patch_map.py says why this split is exact. Rows of patches go down, columns to the right.
        UserError for a tower whose feature is its CLS token's, which is no mean of patches.
        """
        tower = self.model.visual
        if tower.config.pool != "mean":
            raise UserError(f"{self.path} reads an image off its CLS token: no patch has a share of its own in that")
        x_ND = tower.patches(tower(self.preprocess(image)[None].to(self.device))[1])[0].float()
        m_D = x_ND.mean(dim=0)
        sigma = (m_D.var(unbiased=False) + tower.norm.eps).sqrt()
        centred_ND = (x_ND - x_ND.mean(dim=-1, keepdim=True)) / sigma
        length = tower.proj(tower.norm(m_D)).norm()
        terms_NE = tower.proj(centred_ND * tower.norm.weight + tower.norm.bias) / length
        return terms_NE.cpu(), terms_NE.mean(dim=0).cpu()


def _listed(images: Sequence[Image.Image | str | Path] | Image.Image | str | Path) -> list[Image.Image | str | Path]:
    return [images] if isinstance(images, (Image.Image, str, Path)) else list(images)


def _open(image: Image.Image | str | Path) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    try:
        return decode_image(Path(image).read_bytes())
    except (OSError, BrokenSample) as error:
        reason = error.reason if isinstance(error, BrokenSample) else error.strerror
        raise UserError(f"{image}: {reason}") from None
