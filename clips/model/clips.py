"""The CLIPS model: two towers, a captioner, one temperature.

Shapes: B samples · E embedding width, or the image tower's without a shared space · N image tokens · T caption
positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clips.config import Freeze, ModelConfig
from clips.model.captioner import Captioner
from clips.model.layers import taken
from clips.model.text import TextTower, word_slots
from clips.model.vision import VisionTower, size_of

MAX_LOGIT_SCALE = 100.0
NO_SHARED_SPACE = (
    "this model has no space that images and texts share, since it was trained to write captions without a contrastive "
    "loss: texts have no features"
)


class Kept(NamedTuple):
    """Which tokens of each image a training pass sees, by their places, in order; None: all of them."""

    patches: Tensor | None = None
    """[B, K] of the image's N patches: those that the image tower sees."""
    image_tokens: Tensor | None = None
    """[B, J] of the tower's K patch tokens: those that the captioner sees."""


ALL = Kept()


class Outputs(NamedTuple):
    """The outputs of one forward pass (a tuple: ZeRO-3 finds the tensors of a tuple, not of an object)."""

    image_features: Tensor
    """[B, E], L2-normalised."""
    text_features: list[Tensor]
    """One [B, E] per text of the batch (web caption first), L2-normalised; none without a shared space."""
    logit_scale: Tensor
    """[1], exp of the learned temperature, at most 100."""
    caption_states: Tensor | None
    """[B, T − 1, D] decoder states that predict caption tokens 1 … T − 1, without meaning at padding; None without a
    captioner."""


class Counts(NamedTuple):
    """How many tokens of a batch are computed, which depends on its words; known while the batch is on the host."""

    texts: list[int]
    """Tokens of each text."""
    predicted: int
    """Caption tokens that are predicted."""
    captioned: int
    """Samples whose caption is predicted."""
    captioner: int
    """Image tokens of the captioned samples, their web captions' and the positions that predict."""


