"""Initialise the projector: regress image tokens on the words of their captions, then train it for a few steps."""

import math
from collections import Counter
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from mllm.model.projector import projector_kind, trainable_layers

LARGEST_FACTOR, WORD_SHARE, RANDOM_SHARE = 10.0, 0.12, 0.1
"""Largest amplification of a map, and the shares of variance of two maps, see `start_from_captions`."""
FEWEST, LARGEST_SHARE = 8, 0.1
"""A word gets a hidden unit of its own if at least so many captions, and at most this share of them, contain it."""
THRESHOLD = 1.5
"""The evidence above which such a unit is active, in standard deviations over image tokens."""
LEAST_DEVIATION = 2**-6
"""Least standard deviation along an axis, relative to the features' size: four times the rounding of bf16."""
STEPS, BATCH, RATE, MOST_WORDS = 300, 64, 2e-3, 1_000
"""For `sharpen`: number of AdamW steps, images per step, peak learning rate (cosine), and most words to learn."""
START_IMAGES, START_TOKENS = 8_192, 16
"""Largest number of images that the projector is fitted to, and the number of tokens of each image."""


def start_in_words(init: str, samples: int) -> str:
    """Return how `--mm_projector_init` makes the projector, for plan, model card and report.

    `samples` is the number of samples in the training set.
    """
    if init == "random":
        return "random"
    steps = f" and {STEPS} whole-caption steps" if init == "captions" else ""
    return f"ridge fit{steps} on the captions of {min(samples, START_IMAGES):,} samples"


def start_bytes(width: int, images: int = START_IMAGES) -> int:
    """Return the bytes that the fit to captions takes on the host for a language model of `width`.

    Measured: 6.6 times the targets in fp64, at widths of encoder and language model of 192 and 576.
    """
    return int(6.6 * 8 * min(images, START_IMAGES) * START_TOKENS * width)


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
    """Set the projector to the ridge regression from `features` [n, W] to `targets` [n, D], and return its R².

    `ridge` is relative to the mean variance of the regressors. A `linear` projector gets the solution itself. For
    `mlp2x_gelu`, linear_1 becomes D/2 directions of the whitened features (the principal axes first, then random ones),
    each with both signs, and linear_2 becomes the regression on its activations. Because gelu(z) − gelu(−z) = z, every
    linear map can be represented if W ≤ D/2, so the fit is at least as good as the linear one. The last `unused` of
    the D hidden units stay zero.
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
    """Return [n, D]: the mean word embedding of each caption (token ids), weighted by inverse document frequency.

    With equal weights, words of every sentence ("a", "at the") would dominate the mean, but here a word of all captions
    has weight zero. embeddings [V, D]. Raises ValueError for a caption without tokens.
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
    """Return up to `most` tokens that are neither rare nor common in the captions, the most frequent ones first."""
    seen = Counter(token for caption in captions for token in set(caption))
    telling = [token for token, count in seen.items() if FEWEST <= count <= LARGEST_SHARE * len(captions)]
    return sorted(telling, key=lambda token: (-seen[token], token))[:most]


