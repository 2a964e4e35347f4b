"""A closed-form start of the projector: image tokens regressed on the words of their captions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from mllm.model.projector import projector_kind, trainable_layers

LARGEST_FACTOR, RANDOM_SHARE = 10.0, 0.1
"""Of `start_from_captions`."""


@torch.no_grad()
def least_squares_init(
    projector: LlavaMultiModalProjector,
    features: Tensor,
    targets: Tensor,
    *,
    ridge: float = 1e-2,
    seed: int = 0,
) -> float:
    """Start the projector at the ridge regression from `features` [n, W] to `targets` [n, D]; returns R².

    For example: patch features, and for each the mean word embedding of its image's caption.
    `ridge` is relative to the mean variance of the regressors. `linear` gets the solution itself. For `mlp2x_gelu`,
    linear_1 becomes D/2 directions of the whitened features (the principal axes first, then random ones) each with
    both signs, and linear_2 the regression on its activations. gelu(z) − gelu(−z) = z, so wherever W ≤ D/2 every
    linear map is within reach and the fit is at least as good as the linear one.
    """
    x, y = features.double(), targets.double()
    if x.shape[1:] != (projector.linear_1.in_features,) or y.shape != (len(x), projector.linear_1.out_features):
        raise ValueError(
            f"features {tuple(x.shape)} and targets {tuple(y.shape)} do not fit a projector of "
            f"{projector.linear_1.in_features} → {projector.linear_1.out_features}"
        )
    if projector_kind(projector) == "mlp2x_gelu":
        weight, bias = _two_signed_directions(x, projector.linear_1.out_features, seed)
        _assign(projector.linear_1, weight, bias)
        x, layer = projector.act(x @ weight.T + bias), projector.linear_2
    else:
        layer = projector.linear_1
    x_mean, y_mean = x.mean(dim=0), y.mean(dim=0)
    centred = x - x_mean
    gram = centred.T @ centred / len(x)
    gram += (ridge * gram.diagonal().mean() + 1e-8) * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    weight = torch.linalg.solve(gram, centred.T @ (y - y_mean) / len(x)).T
    bias = y_mean - weight @ x_mean
    _assign(layer, weight, bias)
    residual = y - (x @ weight.T + bias)
    return 1 - (residual.square().sum() / (y - y_mean).square().sum()).item()


def caption_targets(captions: Sequence[Sequence[int]], embeddings: Tensor) -> Tensor:
    """[n, D]: for each caption (token ids) the mean of its word embeddings, weighted by inverse document frequency.

    With equal weights the words of every sentence ("a", "at the") make up most of the mean; a word of every caption
    weighs nothing here. embeddings [V, D]. Raises ValueError for a caption without a token.
    """
    if not all(captions):
        raise ValueError("a caption without a token has no mean embedding")
    seen = Counter(token for caption in captions for token in set(caption))
    weight = {token: math.log(len(captions) / count) + 1e-6 for token, count in seen.items()}
    targets = torch.empty(len(captions), embeddings.shape[1])
    for row, caption in zip(targets, captions, strict=True):
        weights = torch.tensor([weight[token] for token in caption], device=embeddings.device)
        row.copy_((weights / weights.sum()) @ embeddings[list(caption)].float())
    return targets


@torch.no_grad()
def start_from_captions(
    projector: LlavaMultiModalProjector,
    features: Tensor,
    captions: Sequence[Sequence[int]],
    embeddings: Tensor,
    *,
    seed: int = 0,
) -> float:
    """Start the projector where image tokens look like the words of their captions; returns the regression's R².

    features [n, N, W] of n images with their captions (token ids), embeddings [V, D]. Every token of an image is
    regressed on the same target; what stands in a patch and what does not averages out over images, so a patch comes
    to lie near the words for what it shows. The fitted tokens are then given the mean and the variance of all word
    embeddings (a regression shrinks them to a tenth of what the language model is used to), `RANDOM_SHARE` of the
    variance as a random map: captions tell nothing about much of the features, and the regression drops that.
    """
    rows = features.flatten(0, 1)
    targets = caption_targets(captions, embeddings).repeat_interleave(features.shape[1], dim=0)
    r2 = least_squares_init(projector, rows, targets.to(rows.device), ridge=1e-3, seed=seed)
    _match_embeddings(projector, rows, embeddings, seed)
    return r2


def _match_embeddings(projector: LlavaMultiModalProjector, rows: Tensor, embeddings: Tensor, seed: int) -> None:
    """Scale and shift the last trained layer's outputs over `rows` [n, W], and add the random map to it."""
    *before, last = trainable_layers(projector).values()
    inputs = projector.act(before[0](rows.to(last.weight.dtype))).float() if before else rows.float()
    words_distance = _distance_from_mean(embeddings.float())
    random = torch.randn(last.weight.shape, generator=torch.Generator().manual_seed(seed)).to(inputs.device)
    weight = torch.zeros_like(random)
    for part, share in ((last.weight.float(), 1 - RANDOM_SHARE), (random, RANDOM_SHARE)):
        # At most so much: outputs that hardly differ (an encoder without image information) would become noise.
        distance = torch.maximum(_distance_from_mean(inputs @ part.T), words_distance / LARGEST_FACTOR)
        factor = share**0.5 * words_distance / distance
        weight += factor * part
    _assign(last, weight, embeddings.float().mean(dim=0) - weight @ inputs.mean(dim=0))


def _distance_from_mean(x: Tensor) -> Tensor:
    """Root mean square distance of the rows from their mean."""
    return (x - x.mean(dim=0)).square().sum(dim=-1).mean().sqrt()


def _two_signed_directions(x: Tensor, hidden: int, seed: int) -> tuple[Tensor, Tensor]:
    """Weight [hidden, W] and bias [hidden] whose outputs come in pairs ±z, each of unit variance over `x`."""
    mean = x.mean(dim=0)
    centred = x - mean
    variances, axes = torch.linalg.eigh(centred.T @ centred / len(x))  # ascending
    whiten = (axes / (variances.clamp_min(variances[-1] * 1e-6) + 1e-8).sqrt()).T.flip(0)  # [W, W], largest axis first
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(hidden // 2, len(whiten), generator=generator, dtype=x.dtype).to(x.device)
    mix /= mix.norm(dim=1, keepdim=True)
    axes_kept = min(hidden // 2, len(whiten))
    mix[:axes_kept] = torch.eye(len(whiten), dtype=x.dtype, device=x.device)[:axes_kept]
    half = mix @ whiten
    weight = torch.zeros(hidden, x.shape[1], dtype=x.dtype, device=x.device)
    weight[: 2 * len(half)] = torch.cat([half, -half])
    return weight, -weight @ mean


def _assign(layer: nn.Linear, weight: Tensor, bias: Tensor) -> None:
    layer.weight.copy_(weight)
    layer.bias.copy_(bias)
