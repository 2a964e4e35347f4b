"""The CLIPS model: two towers, a captioner, one logit scale.

Shapes: B samples · E embedding width · N image tokens · T caption positions.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clips.config import Freeze, ModelConfig
from clips.model.captioner import Captioner
from clips.model.layers import taken
from clips.model.text import TextTower, count_computed, word_slots
from clips.model.vision import VisionTower

MAX_LOGIT_SCALE = 100.0


class Kept(NamedTuple):
    """Indices of the tokens of each image that a training pass sees, in order; None means all of them."""

    patches: Tensor | None = None
    """[B, K] among the N patches of the image: those that the image tower sees."""
    image_tokens: Tensor | None = None
    """[B, J] among the K patch tokens of the tower: those that the captioner sees."""


ALL = Kept()


class Outputs(NamedTuple):
    """The outputs of one forward pass (a tuple: ZeRO-3 finds the tensors of a tuple, not of an object)."""

    image_features: Tensor
    """[B, E], L2-normalised."""
    text_features: list[Tensor]
    """One [B, E] per text of the batch (web caption first), L2-normalised."""
    logit_scale: Tensor
    """[1], exp of the learned logit scale: the factor of cosines, at most 100."""
    caption_states: Tensor | None
    """[B, T − 1, D] decoder states that predict caption tokens 1 … T − 1, meaningless at padding; None without a
    captioner."""


class Counts(NamedTuple):
    """Numbers of tokens to compute in a batch. They depend on its texts, and are counted while it is on the host."""

    texts: list[int]
    """Number of tokens of each text."""
    predicted: int
    """Caption tokens that are predicted."""
    captioned: int
    """Samples whose caption is predicted."""
    captioner: int
    """Tokens of the captioner: image and web-caption tokens of the captioned samples, and positions that predict."""


def count_tokens(
    config: ModelConfig, pad_id: int, image_size: int, texts: Sequence[Tensor], caption: Tensor | None, kept: Kept = ALL
) -> Counts:
    """Count the tokens that `CLIPSModel.forward` computes for its `texts` [B, L] and `caption` [B, T], on the host.

    The images have a side of `image_size` pixels.
    """
    words = [count_computed(ids, config.text, pad_id) for ids in texts]
    if caption is None:
        return Counts(words, 0, 0, 0)
    tokens = config.vision.tokens(image_size)
    for indices in (kept.patches, kept.image_tokens):
        tokens = tokens if indices is None else indices.shape[1]
    captioned = caption[:, 0] != pad_id
    count, predicted = int(captioned.sum()), int(word_slots(caption, pad_id)[:, 1:].sum())
    web = count_computed(texts[0][captioned], config.text, pad_id)
    web -= count * (config.text.pool == "cls")  # the captioner does not read its CLS
    return Counts(words, predicted, count, count * tokens + web + predicted)


class CLIPSModel(nn.Module):
    """Both towers and, where configured, the captioner."""

    def __init__(self, config: ModelConfig, pad_id: int) -> None:
        super().__init__()
        self.config, self.pad_id = config, pad_id
        self.visual = VisionTower(config.vision, config.embed_dim)
        self.text = TextTower(config.text, config.embed_dim, pad_id)
        self.captioner = Captioner(config.captioner, config.vision, config.text) if config.captioner else None
        # One element rather than a scalar: DeepSpeed cannot broadcast 0-dimensional parameters.
        self.logit_scale = nn.Parameter(torch.tensor([math.log(1 / 0.07)]))

    def encode_image(self, images: Tensor) -> Tensor:
        """Encode images [B, 3, S, S] as L2-normalised features [B, E]."""
        return F.normalize(self.visual.proj(self.visual(images)[0]).float(), dim=-1)

    def encode_text(self, ids: Tensor, count: int | None = None) -> Tensor:
        """Encode ids [B, L] (see clips/model/text.py) as L2-normalised features [B, E].

        `count` is the `count_computed` of the ids; if it is not given, the host waits for the GPU.
        """
        return F.normalize(self.text.proj(self.text(ids, counts=[count])[0].pooled).float(), dim=-1)

    def forward(
        self,
        images: Tensor,
        texts: list[Tensor],
        caption: Tensor | None = None,
        kept: Kept = ALL,
        counts: Counts | None = None,
    ) -> Outputs:
        """Run one training pass. `texts[0]` is the web caption, which the captioner reads too.

        `caption` [B, T] holds `bos … eos` and padding; its position k predicts token k + 1. The captioner runs on the
        samples whose row is not all padding. `counts` are those of this batch; if they are not given, the host waits
        for the GPU.
        """
        pooled, tokens = self.visual(images, kept.patches)
        texts_out = self.text(*texts, counts=counts.texts if counts is not None else None)
        states = None
        if self.captioner is not None and caption is not None:
            patches = self.visual.patches(tokens)
            if kept.image_tokens is not None:
                patches = taken(patches, kept.image_tokens)
            predicts = word_slots(caption, self.pad_id)[:, 1:]
            inputs = [patches, texts_out[0].states, texts_out[0].visible, caption[:, :-1], predicts]
            captioned = self._captioned(caption, counts)
            if captioned is not None:
                inputs = [x if x is None else x.index_select(0, captioned) for x in inputs]
            rows = (counts.captioner, counts.predicted) if counts is not None else (None, None)
            states = self.captioner(*inputs, *rows)
            if captioned is not None:
                states = states.new_zeros(len(caption), *states.shape[1:]).index_copy(0, captioned, states)
        return Outputs(
            image_features=F.normalize(self.visual.proj(pooled).float(), dim=-1),
            text_features=[F.normalize(self.text.proj(text.pooled).float(), dim=-1) for text in texts_out],
            logit_scale=self.logit_scale.clamp(max=math.log(MAX_LOGIT_SCALE)).exp(),
            caption_states=states,
        )

    def _captioned(self, caption: Tensor, counts: Counts | None) -> Tensor | None:
        """Return the indices [C] of the samples whose `caption` is predicted, or None for all of them."""
        has_caption = caption[:, 0] != self.pad_id
        count = int(has_caption.sum()) if counts is None else counts.captioned
        return None if count == len(caption) else torch.nonzero_static(has_caption, size=count).squeeze(1)

    def caption_prefix(
        self, image_tokens: Tensor, web_ids: Tensor, count: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the captioner's inputs: all patch tokens [B, N, D], web-text states [B, M, D] and their mask.

        `image_tokens` [B, C + N, D] come from `visual`, and `web_ids` [B, L] are the ids of the web captions. `count`
        is as in `encode_text`.
        """
        (web,) = self.text(web_ids, counts=[count])
        return self.visual.patches(image_tokens), web.states, web.visible

    @torch.no_grad()
    def caption(self, images: Tensor, web_ids: Tensor, *, bos_id: int, eos_id: int) -> Tensor:
        """Generate captions [B, T] of `images` [B, 3, S, S] with web captions `web_ids` [B, L], by the captioner.

        Raises ValueError if the model has no captioner.
        """
        if self.captioner is None:
            raise ValueError("this model was trained without a captioner")
        prefix = self.caption_prefix(self.visual(images)[1], web_ids)
        return self.captioner.generate(*prefix, bos_id, eos_id, self.pad_id)

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """Recompute activations of all blocks in the backward pass, to save memory, or stop doing so."""
        for tower in (self.visual, self.text, self.captioner):
            if tower is not None:
                tower.blocks.activation_checkpointing = enabled

    def compile_blocks(self, **options: Any) -> None:
        """Compile each block by itself with torch.compile and its `options`; the blocks of one tower share the code.

        Batch size and length are symbolic, so neither a longer text nor a smaller batch compiles again. What lies
        between the blocks takes little of the time and contains what would break a graph: collectives and recomputed
        logits.
        """
        for tower in (self.visual, self.text, self.captioner):
            for block in tower.blocks if tower is not None else ():
                block.compile(dynamic=True, **options)

    def freeze(self, part: Freeze) -> None:
        """Freeze a tower except its projection into the shared space; no gradient is computed inside the tower."""
        for name, tower in (("vision", self.visual), ("text", self.text)):
            if name == part:
                tower.requires_grad_(False)
                tower.proj.requires_grad_(True)

    def parameter_counts(self) -> dict[str, int]:
        """Count the parameters of each part, and the total last."""
        parts = {"vision": self.visual, "text": self.text, "captioner": self.captioner, "total": self}
        return {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items() if part is not None}
