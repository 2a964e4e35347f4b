"""The contrastive loss over the full batch of a step that is taken in micro-batches: GradCache.

Gao, Zhang, Han, Callan, *Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup*, 2021, arXiv
2101.06983. The contrastive loss depends on the towers only through their features, and these are small. So each
micro-batch first passes the towers without a graph. Then the loss over all features of the step is computed, and its
gradient with respect to them. Then each micro-batch passes again, with a graph, and Σ ⟨feature, gradient⟩ has the same
gradient as the loss of the whole batch. Both passes give the same features, because the model draws no random numbers:
the loader draws which tokens are dropped. Only one micro-batch's activations are held at a time. The price is
one more forward pass of the towers (the captioner, whose loss is a sum over samples, runs only in the second pass), and
that all batches of the step wait on the host, with their images as bytes.

Shapes: A micro-batches · B samples of each · W ranks · E embedding width.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from clips.engine.engine import Batch, Engine
from clips.model.clips import Outputs
from clips.training.losses import contrastive_loss, gather_features, world_size


class CachedGradients(NamedTuple):
    """What the loss of a micro-batch needs of the full batch. Means are over micro-batches and ranks."""

    gradients: list[Tensor]
    """Of the contrastive loss, with respect to image features, each text's features [B, E] and the logit scale [1]. The
    mean of Σ ⟨output, gradient⟩ has the same gradient as the loss of the whole batch."""
    value: Tensor
    """The contrastive loss; the mean is that of the whole batch."""
    tokens: Tensor
    """Mean number of caption tokens of a micro-batch."""


def cache_gradients(engine: Engine, batches: Sequence[Batch]) -> list[CachedGradients]:
    """Run a step's micro-batches without a graph; return what the second pass of each one needs. Collective."""
    with torch.no_grad():
        outputs = [engine(batch, features_only=True) for batch in batches]
    return gradients_of(outputs, sum(batch["counts"].predicted for batch in batches))


def gradients_of(outputs: Sequence[Outputs], tokens: int) -> list[CachedGradients]:
    """Return the cached gradients that the second pass of each micro-batch needs. Collective.

    `outputs` are those of this rank's micro-batches, without graph; `tokens` counts the tokens of all their captions.
    Gradients are scaled so that their mean over micro-batches and ranks, which the engine takes, is the gradient of
    the loss over the whole batch. One micro-batch at a time is compared with all features, so similarities take
    B × A·W·B numbers, not A times as many.
    """
    count, size, ranks = len(outputs), len(outputs[0].image_features), world_size()
    by_kind = zip(*([out.image_features, *out.text_features] for out in outputs), strict=True)
    full = [gather_features(torch.cat(features)).requires_grad_() for features in by_kind]  # [W·A·B, E], rank 0's first
    scale = outputs[0].logit_scale.clone().requires_grad_()
    mine = (dist.get_rank() if ranks > 1 else 0) * count * size
    slices = [slice(first, first + size) for first in range(mine, mine + count * size, size)]
    sums, scale_sum, values = [torch.zeros_like(features) for features in full], torch.zeros_like(scale), []
    for samples in slices:
        local = [features[samples] for features in full]
        value = contrastive_loss(local, full, scale, samples.start)
        for total, gradient in zip([*sums, scale_sum], torch.autograd.grad(value, [*full, scale]), strict=True):
            total += gradient
        # One NaN feature makes every loss NaN, so report only the samples whose own features are not finite.
        local_sum = torch.stack([*(x.sum() for x in local), scale.sum()]).sum()
        values.append(torch.where(value.isfinite(), value, 0 * local_sum).detach())
    tokens_of_all = torch.full((), float(tokens), device=scale.device)  # filled there: nothing waits for the device
    for x in [*sums, tokens_of_all] if ranks > 1 else []:
        dist.all_reduce(x)
    mean_tokens = tokens_of_all.clamp(min=1) / (count * ranks)
    return [
        CachedGradients([*(x[samples] for x in sums), scale_sum / count], value, mean_tokens)
        for samples, value in zip(slices, values, strict=True)
    ]
