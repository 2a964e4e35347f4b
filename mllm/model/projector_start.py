"""The projector's start: image tokens regressed on the words of their captions, then sharpened by gradient."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from mllm.model.projector import projector_kind, trainable_layers

LARGEST_FACTOR, WORD_SHARE, RANDOM_SHARE = 10.0, 0.12, 0.1
"""Constants of `start_from_captions`."""
FEWEST, LARGEST_SHARE = 8, 0.1
"""A word has a hidden unit of its own if so many captions hold it, and no larger a share of them."""
THRESHOLD = 1.5
"""From which evidence on such a unit speaks, in standard deviations over image tokens."""
STEPS, BATCH, RATE, MOST_WORDS = 300, 64, 2e-3, 1_000
"""Of `sharpen`: AdamW's steps, images of a step, peak rate (cosine), and words that are learned at most."""


@torch.no_grad()
def least_squares_init(
    projector: LlavaMultiModalProjector,
    features: Tensor,
    targets: Tensor,
    *,
    ridge: float = 1e-2,
    seed: int = 0,
    unused: int = 0,
) -> float:
    """Start the projector at the ridge regression from `features` [n, W] to `targets` [n, D]; returns R².

    `ridge` is relative to the mean variance of the regressors. `linear` gets the solution itself. For `mlp2x_gelu`,
    linear_1 becomes D/2 directions of the whitened features (the principal axes first, then random ones) each with
    both signs, and linear_2 the regression on its activations. gelu(z) − gelu(−z) = z, so wherever W ≤ D/2 every
    linear map is within reach and the fit is at least as good as the linear one. The last `unused` of the D hidden
    units stay zero.
    """
    x, y = features.double(), targets.double()
    if projector_kind(projector) == "mlp2x_gelu":
        weight, bias = _two_signed_directions(x, projector.linear_1.out_features, seed, unused)
        _assign(projector.linear_1, weight, bias)
        x, layer = projector.act(x @ weight.T + bias), projector.linear_2
    else:
        layer = projector.linear_1
    x_mean, y_mean = x.mean(dim=0), y.mean(dim=0)
    centred = x - x_mean
    weight = torch.linalg.solve(_regular(centred.T @ centred / len(x), ridge), centred.T @ (y - y_mean) / len(x)).T
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


def telling_words(captions: Sequence[Sequence[int]], most: int) -> list[int]:
    """Up to `most` tokens that distinguish captions: neither rare nor common, the most frequent first."""
    seen = Counter(token for caption in captions for token in set(caption))
    telling = [token for token, count in seen.items() if FEWEST <= count <= LARGEST_SHARE * len(captions)]
    return sorted(telling, key=lambda token: (-seen[token], token))[:most]


