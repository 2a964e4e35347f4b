"""The contrastive loss over the whole batch of a step that is taken in micro-batches: GradCache.

Gao, Zhang, Han, Callan, *Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup*, 2021, arXiv
2101.06983. The contrastive loss sees the towers through their features alone, and features are
small. So each micro-batch passes the towers without a graph; the loss of all features of the step is taken, and its
gradient with respect to them; then each micro-batch passes again, with a graph, and Σ ⟨feature, its gradient⟩ has the
gradient of the whole batch's loss. Activations are held for one micro-batch at a time, the price is one more forward
pass of the towers (the captioner, whose loss is a sum over samples, runs in the second pass only), and the whole
step's batches wait on the host, their pictures as bytes.

Shapes: A micro-batches · B samples of each · W ranks · E embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import get_device_states, set_device_states

from clips.engine.engine import Batch, Engine
from clips.model.clips import Outputs
from clips.training.losses import contrastive_loss, gather_features, world_size


class RandomState:
    """The random numbers that a forward pass on `device` would draw from now on, to be drawn again."""

    def __init__(self, device: torch.device) -> None:
        self.cpu = torch.get_rng_state()
        self.devices, self.states = get_device_states(torch.empty(0, device=device))

    def replay(self) -> None:
        torch.set_rng_state(self.cpu)
        set_device_states(self.devices, self.states)


class Part(NamedTuple):
    """What a micro-batch's loss is told of the whole batch. Means are over micro-batches and ranks."""

    gradients: list[Tensor]
    """Of the contrastive loss, with respect to the image features and each text's [B, E], and the temperature [1]:
    Σ ⟨output, its gradient⟩ averages to a loss that has the gradient of the whole batch's."""
    value: Tensor
    """Of the contrastive loss: averages to that of the whole batch."""
    tokens: Tensor
    """Caption tokens of a micro-batch, on average."""
    random: RandomState | None = None
    """The state in which the first pass drew its random numbers."""


def told(engine: Engine, batches: Sequence[Batch]) -> list[Part]:
    """Pass a step's micro-batches without a graph; return what each one's second pass is told. Collective."""
    states, outputs = [], []
    for batch in batches:
        states.append(RandomState(engine.device))
        with torch.no_grad():
            outputs.append(engine(batch, features_only=True))
    tokens = sum(batch["counts"].predicted for batch in batches)
    parts = parts_of_whole(outputs, tokens)
    return [part._replace(random=state) for part, state in zip(parts, states, strict=True)]


def parts_of_whole(outputs: Sequence[Outputs], tokens: int) -> list[Part]:
    """What each micro-batch's second pass is told of the whole batch. Collective.

    `outputs`: of this rank's micro-batches, without graph. `tokens`: of all their captions.

    Gradients are scaled so that their mean over micro-batches and ranks, which the engine takes, is the gradient of
    the whole batch's loss. Rows of one micro-batch are compared with all columns at a time: similarities take
    B × A·W·B numbers, not their A-fold.
    """
    count, own, ranks = len(outputs), len(outputs[0].image_features), world_size()
    columns = zip(*([out.image_features, *out.text_features] for out in outputs), strict=True)
    whole = [gather_features(torch.cat(column)).requires_grad_() for column in columns]  # [W·A·B, E], rank 0's first
    scale = outputs[0].logit_scale.clone().requires_grad_()
    mine = (dist.get_rank() if ranks > 1 else 0) * count * own
    places = [slice(first, first + own) for first in range(mine, mine + count * own, own)]
    sums, scale_sum, values = [torch.zeros_like(features) for features in whole], torch.zeros_like(scale), []
    for place in places:
        rows = [features[place] for features in whole]
        value = contrastive_loss(rows, whole, scale, place.start)
        for total, gradient in zip([*sums, scale_sum], torch.autograd.grad(value, [*whole, scale]), strict=True):
            total += gradient
        # One that is not finite makes all so: the samples to be named are those whose own features are not.
        its_own = torch.stack([*(x.sum() for x in rows), scale.sum()]).sum()
        values.append(torch.where(value.isfinite(), value, 0 * its_own).detach())
    tokens_of_all = torch.full((), float(tokens), device=scale.device)  # filled there: nothing waits for the device
    for x in [*sums, tokens_of_all] if ranks > 1 else []:
        dist.all_reduce(x)
    return [
        Part([*(x[place] for x in sums), scale_sum / count], value, tokens_of_all.clamp(min=1) / (count * ranks))
        for place, value in zip(places, values, strict=True)
    ]