class CLIPSModel(nn.Module):
    """Image tower and, where configured, text tower and captioner."""

    def __init__(self, config: ModelConfig, pad_id: int) -> None:
        super().__init__()
        self.config, self.pad_id = config, pad_id
        self.visual = VisionTower(config.vision, config.embed_dim)
        self.text = TextTower(config.text, config.embed_dim, pad_id) if config.has_text_tower else None
        self.captioner = Captioner(config.captioner, config.vision, config.text) if config.captioner else None
        # One element rather than a scalar: DeepSpeed cannot broadcast 0-dimensional parameters.
        self.logit_scale = nn.Parameter(torch.tensor([math.log(1 / 0.07)]))
        if not config.embed_dim:  # only a contrastive loss would reach these
            self.logit_scale.requires_grad_(False)
            for tower in (self.visual, self.text):
                if tower is not None:
                    tower.norm.requires_grad_(False)

    def encode_image(self, images: Tensor) -> Tensor:
        """images [B, 3, S, S] → [B, E], L2-normalised."""
        return F.normalize(self.visual.proj(self.visual(images)[0]).float(), dim=-1)

    def encode_text(self, ids: Tensor, count: int | None = None) -> Tensor:
        """ids [B, L] (see clips/model/text.py) → [B, E], L2-normalised. ValueError without a shared space.

        `count`: `TextTower.count` of the ids, if known: without it the host waits for a GPU.
        """
        if self.text is None or not self.config.embed_dim:
            raise ValueError(NO_SHARED_SPACE)
        return F.normalize(self.text.proj(self.text(ids, counts=[count])[0].pooled).float(), dim=-1)

    def forward(
        self,
        images: Tensor,
        texts: list[Tensor],
        caption: Tensor | None = None,
        kept: Kept = ALL,
        counts: Counts | None = None,
    ) -> Outputs:
        """One pass for training. `texts[0]` is the web caption, which the captioner reads too.

        `caption` [B, T] holds `bos … eos` and padding; its position k predicts token k + 1. The captioner runs on the
        samples whose row is not all padding. `counts` are those of this batch, where they are known: without them a GPU
        is waited for.
        """
        pooled, tokens = self.visual(images, kept.patches)
        texts_out = []
        if self.text is not None:
            texts_out = self.text(*texts, counts=counts.texts if counts is not None else None)
        states = None
        if self.captioner is not None and caption is not None:
            patches = self.visual.patches(tokens)
            if kept.image_tokens is not None:
                patches = taken(patches, kept.image_tokens)
            web = (texts_out[0].states, texts_out[0].visible) if self.captioner.config.web else (None, None)
            predicts = word_slots(caption, self.pad_id)[:, 1:]
            inputs = [patches, *web, caption[:, :-1], predicts]
            captioned = self._captioned(caption, counts)
            if captioned is not None:
                inputs = [x if x is None else x.index_select(0, captioned) for x in inputs]
            rows = (counts.captioner, counts.predicted) if counts is not None else (None, None)
            states = self.captioner(*inputs, *rows)
            if captioned is not None:
                states = states.new_zeros(len(caption), *states.shape[1:]).index_copy(0, captioned, states)
        text_features = []
        if self.text is not None and self.config.embed_dim:
            text_features = [F.normalize(self.text.proj(text.pooled).float(), dim=-1) for text in texts_out]
        return Outputs(
            image_features=F.normalize(self.visual.proj(pooled).float(), dim=-1),
            text_features=text_features,
            logit_scale=self.logit_scale.clamp(max=math.log(MAX_LOGIT_SCALE)).exp(),
            caption_states=states,
        )

    def _captioned(self, caption: Tensor, counts: Counts | None) -> Tensor | None:
        """[C], the indices of the samples whose `caption` is predicted; None: all of them."""
        has_caption = caption[:, 0] != self.pad_id
        count = int(has_caption.sum()) if counts is None else counts.captioned
        return None if count == len(caption) else torch.nonzero_static(has_caption, size=count).squeeze(1)

    def caption_prefix(
        self, image_tokens: Tensor, web_ids: Tensor, count: int | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The captioner's inputs: all patch tokens [B, N, D], web-text states [B, M, D] and their mask.

        `image_tokens` [B, C + N, D] are those of `visual`. `web_ids` [B, L] are those of the web captions, which count
        nothing for a captioner that reads the image alone. `count` as for `encode_text`.
        """
        patches = self.visual.patches(image_tokens)
        if self.captioner is None or not self.captioner.config.web or self.text is None:
            return patches, None, None
        (web,) = self.text(web_ids, counts=[count])
        return patches, web.states, web.visible

    @torch.no_grad()
    def caption(self, images: Tensor, web_ids: Tensor, *, bos_id: int, eos_id: int) -> Tensor:
        """Captions [B, T] of `images` [B, 3, S, S] given their web captions' ids [B, L], see `Captioner.generate`."""
        if self.captioner is None:
            raise ValueError("this model was trained without a captioner")
        prefix = self.caption_prefix(self.visual(images)[1], web_ids)
        return self.captioner.generate(*prefix, bos_id, eos_id, self.pad_id)

    def set_activation_checkpointing(self, enabled: bool) -> None:
        for tower in (self.visual, self.text, self.captioner):
            if tower is not None:
                tower.blocks.activation_checkpointing = enabled

    def counts(self, images: Tensor, texts: Sequence[Tensor], caption: Tensor | None, kept: Kept = ALL) -> Counts:
        """The `counts` of `forward` for these inputs."""
        words = [] if self.text is None else [self.text.count(ids) for ids in texts]
        predicted = 0 if caption is None else int(word_slots(caption, self.pad_id)[:, 1:].sum())
        tokens = self.config.vision.tokens(size_of(images))
        for places in (kept.patches, kept.image_tokens):
            tokens = tokens if places is None else places.shape[1]
        if caption is None:
            return Counts(words, predicted, 0, 0)
        captioned = caption[:, 0] != self.pad_id
        count = int(captioned.sum())
        rows = count * tokens + predicted
        if self.text is not None and self.captioner is not None and self.captioner.config.web:
            # The web caption's CLS is not read.
            rows += self.text.count(texts[0][captioned]) - count * (self.config.text.pool == "cls")
        return Counts(words, predicted, count, rows)

    def compile_blocks(self, **options: Any) -> None:
        """Let torch.compile each block by itself, `options` being its own; those of one tower share the code.

        Batch and length are symbols in it, so that neither a longer text nor a smaller batch compiles anew. What lies
        between the blocks is a small part of the time, and holds what would break a graph: collectives, the recomputed
        logits.
        """
        for tower in (self.visual, self.text, self.captioner):
            for block in tower.blocks if tower is not None else ():
                block.compile(dynamic=True, **options)

    def freeze(self, part: Freeze) -> None:
        """Leave a tower as it is, but for its projection into the shared space; no gradient is computed inside it."""
        for name, tower in (("vision", self.visual), ("text", self.text)):
            if name == part and tower is not None:
                tower.requires_grad_(False)
                tower.proj.requires_grad_(True)

    def parameter_counts(self) -> dict[str, int]:
        """Parameters by part, the total last."""
        parts = {"vision": self.visual, "text": self.text, "captioner": self.captioner, "total": self}
        return {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items() if part is not None}