def word_evidence(
    features: Tensor, captions: Sequence[Sequence[int]], words: Sequence[int], *, ridge: float = 1e-3
) -> tuple[Tensor, Tensor]:
    """Return weight [K, W] and bias [K] of a linear map from an image token to the evidence for each of K words.

    features [n, N, W] of n images. The evidence for a word is a ridge regression from every token of an image to
    1/p − 1 if its caption contains the word, and to −1 if not, where p is the share of captions with the word. It
    estimates how many times likelier the word is here than elsewhere, scaled to a standard deviation of 1 over tokens.
    """
    held = _held(captions, words).to(features.device, torch.double)
    rows = features.flatten(0, 1).double()
    mean = rows.mean(dim=0)
    centred = rows - mean
    covariance = centred.T @ centred / len(rows)
    by_image = centred.view(features.shape).sum(dim=1)
    weight = torch.linalg.solve(_regular(covariance, ridge), by_image.T @ (held / held.mean(dim=0) - 1) / len(rows)).T
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
    """Set the projector so that image tokens resemble the words of their captions, and return the regression's R².

    features [n, N, W] of n images with their captions (token ids), embeddings [V, D]. The projector is the sum of three
    maps. Its outputs get the mean and the variance of the word embeddings, because a regression alone would shrink
    them to a tenth of what the language model is used to. Each map contributes a share of that variance:

    - The rest: every token of an image is regressed on the mean embedding of its caption's words (`caption_targets`).
      Words that a patch does not show average out over images, so a patch ends up near the words for its content.
    - `WORD_SHARE`, in `mlp2x_gelu` only: the hidden units that the feature directions leave free, at least a quarter,
      each add the embedding of one word (`telling_words`) if its evidence (`word_evidence`) is above `THRESHOLD`.
      A language model reads a word from tokens near the embedding of that word.
    - `RANDOM_SHARE`: a random map, because a regression drops all features that captions do not describe.
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
        by_word = torch.zeros_like(random)
        by_word[:, -len(words) :] = (vocabulary[words] - centre).T
        parts.append((by_word, WORD_SHARE))
    inputs = projector.act(before[0](rows.to(last.weight.dtype))).float() if before else rows.float()
    words_distance = _distance_from_mean(vocabulary)
    total = torch.zeros_like(random)
    for part, share in parts:
        # Bounded, because outputs that hardly differ (an encoder without image information) would become noise.
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
    *,
    seed: int = 0,
) -> None:
    """Train the projector for `STEPS` steps so that for each word of a caption one image token points at that word.

    A regression makes all tokens of an image resemble all words of its caption. Here only the token nearest to a word
    counts: the logit of "the caption contains this word" is a bias plus the log-sum-exp, over tokens, of 8 × cosine.
    Two penalties keep mean and spread of the word embeddings. features [n, N, W], embeddings [V, D].
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
        inputs = features[chosen].float()
        inputs = inputs * (torch.rand(inputs.shape, generator=generator) > 0.1) / 0.9
        tokens = projector(inputs)
        cosines = F.normalize(tokens - centre, dim=-1)
        logits = torch.logsumexp(8 * cosines @ directions.T, dim=1) + bias
        loss = F.binary_cross_entropy_with_logits(logits, held[chosen].float(), reduction="none").sum(dim=1).mean()
        loss += (_distance_from_mean(tokens.flatten(0, 1)) / spread - 1).square()
        loss += ((tokens.mean(dim=(0, 1)) - centre) / spread).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def _held(captions: Sequence[Sequence[int]], words: Sequence[int]) -> Tensor:
    """Return bool [n, K]: True where one of n captions contains one of K words."""
    column = {word: k for k, word in enumerate(words)}
    held = torch.zeros(len(captions), len(words), dtype=torch.bool)
    for row, caption in zip(held, captions, strict=True):
        row[[column[token] for token in set(caption) if token in column]] = True
    return held


def _regular(covariance: Tensor, ridge: float) -> Tensor:
    """Add `ridge` times the mean variance to the diagonal of `covariance` [W, W]."""
    penalty = ridge * covariance.diagonal().mean() + 1e-8
    return covariance + penalty * torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)


def _distance_from_mean(x: Tensor) -> Tensor:
    """Return the root mean square distance of the rows from their mean."""
    return (x - x.mean(dim=0)).square().sum(dim=-1).mean().sqrt()


def _two_signed_directions(x: Tensor, hidden: int, seed: int, unused: int) -> tuple[Tensor, Tensor]:
    """Return weight [hidden, W] and bias [hidden] whose outputs come in pairs ±z, each of unit variance over `x`.

    The last `unused` outputs are zero, and one more if their number would be odd.
    """
    pairs = (hidden - unused) // 2
    mean = x.mean(dim=0)
    centred = x - mean
    variances, axes = torch.linalg.eigh(centred.T @ centred / len(x))  # ascending
    # Axes that only rounding fills, as where every image has the same tokens, would be amplified to noise in bf16.
    floor = torch.maximum(variances[-1] * 1e-6, x.square().mean() * LEAST_DEVIATION**2)
    whiten = (axes / (variances.clamp_min(floor) + 1e-8).sqrt()).T.flip(0)  # [W, W], largest axis first
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
