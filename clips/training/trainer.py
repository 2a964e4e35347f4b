"""The trainer of pretraining: its objective, what a step costs, its rates, spikes, validations.

The objective turns a batch into a loss; the model does not know it.

"clips": L = α·½[ℓ(v, web) + ℓ(v, sub)] + β·L_cap with α = 1, β = caption_weight.
"clip":  L = α·ℓ(v, text), text = the web caption or, for `synthetic_share` of the samples, the synthetic one.

The contrastive loss ℓ sees the micro-batch of all ranks. With `train.accumulation` = A and `train.contrastive` =
"micro" each of the A micro-batches is its own contrastive batch (A times fewer negatives than one batch of A times the
size), and their losses and gradients are averaged; with "global" ℓ runs over the whole batch: grad_cache.py.
"""

import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from clips.common.errors import BrokenDataError
from clips.common.flops import forward_flops, training_flops
from clips.common.rundir import read_metrics
from clips.common.runtime import autocast
from clips.config import ModelConfig, PhaseConfig, RunConfig, TaskConfig, TrainConfig
from clips.data.dataset import Dataset
from clips.data.images import normalise
from clips.data.loader import make_loader, texts_of
from clips.data.sample import mend_broken
from clips.data.splits import split_spec
from clips.data.tokenizer import CaptionTokenizer
from clips.engine import watchdog
from clips.engine.checkpoint import TrainState
from clips.engine.engine import Batch, Engine, Objective, Reduced
from clips.engine.log import RunLog
from clips.engine.loop import Trainer, keys_of_all_ranks
from clips.evaluation.evaluate import evaluate
from clips.evaluation.metrics import choosing_metric
from clips.model.clips import MAX_LOGIT_SCALE, CLIPSModel, Kept, Outputs
from clips.model.layers import Blocks
from clips.model.text import word_slots
from clips.training.grad_cache import CachedGradients, cache_gradients
from clips.training.losses import IGNORE, caption_loss, contrastive_loss, gather_features, mean_over_ranks, world_size


class Task(Objective):
    """Model and objective as one module, so that DeepSpeed wraps a forward pass that ends in the loss.

    Raises ValueError if `train.precision` is still "auto", see `clips.training.prepare.precision_of`.
    """

    def __init__(self, model: CLIPSModel, config: TaskConfig, train: TrainConfig) -> None:
        super().__init__()
        self.model = model
        self.config, self.freeze = config, train.freeze
        self.contrasted = train.accumulation if train.contrastive == "global" else 1
        """Micro-batches that the contrastive loss runs over."""
        if train.precision == "auto":
            raise ValueError("train.precision is not decided yet: see clips.training.prepare.precision_of")
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
        # bf16 is autocast over fp32 weights: with Muon, ZeRO and the logit scale in fp32 the stages agree exactly.
        with autocast(batch["images"].device, enabled=self.bf16):
            if features_only:
                return self.model(batch["images"], texts_of(batch), None, self.kept(batch), batch.get("counts"))
            return self._loss(batch, cached)

    def to_device(self, batch: Batch, device: torch.device) -> Batch:
        """Return the micro-batch on `device`, its images normalised there to float32 [B, 3, H, W]."""
        moved = {name: x.to(device, non_blocking=True) if torch.is_tensor(x) else x for name, x in batch.items()}
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


def flops_of(task: Task, batch: Batch, *, repeated: bool = False) -> int:
    """Return the FLOPs of the forward and backward pass of `task` over a `batch` of clips/data/loader.py.

    Args:
        repeated: Include what a step computes twice to save memory, which does not count for the MFU.
    """
    vision, text, captioner = task.model.visual, task.model.text, task.model.captioner
    counts, kept, texts = batch["counts"], task.kept(batch), texts_of(batch)
    B, pixels = len(batch["images"]), vision.config.tokens(batch["images"].shape[-1])
    patches = pixels if kept.patches is None else kept.patches.shape[1]
    slots = patches + vision.config.prefix_tokens
    sees, reads = task.freeze != "vision", task.freeze != "text"

    total = B * pixels * training_flops(vision.patch_embed, False)
    total += B * training_flops(vision.proj, sees) + len(texts) * B * training_flops(text.proj, reads)
    # Each text: this rank's images against all texts, and its texts against all images.
    total += len(texts) * 3 * 4 * B * B * world_size() * task.contrasted * task.model.config.embed_dim
    for tower, trains, tokens, pairs in (
        (vision, sees, B * slots, B * slots**2),
        (text, reads, sum(counts.texts), sum(B * ids.shape[1] ** 2 for ids in texts)),
    ):
        forward = tokens * forward_flops(tower.blocks) + len(tower.blocks) * pairs * 4 * tower.config.width
        total += 3 * forward if trains else forward
        if repeated:
            total += _checkpointed(tower.blocks, forward, tokens) if trains else 0
            total += forward if task.contrasted > 1 else 0
    if captioner is None or "caption" not in batch:
        return total

    images = patches if kept.image_tokens is None else kept.image_tokens.shape[1]
    web, positions = texts[0].shape[1] - (text.config.pool == "cls"), batch["caption"].shape[1] - 1
    slots, last = images + web + positions, captioner.blocks[-1].get_submodule
    total += counts.captioned * images * training_flops(captioner.image_proj, sees)
    total += counts.captioned * web * training_flops(captioner.text_proj, reads)
    pairs = counts.captioned * slots * ((len(captioner.blocks) - 1) * slots + positions)
    # The last block computes queries, projection and MLP only for the positions that predict.
    skipped = counts.captioner - counts.predicted
    forward = counts.captioner * forward_flops(captioner.blocks) + pairs * 4 * captioner.config.width
    forward -= skipped * (forward_flops(last("attn.proj")) + forward_flops(last("mlp")))
    head = counts.predicted * forward_flops(captioner.head)
    total += 3 * (forward + head)
    if repeated:
        total += _checkpointed(captioner.blocks, forward, counts.captioner, skipped)
        total += head if B * positions > task.config.caption_chunk else 0
    return total


