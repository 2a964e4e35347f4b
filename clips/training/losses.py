"""The two losses, as functions of features and states; nothing here knows the model.

Shapes: B local batch · W ranks · E embedding width · D decoder width · V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORE = -100
LOGITS = 2**26
"""Largest number of similarities at a time, 268 MB in fp32. More are computed in chunks, and again in the backward
pass, so that a step never holds the full similarity matrix."""


def world_size() -> int:
    """Return the number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


class _AllGather(torch.autograd.Function):
    """Concatenate [B, E] of all ranks to [W·B, E]; the backward pass sums every rank's gradient of this slice.

    `torch.distributed.nn.functional.all_gather` does the same with a reduce-scatter that gloo lacks.
    """

    @staticmethod
    def forward(ctx: Any, x_BE: Tensor) -> Tensor:
        ctx.local = len(x_BE)
        parts = [torch.empty_like(x_BE) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x_BE.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad[dist.get_rank() * ctx.local :][: ctx.local]


def gather_features(x_BE: Tensor) -> Tensor:
    """Return the features of all ranks, [W·B, E], rank 0 first, with gradients to every rank. Collective."""
    return x_BE if world_size() == 1 else _AllGather.apply(x_BE)


def info_nce(
    image_BE: Tensor,
    text_BE: Tensor,
    all_image: Tensor,
    all_text: Tensor,
    logit_scale: Tensor,
    first: int | None = None,
) -> Tensor:
    """Return the symmetric InfoNCE of B samples against the whole global batch (CLIP; docs/method.md, "Loss").

    `all_image` and `all_text` [W·B, E] come from `gather_features`. The mean of the ranks' values is the loss of
    the global batch, and the mean of the ranks' gradients (what data parallelism takes) is its gradient.
    `first` is the index of the first of the B samples in the global batch; the default is that of this rank.
    """
    if first is None:
        first = (dist.get_rank() if world_size() > 1 else 0) * len(image_BE)
    targets = torch.arange(first, first + len(image_BE), device=image_BE.device)
    scaled = logit_scale * image_BE
    return 0.5 * (
        _similarity_loss(scaled, all_text, targets) + _similarity_loss(logit_scale * text_BE, all_image, targets)
    )


def logit_chunks(queries: int, candidates: int) -> int:
    """Return the number of chunks into which the similarity matrix is split."""
    return -(-queries * candidates // LOGITS)


def _similarity_loss(queries_BE: Tensor, candidates: Tensor, targets_B: Tensor) -> Tensor:
    """Return the mean cross entropy of image or text features against the other side's `candidates` [W·B, E]."""
    chunks = logit_chunks(len(queries_BE), len(candidates))
    if chunks <= 1:
        return F.cross_entropy(queries_BE @ candidates.T, targets_B)

    def of_chunk(queries: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(queries @ candidates.T, targets, reduction="sum")

    parts = zip(queries_BE.tensor_split(chunks), targets_B.tensor_split(chunks), strict=True)
    return torch.stack([checkpoint(of_chunk, *part, use_reentrant=False) for part in parts]).sum() / len(queries_BE)


def contrastive_loss(
    local: Sequence[Tensor], everywhere: Sequence[Tensor], logit_scale: Tensor, first: int | None = None
) -> Tensor:
    """Return the mean of `info_nce` over a sample's texts. `local` [B, E], `everywhere` [W·B, E]: image, then texts."""
    (image, *texts), (all_image, *all_texts) = local, everywhere
    pairs = zip(texts, all_texts, strict=True)
    return torch.stack([info_nce(image, text, all_image, all_, logit_scale, first) for text, all_ in pairs]).mean()


def caption_loss(
    states_BTD: Tensor,
    targets_BT: Tensor,
    head: Callable[[Tensor], Tensor],
    chunk: int,
    *,
    predicted: int | None = None,
    most: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the cross entropy of the caption over its valid positions as (sum, number of positions), fp32.

    `targets` holds IGNORE where there is no token; `predicted` is the number of the others, and if it is not given, the
    host waits for the GPU. Logits (fp32) exist for at most `chunk` positions at a time. If there are several chunks,
    they are recomputed in the backward pass, so memory does not grow with batch × length × vocabulary.
    All ranks must call `head` equally often, because under ZeRO-3 each call gathers its weights. So `most` is the
    largest number of positions that any rank can have; without it (one rank) it is the number of this rank.
    """
    is_valid = (targets_BT != IGNORE).flatten()
    valid = is_valid.nonzero() if predicted is None else torch.nonzero_static(is_valid, size=predicted)
    states, targets = states_BTD.flatten(0, 1)[valid[:, 0]], targets_BT.flatten()[valid[:, 0]]

    def chunk_loss(states_ND: Tensor, targets_N: Tensor) -> Tensor:
        return F.cross_entropy(head(states_ND).float(), targets_N, reduction="sum")

    chunks = max(1, -(-(len(targets) if most is None else most) // chunk))
    if chunks == 1:
        return chunk_loss(states, targets), torch.full((), len(targets), device=targets.device)
    total = states_BTD.new_zeros((), dtype=torch.float32)
    for part, part_targets in zip(states.tensor_split(chunks), targets.tensor_split(chunks), strict=True):
        total = total + checkpoint(chunk_loss, part, part_targets, use_reentrant=False)
    return total, torch.full((), len(targets), device=targets.device)  # filled there: nothing waits for the device


def mean_over_ranks(total: Tensor, count: Tensor) -> Tensor:
    """Turn a rank's (sum, count) into its share of the mean over the elements of all ranks. Collective.

    Ranks hold different numbers of elements, so the mean of their means would weigh elements unequally. The
    returned values average, over the ranks, to Σ total / Σ count, and so do their gradients.
    """
    everywhere = count.detach().to(torch.float32)
    if world_size() > 1:
        dist.all_reduce(everywhere)
    return total * world_size() / everywhere.clamp(min=1)