def word_evidence(
    features: Tensor, captions: Sequence[Sequence[int]], words: Sequence[int], *, ridge: float = 1e-3
) -> tuple[Tensor, Tensor]:
    """Weight [K, W] and bias [K] that say, of an image token, whether the caption holds each of K words.

    features [n, N, W] of n images. A word's evidence is the ridge regression, from every token of an image, to 1/p − 1
    where the caption holds it and −1 where not, p its share of the captions: how many times likelier it is here than
    anywhere. It comes with a standard deviation of 1 over the tokens.
    """
    held = _held(captions, words).to(features.device, torch.double)
    rows = features.flatten(0, 1).double()
    mean = rows.mean(dim=0)
    centred = rows - mean
    covariance = centred.T @ centred / len(rows)
    of_images = centred.view(features.shape).sum(dim=1)
    weight = torch.linalg.solve(_regular(covariance, ridge), of_images.T @ (held / held.mean(dim=0) - 1) / len(rows)).T
    deviation = ((weight @ covariance) * weight).sum(dim=1).clamp_min(1e-12).sqrt()
    weight /= deviation[:, None]
    return weight, -weight @ mean


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

    features [n, N, W] of n images with their captions (token ids), embeddings [V, D]. Three maps are added, each with
    its share of the variance of word embeddings, which is what the tokens get (a regression shrinks them to a tenth of
    what the language model is used to), and the tokens' mean is that of the embeddings:

    - Every token of an image is regressed on the mean embedding of its caption's words (`caption_targets`).
      Words that a patch does not show average out over images, so a patch comes to lie near the words for its content.
    - `WORD_SHARE`, in `mlp2x_gelu` only: hidden units that the directions of the features leave over, at least a
      quarter, add the embedding of one word each (`telling_words`) if its evidence (`word_evidence`) is above
      `THRESHOLD`. A language model reads a name from tokens near that name's embedding.
    - `RANDOM_SHARE`: a random map. Captions do not describe many of the features, and regressions drop those.
    """
    rows = features.flatten(0, 1)
    vocabulary = embeddings.float()
    centre = vocabulary.mean(dim=0)
    *before, last = trainable_layers(projector).values()
    hidden = projector.linear_1.out_features
    words = telling_words(captions, max(hidden - 2 * rows.shape[1], hidden // 4)) if before else []
    targets = caption_targets(captions, embeddings).repeat_interleave(features.shape[1], dim=0)
    r2 = least_squares_init(projector, rows, targets.to(rows.device), ridge=1e-3, seed=seed, unused=len(words))
    random = torch.randn(last.weight.shape, generator=torch.Generator().manual_seed(seed)).to(rows.device)
    parts = [(last.weight.float().clone(), 1 - RANDOM_SHARE - WORD_SHARE * bool(words)), (random, RANDOM_SHARE)]
    if words:
        weight, bias = word_evidence(features, captions, words)
        before[0].weight[-len(words) :], before[0].bias[-len(words) :] = weight, bias - THRESHOLD
        random[:, -len(words) :] = 0
        of_words = torch.zeros_like(random)
        of_words[:, -len(words) :] = (vocabulary[words] - centre).T
        parts.append((of_words, WORD_SHARE))
    inputs = projector.act(before[0](rows.to(last.weight.dtype))).float() if before else rows.float()
    words_distance = _distance_from_mean(vocabulary)
    total = torch.zeros_like(random)
    for part, share in parts:
        # At most so much: outputs that hardly differ (an encoder without image information) would become noise.
        distance = torch.maximum(_distance_from_mean(inputs @ part.T), words_distance / LARGEST_FACTOR)
        total += share**0.5 * words_distance / distance * part
    _assign(last, total, centre - total @ inputs.mean(dim=0))
    return r2


@torch.enable_grad()
def sharpen(
    projector: LlavaMultiModalProjector,
    features: Tensor,
    captions: Sequence[Sequence[int]],
    embeddings: Tensor,
    places: tuple[Tensor, Tensor] | None = None,
    *,
    seed: int = 0,
) -> None:
    """Train the projector for `STEPS` steps until some token of an image points at each word of its caption.

    A regression lets all tokens of an image resemble all words of its caption. Here the token nearest to a word counts:
    the logit of "the caption holds this word" is the log-sum-exp over tokens of 8 times their cosine, plus a bias. The
    tokens keep mean and spread of word embeddings. features [n, N, W], embeddings [V, D]. `places` are the number of
    each token's place [n, N] and directions of the words for places [P, D]: each token then says its own place too.
    """
    vocabulary = embeddings.float()
    centre, spread = vocabulary.mean(dim=0), _distance_from_mean(vocabulary)
    seen = Counter(token for caption in captions for token in set(caption))
    words = [token for token, count in seen.most_common() if FEWEST <= count <= len(captions) / 2][:MOST_WORDS]
    if not words:
        return
    held = _held(captions, words)
    directions = F.normalize(vocabulary[words] - centre)
    bias = nn.Parameter(torch.logit(held.float().mean(dim=0)) - 4)
    layers = trainable_layers(projector).values()
    weights = [parameter for layer in layers for parameter in layer.parameters()]
    optimizer = torch.optim.AdamW([*weights, bias], lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(STEPS):
        chosen = torch.randint(len(features), (BATCH,), generator=generator)
        given = features[chosen].float()
        given = given * (torch.rand(given.shape, generator=generator) > 0.1) / 0.9
        tokens = projector(given)
        cosines = F.normalize(tokens - centre, dim=-1)
        logits = torch.logsumexp(8 * cosines @ directions.T, dim=1) + bias
        loss = F.binary_cross_entropy_with_logits(logits, held[chosen].float(), reduction="none").sum(dim=1).mean()
        loss += (_distance_from_mean(tokens.flatten(0, 1)) / spread - 1).square()
        loss += ((tokens.mean(dim=(0, 1)) - centre) / spread).square().sum()
        if places is not None:
            of_token, of_words = places
            loss += 2 * F.cross_entropy((8 * cosines @ of_words.T).flatten(0, 1), of_token[chosen].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def _held(captions: Sequence[Sequence[int]], words: Sequence[int]) -> Tensor:
    """Return whether each of n captions holds each of K words, bool [n, K]."""
    column = {word: k for k, word in enumerate(words)}
    held = torch.zeros(len(captions), len(words), dtype=torch.bool)
    for row, caption in zip(held, captions, strict=True):
        row[[column[token] for token in set(caption) if token in column]] = True
    return held


def _regular(covariance: Tensor, ridge: float) -> Tensor:
    """`ridge` times the mean variance added to the diagonal of [W, W]."""
    penalty = ridge * covariance.diagonal().mean() + 1e-8
    return covariance + penalty * torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)


def _distance_from_mean(x: Tensor) -> Tensor:
    """Root mean square distance of the rows from their mean."""
    return (x - x.mean(dim=0)).square().sum(dim=-1).mean().sqrt()


def _two_signed_directions(x: Tensor, hidden: int, seed: int, unused: int) -> tuple[Tensor, Tensor]:
    """Weight [hidden, W] and bias [hidden] whose outputs come in pairs ±z, each of unit variance over `x`.

    The last `unused` of them are zero, and one more if that leaves an odd number.
    """
    pairs = (hidden - unused) // 2
    mean = x.mean(dim=0)
    centred = x - mean
    variances, axes = torch.linalg.eigh(centred.T @ centred / len(x))  # ascending
    whiten = (axes / (variances.clamp_min(variances[-1] * 1e-6) + 1e-8).sqrt()).T.flip(0)  # [W, W], largest axis first
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(pairs, len(whiten), generator=generator, dtype=x.dtype).to(x.device)
    mix /= mix.norm(dim=1, keepdim=True)
    axes_kept = min(pairs, len(whiten))
    mix[:axes_kept] = torch.eye(len(whiten), dtype=x.dtype, device=x.device)[:axes_kept]
    half = mix @ whiten
    weight = torch.zeros(hidden, x.shape[1], dtype=x.dtype, device=x.device)
    weight[: 2 * len(half)] = torch.cat([half, -half])
    return weight, -weight @ mean


def _assign(layer: nn.Linear, weight: Tensor, bias: Tensor) -> None:
    layer.weight.copy_(weight)
    layer.bias.copy_(bias)