def _checkpointed(blocks: Blocks, forward: int, tokens: int, skipped: int = 0) -> int:
    """Return the FLOPs of activation checkpointing: all of a block but its last product, because no gradient needs it.

    Args:
        skipped: Number of the tokens that the last block skips.
    """
    products = [forward_flops(block.get_submodule("mlp.fc2")) for block in blocks]
    return forward - tokens * sum(products) + skipped * products[-1] if blocks.activation_checkpointing else 0


def shared_inputs(engine: Engine, batches: Sequence[Batch]) -> Sequence[CachedGradients | None]:
    """Return the cached gradients for each micro-batch, or None if each is its own contrastive batch. Collective."""
    return cache_gradients(engine, batches) if engine.module.contrasted > 1 else [None] * len(batches)


def lr_factor(phase: PhaseConfig, step: int) -> float:
    """Return the share of the peak learning rate at optimizer step `step` of the phase (0-based)."""
    warmup = phase.warmup_samples / phase.batch_size
    if step + 1 <= warmup:
        return (step + 1) / warmup
    if phase.schedule == "cosine":
        progress = (step - warmup) / max(1.0, phase.steps - warmup)
        return 0.5 * (1 + math.cos(math.pi * progress))
    if phase.schedule == "constant":
        return 1.0
    falling = phase.steps - warmup if phase.schedule == "linear" else phase.steps / 3
    return min(1.0, (phase.steps - step) / falling)


def crosses(every: int, before: int, now: int) -> bool:
    """Return True if a multiple of `every` samples is above `before` and not above `now`; False if `every` is 0."""
    return every > 0 and now // every > before // every


def rates_of(lr: float, muon_lr: float) -> dict[str, float]:
    """Return the learning rate of each of `parameter_groups`."""
    return {"decay": lr, "no_decay": lr, "muon": muon_lr}


@torch.no_grad()
def limit_logit_scale(engine: Engine) -> None:
    """Clamp the logit scale to its limit after a step.

    The forward pass clamps it too and so stops the gradient: a value above the limit could never come back.
    """
    for held in engine.zero_state.copies("logit_scale"):
        held.clamp_(max=math.log(MAX_LOGIT_SCALE))


def plain_model(engine: Engine, config: ModelConfig, *, everywhere: bool = False) -> CLIPSModel | None:
    """Return a copy of the model outside DeepSpeed, on rank 0 or `everywhere`, for evaluation and export; else None.

    Collective.
    """
    weights = engine.zero_state.gather_weights(everywhere=everywhere)
    if not weights:
        return None
    model = CLIPSModel(config, engine.module.model.pad_id)
    model.load_state_dict(weights)
    return model.to(engine.device).eval()


