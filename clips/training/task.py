"""The objective: turns a batch into a loss. The model knows nothing of it.

"clips": L = α·½[ℓ(v, web) + ℓ(v, sub)] + β·L_cap with α = 1, β = caption_weight.
"clip":  L = α·ℓ(v, text), text = the web caption or, for `synthetic_share` of the samples, the synthetic one.
"caption": L = β·L_cap, the decoder reading the image alone (OpenVision 2, arXiv 2509.01644).
"caption+web": the same, the decoder reading the web caption too.

The contrastive loss ℓ sees the micro-batch of all ranks. With `train.accumulation` = A and `train.contrastive` =
"micro" each of the A micro-batches is its own contrastive batch (A times fewer negatives than one batch of A times the
size), and their losses and gradients are averaged; with "global" ℓ runs over the whole batch: grad_cache.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from clips.common.runtime import autocast
from clips.config import RunConfig
from clips.model.clips import CLIPSModel, Counts, Kept, Outputs
from clips.model.flops import BatchShape, training_flops
from clips.model.text import word_slots
from clips.model.vision import size_of
from clips.training.losses import IGNORE, caption_loss, contrastive_loss, gather_features, mean_over_ranks, world_size


class Part(NamedTuple):
    """What a micro-batch's loss is told of the whole batch. Means are over micro-batches and ranks."""

    gradients: list[Tensor]
    """Of the contrastive loss, with respect to the image features and each text's [B, E], and the temperature [1]:
    Σ ⟨output, its gradient⟩ averages to a loss that has the gradient of the whole batch's."""
    value: Tensor
    """Of the contrastive loss: averages to that of the whole batch."""
    tokens: Tensor
    """Caption tokens of a micro-batch, on average."""


class Task(nn.Module):
    """Model and objective as one module, so that DeepSpeed wraps a forward pass that ends in the loss."""

    def __init__(self, model: CLIPSModel, run: RunConfig) -> None:
        super().__init__()
        self.model = model
        self.config, self.freeze = run.task, run.train.freeze
        self.contrasted = run.train.accumulation if run.train.contrastive == "global" else 1
        """Micro-batches that the contrastive loss runs over."""
        if run.train.precision == "auto":
            raise ValueError("train.precision is not decided yet: see clips.training.prepare.with_precision")
        self.bf16 = run.train.precision == "bf16"

    def forward(
        self, batch: dict[str, Any], part: Part | None = None, *, features_only: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]] | Outputs:
        """A batch on the device (clips/data/loader.py) → (loss, detached parts: contrastive_loss, caption_loss, …).

        `part`: of a whole batch; the loss then has that share's gradient, and its value is in the parts alone.
        `features_only`: the model's outputs instead, without the captioner.
        """
        # bf16 is autocast over fp32 weights: with Muon, ZeRO and the temperature in fp32 the stages agree exactly.
        with autocast(batch["images"].device, enabled=self.bf16):
            if features_only:
                return self.model(batch["images"], _texts(batch), None, self._kept(batch), batch.get("counts"))
            return self._loss(batch, part)

    def caption_targets(self, batch: dict[str, Any]) -> Tensor | None:
        """[B, T − 1], the token that each position predicts, IGNORE after the last; None where nothing is captioned."""
        if self.model.captioner is None or not self.config.caption_weight or "caption" not in batch:
            return None
        caption = batch["caption"]
        return caption.masked_fill(~word_slots(caption, self.model.pad_id), IGNORE)[:, 1:]

    def counted(self, batch: dict[str, Any]) -> dict[str, Any]:
        """`batch`, which is on the host, with the counts that the model would have to wait for on a device."""
        if "counts" in batch:
            return batch
        return batch | {
            "counts": self.model.counts(batch["images"], _texts(batch), batch.get("caption"), self._kept(batch))
        }

    def shape(self, batch: dict[str, Any]) -> BatchShape:
        """What the FLOPs of `batch` depend on; on the host, unless it is `counted`."""
        caption = batch.get("caption") if self.model.captioner is not None else None
        counts: Counts = self.counted(batch)["counts"]
        return BatchShape(
            samples=len(batch["images"]),
            image_size=size_of(batch["images"]),
            texts=[ids.shape[1] for ids in _texts(batch)],
            words=counts.texts,
            caption=0 if caption is None else caption.shape[1],
            captioned=None if caption is None else counts.captioned,
            captioner_tokens=None if caption is None else counts.captioner,
            predicted=0 if caption is None else counts.predicted,
            world_size=world_size() * self.contrasted,
        )

    def flops(self, batch: dict[str, Any]) -> int:
        """Of the forward and backward pass over `batch` (clips/model/flops.py); as for `shape`."""
        return sum(training_flops(self.model.config, self.shape(batch), self.freeze).values())

    def _kept(self, batch: dict[str, Any]) -> Kept:
        """The tokens that the loader drew for each sample. KeyError where the configuration drops some and it did not:
        an accidental training on all of them would go unseen."""
        vision, captioner = self.model.config.vision, self.model.config.captioner
        drops = captioner is not None and captioner.image_token_keep < 1 and "caption" in batch
        return Kept(
            patches=batch["patches"] if vision.patch_dropout else None,
            image_tokens=batch["image_tokens"] if drops else None,
        )

    def _loss(self, batch: dict[str, Any], part: Part | None) -> tuple[Tensor, dict[str, Tensor]]:
        targets = self.caption_targets(batch)
        caption, counts = batch["caption"] if targets is not None else None, batch.get("counts")
        out = self.model(batch["images"], _texts(batch), caption, self._kept(batch), counts)
        loss = whole_value = out.logit_scale.new_zeros(())
        parts: dict[str, Tensor] = {}
        if self.config.contrasts:
            loss, whole_value = self._contrastive(batch, out, part)
            parts = {"contrastive_loss": whole_value, "logit_scale": out.logit_scale.detach()}
        captioner = self.model.captioner
        if captioner is not None and targets is not None:
            most = len(targets) * (captioner.config.length - 1) if world_size() > 1 else None
            total, count = caption_loss(
                out.caption_states, targets, captioner.head, self.config.caption_chunk,
                predicted=counts.predicted if counts is not None else None, most=most,
            )  # fmt: skip
            caption_mean = mean_over_ranks(total, count) if part is None else total / part.tokens
            loss = loss + self.config.caption_weight * caption_mean
            parts["caption_loss"] = caption_mean.detach()
            whole_value = whole_value + self.config.caption_weight * parts["caption_loss"]
        return loss, parts | {"loss": whole_value}

    @staticmethod
    def _contrastive(batch: dict[str, Any], out: Outputs, part: Part | None) -> tuple[Tensor, Tensor]:
        """(what has the gradient, the value)."""
        features = [out.image_features, *out.text_features]
        with autocast(batch["images"].device, enabled=False):
            if part is None:
                contrastive = contrastive_loss(features, [gather_features(x) for x in features], out.logit_scale)
                return contrastive, contrastive.detach()
            outputs = zip([*features, out.logit_scale], part.gradients, strict=True)
            return torch.stack([(x * gradient).sum() for x, gradient in outputs]).sum(), part.value


def _texts(batch: dict[str, Any]) -> list[Tensor]:
    return [batch[name] for name in ("web", "sub") if name in batch]
