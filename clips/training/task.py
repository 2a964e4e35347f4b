"""The objective: turns a batch into a loss. The model knows nothing of it.

"clips": L = α·½[ℓ(v, web) + ℓ(v, sub)] + β·L_cap with α = contrastive_weight, β = caption_weight.
"clip":  L = α·ℓ(v, text), text = the web caption or, for `synthetic_share` of the samples, the synthetic one.

The contrastive loss sees the micro-batch of all ranks. With `train.accumulation` = A each of the A
micro-batches is its own contrastive batch (A times fewer negatives than one batch of A times the size),
and their losses and gradients are averaged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from clips.config import RunConfig
from clips.model.clips import CLIPSModel
from clips.model.flops import BatchShape, training_flops
from clips.model.text import word_slots
from clips.training.losses import IGNORE, caption_loss, gather_features, info_nce, mean_over_ranks, world_size


class Task(nn.Module):
    """Model and objective as one module, so that DeepSpeed wraps a forward pass that ends in the loss."""

    def __init__(self, model: CLIPSModel, run: RunConfig) -> None:
        super().__init__()
        self.model = model
        self.config, self.freeze = run.task, run.train.freeze
        if run.train.precision == "auto":
            raise ValueError("train.precision is not decided yet: see clips.training.prepare.with_precision")
        self.bf16 = run.train.precision == "bf16"

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """A batch on the device (clips/data/loader.py) → (loss, detached parts: contrastive_loss, caption_loss, …)."""
        images = batch["images"]
        # bf16 is autocast over fp32 weights: with Muon, ZeRO and the temperature in fp32 the stages agree exactly.
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            return self._loss(batch, images)

    def shape(self, batch: dict[str, Any]) -> BatchShape:
        """What the FLOPs of `batch` depend on; it may be on the host."""
        caption = batch.get("caption") if self.model.captioner is not None else None
        return BatchShape(
            samples=len(batch["images"]),
            image_size=batch["images"].shape[-1],
            texts=[batch[name].shape[1] for name in ("web", "sub") if name in batch],
            caption=0 if caption is None else caption.shape[1],
            predicted=0 if caption is None else int(word_slots(caption, self.model.text.pad_id)[:, 1:].sum()),
            world_size=world_size(),
        )

    def flops(self, batch: dict[str, Any]) -> int:
        """Of the forward and backward pass over `batch`, which may be on the host (clips/model/flops.py)."""
        return sum(training_flops(self.model.config, self.shape(batch), self.freeze).values())

    def _loss(self, batch: dict[str, Any], images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        texts = [batch[name] for name in ("web", "sub") if name in batch]
        out = self.model(images, texts, batch.get("caption"))
        with torch.autocast(images.device.type, enabled=False):
            all_images = gather_features(out.image_features)
            pairs = [
                info_nce(out.image_features, text, all_images, gather_features(text), out.logit_scale)
                for text in out.text_features
            ]
            contrastive = torch.stack(pairs).mean()
        loss = self.config.contrastive_weight * contrastive
        parts = {"contrastive_loss": contrastive.detach(), "logit_scale": out.logit_scale.detach()}
        captioner = self.model.captioner
        if captioner is not None and out.caption_states is not None and self.config.caption_weight:
            caption = batch["caption"]
            targets = caption.masked_fill(~word_slots(caption, self.model.text.pad_id), IGNORE)[:, 1:]
            total, count = caption_loss(out.caption_states, targets, captioner.head, self.config.caption_chunk)
            caption_mean = mean_over_ranks(total, count)
            loss = loss + self.config.caption_weight * caption_mean
            parts["caption_loss"] = caption_mean.detach()
        return loss, parts | {"loss": loss.detach()}