class CLIPSTrainer(Trainer):
    """The trainer of a pretraining run: its phases, what happens on a spike, and its validations."""

    def __init__(
        self, run: RunConfig, engine: Engine, dataset: Dataset, tokenizer: CaptionTokenizer, state: TrainState,
        run_dir: Path,
    ) -> None:  # fmt: skip
        self.run, self.engine, self.dataset, self.tokenizer, self.state = run, engine, dataset, tokenizer, state
        self.run_dir = run_dir
        self.samples, self.log_every, self.logged_group = run.samples, run.train.log_every, "decay"
        self.objective: Task = engine.module
        self.local_module = self.objective.model

    @property
    def phase(self) -> PhaseConfig:
        """The phase of the last step, or of the next one once that has started."""
        return self.run.phases[self.state.phase]

    def batches(self) -> Iterator[Batch]:
        """Return the loader of this rank's micro-batches, from the current phase and step on."""
        return make_loader(
            self.dataset, self.tokenizer, self.run, rank=dist.get_rank(), world_size=self.engine.world_size,
            phase=self.state.phase, step=self.state.phase_step,
        )  # fmt: skip

    def begin_step(self) -> tuple[int, dict[str, float]]:
        """Move on to the next phase after the last step of one, and set the tower's image size."""
        state = self.state
        if state.phase_step >= self.phase.steps:
            state.phase += 1
            state.phase_step = 0
        visual = self.objective.model.visual
        if visual.image_size != self.phase.image_size:
            visual.set_image_size(self.phase.image_size)
        if state.phase_step == 0:
            state.recent_losses = []
            state.recent_norms = []
            if self.phase.fresh_optimizer:
                self.engine.zero_state.reset_optimizer()
        factor = lr_factor(self.phase, state.phase_step)
        return self.phase.batch_size, rates_of(self.phase.lr * factor, self.phase.muon_lr * factor)

    def shared_inputs(self, batches: Sequence[Batch]) -> Sequence[CachedGradients | None]:
        """Return the gradients of the contrastive loss, if that runs over the whole batch."""
        return shared_inputs(self.engine, batches)

    def cost(self, batch: Batch) -> tuple[int, int]:
        """Return the FLOPs of a micro-batch; its tokens are not counted."""
        return flops_of(self.objective, batch), 0

    def check_spike(self, reduced: Reduced, keys: list[list[str]], log: RunLog) -> bool:
        """Record a spike, and skip its update if the run says so.

        Raises DivergedError if skipping steps does not help.
        """
        state = self.state
        spike = watchdog.find_spike(state, reduced)
        if spike is not None:
            action = self.run.train.on_spike
            log.spike({"step": state.step + 1, "action": action, **spike}, keys_of_all_ranks(keys))
            if action == "skip":
                watchdog.record_skip(state, since=state.step + 1 - 2 * watchdog.PATIENCE)
                return True
        watchdog.remember(state, reduced)
        return False

    def end_step(self) -> None:
        """Clamp the logit scale, and count the step of the phase."""
        limit_logit_scale(self.engine)
        self.state.phase_step += 1

    def check_skipped(self, samples: Sequence[tuple[str, str]]) -> None:
        """Raise BrokenDataError if more samples were broken than data.max_broken_share."""
        state, most = self.state, self.run.data.max_broken_share
        if state.skipped <= max(10, most * state.samples):
            return
        reasons = "\n  ".join(f"{key}: {reason}" for key, reason in list(dict.fromkeys(samples))[-5:])
        raise BrokenDataError(
            f"{state.skipped} broken samples were met for {state.samples} that were trained on, above "
            f"data.max_broken_share = {most:.1%}; all are listed in skipped.jsonl, the last ones are\n"
            f"  {reasons}\n{mend_broken(state.skipped / state.samples)} --allow-config-change. "
            "A run on data without them needs another --name"
        )

    def saves(self) -> bool:
        """Return True if the step crossed a multiple of train.checkpoint_every samples."""
        return self._crosses(self.run.train.checkpoint_every)

    def validates(self) -> bool:
        """Return True after train.eval_every samples and at the end, if there is validation data."""
        crossed = self._crosses(self.run.train.eval_every)
        return (crossed or self.state.samples >= self.samples) and bool(split_spec(self.run.data, "val"))

    def _crosses(self, every: int) -> bool:
        return crosses(every, self.state.samples - self.phase.batch_size, self.state.samples)

    def owes_validation(self) -> bool:
        """Return True if the run has ended between a checkpoint and the validation of that step. Collective."""
        step = self.state.step
        if step == 0 or not self.validates():
            return False
        owes = dist.get_rank() == 0 and all(line.get("step") != step for line in read_metrics(self.run_dir, "eval"))
        of_rank_0 = [owes]
        dist.broadcast_object_list(of_rank_0)
        return of_rank_0[0]

    def validate_if_due(self, log: RunLog) -> None:
        """Validate if `validates` says so."""
        if self.validates():
            self.validate(log)

    def validate(self, log: RunLog) -> None:
        """Measure retrieval and zero-shot classification on (a part of) the validation split. Collective.

        Every rank encodes its share of images and texts; rank 0 has the metrics.
        """
        begin = time.perf_counter()
        model = plain_model(self.engine, self.run.model, everywhere=True)
        assert model is not None
        measured = evaluate(
            model, self.tokenizer, self.run, split="val", full=False, image_size=self.phase.image_size, sharded=True
        )
        metrics = {name: metric.value for name, metric in measured.items()}
        choosing = choosing_metric(metrics) if self.run.train.choose == "best" else None
        if choosing is not None:
            metrics["choosing"] = round(choosing, 3)
        log.record("eval", {
            "step": self.state.step, "samples": self.state.samples, "split": "val",
            "validation_seconds": round(time.perf_counter() - begin, 3), **metrics,
        })  # fmt: skip
