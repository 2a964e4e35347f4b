"""The objective: it turns a batch into a loss. The model does not know it.

"clips": L = α·½[ℓ(v, web) + ℓ(v, sub)] + β·L_cap with α = 1, β = caption_weight.
"clip":  L = α·ℓ(v, text), text = the web caption or, for `synthetic_share` of the samples, the synthetic one.

The contrastive loss ℓ sees the micro-batch of all ranks. With `train.accumulation` = A and `train.contrastive` =
"micro" each of the A micro-batches is its own contrastive batch (A times fewer negatives than one batch of A times the
size), and their losses and gradients are averaged; with "global" ℓ runs over the whole batch: grad_cache.py.
"""

from typing import Any

import torch
from torch import Tensor

from clips.common.runtime import autocast
from clips.config import TaskConfig, TrainConfig
from clips.data.images import normalise
from clips.data.loader import texts_of
from clips.engine.engine import Batch, Objective
from clips.model.clips import CLIPSModel, Kept, Outputs
from clips.model.text import word_slots
from clips.training.grad_cache import CachedGradients
from clips.training.losses import IGNORE, caption_loss, contrastive_loss, gather_features, mean_over_ranks, world_size


class Task(Objective):
    """Model and objective as one module, so that DeepSpeed wraps a forward pass that ends in the loss.

    Raises ValueError if `train.precision` is still "auto", see `clips.training.prepare.with_precision`.
    """

    def __init__(self, model: CLIPSModel, config: TaskConfig, train: TrainConfig) -> None:
        super().__init__()
        self.model = model
        self.config, self.freeze = config, train.freeze
        self.contrasted = train.accumulation if train.contrastive == "global" else 1
        """Micro-batches that the contrastive loss runs over."""
        if train.precision == "auto":
            raise ValueError("train.precision is not decided yet: see clips.training.prepare.with_precision")
        self.bf16 = train.precision == "bf16"

    def forward(
        self, batch: dict[str, Any], cached: CachedGradients | None = None, *, features_only: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]] | Outputs:
        """Compute the loss of a batch from clips/data/loader.py: (loss, detached loss terms to log).

        Args:
            cached: Second pass of GradCache: the loss is a surrogate. Its gradient is this micro-batch's part of the
                gradient over the whole batch, and its value means nothing; the terms hold the true values.
            features_only: First pass: return the model's outputs instead, without the captioner.
        """
        if cached is not None and cached.random is not None:
            cached.random.replay()
        # bf16 is autocast over fp32 weights: with Muon, ZeRO and the logit scale in fp32 the stages agree exactly.
        with autocast(batch["images"].device, enabled=self.bf16):
            if features_only:
                return self.model(batch["images"], texts_of(batch), None, self.kept(batch), batch.get("counts"))
            return self._loss(batch, cached)

    def to_device(self, batch: Batch, device: torch.device) -> Batch:
        """Return the micro-batch on `device`, its images normalised there to float32 [B, 3, H, W]."""
        moved = super().to_device(batch, device)
        return moved | {"images": normalise(moved["images"])}

    def caption_targets(self, batch: dict[str, Any]) -> Tensor | None:
        """Return the tokens that positions predict, [B, T − 1], IGNORE after the last; None if nothing is captioned."""
        if self.model.captioner is None or not self.config.caption_weight or "caption" not in batch:
            return None
        caption = batch["caption"]
        return caption.masked_fill(~word_slots(caption, self.model.pad_id), IGNORE)[:, 1:]

    def kept(self, batch: dict[str, Any]) -> Kept:
        """Return the tokens that the loader drew for each sample.

        Raises KeyError if the configuration drops some and the loader drew none, because an accidental training on all
        of them would go unnoticed.
        """
        vision, captioner = self.model.config.vision, self.model.config.captioner
        drops = captioner is not None and captioner.image_token_keep < 1 and "caption" in batch
        return Kept(
            patches=batch["patches"] if vision.patch_dropout else None,
            image_tokens=batch["image_tokens"] if drops else None,
        )

    def _loss(self, batch: dict[str, Any], cached: CachedGradients | None) -> tuple[Tensor, dict[str, Tensor]]:
        targets = self.caption_targets(batch)
        caption, counts = batch["caption"] if targets is not None else None, batch.get("counts")
        out = self.model(batch["images"], texts_of(batch), caption, self.kept(batch), counts)
        loss, full_value = self._contrastive(batch, out, cached)
        terms = {"contrastive_loss": full_value, "logit_scale": out.logit_scale.detach()}
        captioner = self.model.captioner
        if captioner is not None and targets is not None:
            most = len(targets) * (captioner.config.length - 1) if world_size() > 1 else None
            total, count = caption_loss(
                out.caption_states, targets, captioner.head, self.config.caption_chunk,
                predicted=counts.predicted if counts is not None else None, most=most,
            )  # fmt: skip
            caption_mean = mean_over_ranks(total, count) if cached is None else total / cached.tokens
            loss = loss + self.config.caption_weight * caption_mean
            terms["caption_loss"] = caption_mean.detach()
            full_value = full_value + self.config.caption_weight * terms["caption_loss"]
        return loss, terms | {"loss": full_value}

    @staticmethod
    def _contrastive(batch: dict[str, Any], out: Outputs, cached: CachedGradients | None) -> tuple[Tensor, Tensor]:
        """Return the loss with the gradient, and its value."""
        features = [out.image_features, *out.text_features]
        with autocast(batch["images"].device, enabled=False):
            if cached is None:
                contrastive = contrastive_loss(features, [gather_features(x) for x in features], out.logit_scale)
                return contrastive, contrastive.detach()
            outputs = zip([*features, out.logit_scale], cached.gradients, strict=True)
            return torch.stack([(x * gradient).sum() for x, gradient in outputs]).sum(), cached.value
