"""A start of the projector without the language model: image tokens lie where the words of their captions do."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from mllm.model.projector import projector_kind, trainable_layers

LARGEST_FACTOR, RANDOM_SHARE = 10.0, 0.1
"""Of `start_from_captions`."""
WORDS = 2_048
"""Words of the captions that count, those with the largest weights together: it bounds the time of the fit."""
PENALTY, SHARPNESS, ITERATIONS = 1e-2, 10.0, 100
"""Of `fit_words`. On the demo's validation artist names are read as often between a third and three times the penalty,
half and twice the sharpness."""


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


def caption_words(captions: Sequence[Sequence[int]]) -> tuple[list[int], Tensor]:
    """The words of some captions (token ids), and their share of each caption [n, words], weighted by rarity.

    The weight is the inverse document frequency: with equal weights "a" and "at the" make up most of a caption; a word
    of every caption weighs nothing here. Raises ValueError for a caption without a token.
    """
    if not all(captions):
        raise ValueError("a caption without a token tells nothing")
    seen = Counter(token for caption in captions for token in set(caption))
    weight = {token: math.log(len(captions) / count) + 1e-6 for token, count in seen.items()}
    words = sorted(sorted(seen, key=lambda token: (-seen[token] * weight[token], token))[:WORDS])
    place = {token: i for i, token in enumerate(words)}
    shares = torch.zeros(len(captions), len(words))
    for row, caption in zip(shares, captions, strict=True):
        for token in caption:
            if token in place:
                row[place[token]] += weight[token]
    return words, shares / shares.sum(dim=1, keepdim=True).clamp_min(1e-9)


def fit_words(images: Tensor, shares: Tensor, words: Tensor) -> tuple[Tensor, float]:
    """The linear map [W, D] of image features after which words are read off by their embeddings; McFadden's R².

    images [n, W] · shares [n, words], what is to be read · words [words, D], their embeddings less the mean of all
    embeddings, which is that of the tokens, too. A multinomial logistic regression whose weights are the map times the
    embeddings (made equally long: their length says how common a word is), and convex. Regressing on the mean
    embedding of a caption lets frequent words and whatever embeddings have in common decide instead.
    """
    deviation = images.std(dim=0)
    # Features that do not differ but for rounding tell nothing, and must not be made to.
    scale = deviation.clamp_min(max(1e-3 * deviation.max().item(), 1e-5 * images.abs().max().item(), 1e-12))
    inputs = (images - images.mean(dim=0)) / scale
    directions = SHARPNESS * functional.normalize(words, dim=1).T
    weight = inputs.new_zeros(images.shape[1], words.shape[1], requires_grad=True)
    bias = inputs.new_zeros(len(words), requires_grad=True)
    # A start that knows how common each word is: what is gained over it is what the pictures tell.
    common = shares.mean(dim=0)
    with torch.no_grad():
        bias += common.clamp_min(1e-9).log()

    def unread() -> Tensor:
        return functional.cross_entropy(inputs @ (weight @ directions) + bias, shares)

    def closure() -> float:
        optimizer.zero_grad()
        loss = unread() + PENALTY * weight.square().sum()
        loss.backward()
        return loss.item()

    optimizer = torch.optim.LBFGS([weight, bias], max_iter=ITERATIONS, history_size=10, line_search_fn="strong_wolfe")
    with torch.no_grad():
        before = unread().item()
    optimizer.step(closure)
    with torch.no_grad():
        after = unread().item()
    # In units of the embeddings: a word that is there for certain comes out about as long as its embedding is.
    return weight.detach() / scale[:, None] * words.norm(dim=1).mean(), 1 - after / before


def start_from_captions(
    projector: LlavaMultiModalProjector,
    features: Tensor,
    images: Tensor,
    captions: Sequence[Sequence[int]],
    embeddings: Tensor,
    *,
    seed: int = 0,
) -> float:
    """Start the projector where image tokens look like the words of their captions; returns the R² of `fit_words`.

    features [n, N, W] of n images and the mean of all their tokens, `images` [n, W], with their captions (token ids),
    embeddings [V, D]. The map is fitted to the means, from which the words of a caption can be told, and serves every
    token: so does the mean of the projected tokens tell them, and a patch comes to lie near the words for what it
    shows. The tokens are then given the mean and the variance of all word embeddings, `RANDOM_SHARE` of the variance
    as a random map: captions tell nothing about much of the features, and the fit drops that.
    """
    words, shares = caption_words(captions)
    directions = (embeddings[words].float() - embeddings.float().mean(dim=0)).to(images.device)
    fitted, r2 = fit_words(images, shares.to(images.device), directions)
    rows = features.flatten(0, 1)
    least_squares_init(projector, rows, rows @ fitted, ridge=1e-6, seed=seed)
    with torch.no_grad():
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
