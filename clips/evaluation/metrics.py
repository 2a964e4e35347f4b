"""Metrics of an encoder from its features: retrieval both ways, zero-shot classification, a linear probe.

Ties count with their expectation over random orders, so equal scores never help, and a model whose features are all
the same scores exactly chance.

Shapes: I images · T texts · C classes · P prompts per class · E embedding width · D width of the image tower.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clips.common.errors import NotFiniteError

RECALL_AT = (1, 5, 10)
TIE = 1e-6
"""Cosines closer than this are equal: kernels round equal features differently at the edge of a block."""


@dataclass(frozen=True)
class Metric:
    """A metric with its chance level and the number of samples it was measured on.

    Values are in percent, larger is better; for log ranks and losses they are in nats, smaller is better.
    """

    value: float
    chance: float
    items: int


def expected_hits(better: Tensor, tied: Tensor, positives: Tensor, k: int) -> Tensor:
    """Return the probability that one of the `positives` is in the first k, if `tied` negatives have the same score.

    `better` negatives score above them. All arguments are [N], and so is the result, float64 in [0, 1].
    Hypergeometric: the k − better slots left are filled without replacement from positives + tied candidates.
    """
    miss = torch.ones(len(better), dtype=torch.float64)
    for j in range(k):
        draw = (tied - j).clamp(min=0).double() / (tied + positives - j).clamp(min=1)
        miss *= torch.where(j < k - better, draw, 1.0)
    return 1 - miss


def expected_log_rank(better: Tensor, tied: Tensor, positives: Tensor) -> Tensor:
    """Return the mean natural logarithm of the first positive's rank (from 1), over all orders of equal scores.

    Arguments are those of `expected_hits`; the result is float64 [N].
    """
    counts, row_of = torch.stack([better, tied, positives]).unique(dim=1, return_inverse=True)
    means = []
    for above, negatives, right in counts.T.tolist():
        step = np.arange(negatives)
        later = np.cumprod((negatives - step) / (negatives + right - step))  # chance of a rank beyond above + 1 + step
        means.append(math.log(above + 1) + float(later @ np.log1p(1 / (above + 1 + step))))
    return torch.tensor(means, dtype=torch.float64)[row_of]


def _ranks(scores: Tensor, positive: Tensor) -> Tensor:
    """Count better, tied and positives for `expected_hits` in each row, as measured and for equal scores, [2, 3, N].

    `scores` [N, M] of N queries against M candidates, `positive` [N, M] marks the right ones (≥ 1 in each row).
    """
    best = scores.masked_fill(~positive, -torch.inf).amax(dim=1, keepdim=True)
    above = scores > best + TIE
    near = (scores >= best - TIE) & ~above
    near_right, right = (near & positive).sum(1), positive.sum(1)
    measured = torch.stack([above.sum(1), near.sum(1) - near_right, near_right])
    chance = torch.stack([torch.zeros_like(right), scores.shape[1] - right, right])
    return torch.stack([measured, chance]).cpu()


def _hits(ranks: Tensor, ks: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Expected hits of each row at every k and their chance level, both [len(ks), N], in [0, 1]."""
    values, chances = (torch.stack([expected_hits(counts[0], counts[1], counts[2], k) for k in ks]) for counts in ranks)
    return values, chances


def _metrics(names: Sequence[str], values: Tensor, chances: Tensor) -> dict[str, Metric]:
    return {
        name: Metric(round(100 * value.mean().item(), 4), round(100 * chance.mean().item(), 4), values.shape[1])
        for name, value, chance in zip(names, values, chances, strict=True)
    }


@torch.no_grad()
def retrieval_metrics(
    image_features: Tensor,
    text_features: Tensor,
    text_to_image: Sequence[int],
    texts: Sequence[str],
    logit_scale: float | None = None,
    chunk: int = 512,
) -> dict[str, Metric]:
    """Return recall at 1, 5 and 10 and the mean log rank of the best right answer, in both directions.

    They are called `i2t_r1` … `t2i_r10`, `i2t_log_rank` and `t2i_log_rank`. Features [I, E] and [T, E] are
    L2-normalised; text t belongs to image `text_to_image[t]`, and every image needs a text. Equal strings count as the
    same caption: an image's search is right if one of its captions, or an equal string, is among the first k; a text's
    search if the image is its own or has an equal caption. If images share a caption there is also `i2t_r1_strict` …,
    which accepts only the image's own text, as clip_benchmark does. With `logit_scale` there is `contrastive_loss`, the
    symmetric InfoNCE of all images, each with its first text. It grows with the set (chance is the logarithm of I).
    `chunk` queries are compared at once. Raises NotFiniteError if a feature is not finite, and ValueError if texts and
    images do not match.
    """
    _check_finite(image=image_features, text=text_features)
    images, T = len(image_features), len(text_features)
    if not len(texts) == len(text_to_image) == T or set(text_to_image) != set(range(images)):
        raise ValueError("every text needs one image and every image at least one text")
    owner = np.asarray(text_to_image)
    string_of = np.unique(np.asarray(texts, dtype=object), return_inverse=True)[1]
    image_features, text_features = image_features.float(), text_features.float()
    metrics = _recall(image_features, text_features, owner, string_of, chunk)
    if len(set(zip(owner, string_of, strict=True))) > len(set(string_of)):
        strict = _recall(image_features, text_features, owner, np.arange(T), chunk)
        metrics |= {f"{name}_strict": metric for name, metric in strict.items()}
    if logit_scale is not None:
        first = np.unique(owner, return_index=True)[1]
        metrics["contrastive_loss"] = _contrastive_loss(image_features, text_features[first], logit_scale, chunk)
    return metrics


def _check_finite(**features: Tensor) -> None:
    """Raise NotFiniteError for features that hold NaN or infinity: nothing scores above NaN, so it would count as best.

    The names of the arguments say in the message whose features they are.
    """
    for name, values in features.items():
        if not torch.isfinite(values).all():
            raise NotFiniteError(f"evaluation: {name} features hold NaN or infinity")


def _recall(
    image_features: Tensor, text_features: Tensor, owner: np.ndarray, caption_of: np.ndarray, chunk: int
) -> dict[str, Metric]:
    """Recall both ways, text t being of image `owner[t]` [T]; texts with one `caption_of` [T] are the same caption."""
    from scipy.sparse import csr_array

    T, device = len(text_features), image_features.device
    owns = csr_array((np.ones(T, dtype=bool), (owner, caption_of)))  # image × caption
    owned_by = owns.T.tocsr()
    i2t, t2i = [], []
    for start in range(0, len(image_features), chunk):
        rows = slice(start, start + chunk)
        positive = torch.from_numpy(owns[rows].toarray()[:, caption_of]).to(device)
        i2t.append(_ranks(image_features[rows] @ text_features.T, positive))
    for start in range(0, T, chunk):
        rows = slice(start, start + chunk)
        positive = torch.from_numpy(owned_by[caption_of[rows]].toarray()).to(device)
        t2i.append(_ranks(text_features[rows] @ image_features.T, positive))
    metrics: dict[str, Metric] = {}
    for way, parts in (("i2t", i2t), ("t2i", t2i)):
        ranks = torch.cat(parts, dim=2)
        metrics |= _metrics([f"{way}_r{k}" for k in RECALL_AT], *_hits(ranks, RECALL_AT))
        value, chance = (round(expected_log_rank(*counts).mean().item(), 4) for counts in ranks)
        metrics[f"{way}_log_rank"] = Metric(value, chance, ranks.shape[2])
    return metrics


def _contrastive_loss(image: Tensor, text: Tensor, logit_scale: float, chunk: int) -> Metric:
    total = 0.0
    for truth in torch.arange(len(image), device=image.device).split(chunk):
        for queries, candidates in ((image, text), (text, image)):
            total += F.cross_entropy(logit_scale * queries[truth] @ candidates.T, truth, reduction="sum").item()
    return Metric(round(total / (2 * len(image)), 4), round(math.log(len(image)), 4), len(image))


def choosing_metric(metrics: Mapping[str, float]) -> float | None:
    """Return the metric that chooses a checkpoint, larger is better: the sum of R@1, R@5 and R@10 both ways (rsum).

    It is measured on the image's own sentences if the set has them; without retrieval it is the zero-shot accuracy.
    """
    for protocol in ("sentence", "part", "web"):
        recalls = [metrics.get(f"{protocol}_{way}_r{k}") for way in ("i2t", "t2i") for k in (1, 5, 10)]
        present = [recall for recall in recalls if recall is not None]
        if present:
            return sum(present)
    return metrics.get("zero_shot_top1")


def zero_shot_metrics(image_features: Tensor, prompt_features: Tensor, labels: Sequence[int]) -> dict[str, Metric]:
    """Return the accuracy of the nearest class. `labels` are class indices; all features are L2-normalised.

    `top1`, `top5`: a class is the normalised mean of its prompts (the usual ensemble). `single_prompt_top1/5`: the
    accuracy of each prompt alone, averaged over the prompts. Shapes: images [I, E], prompts [C, P, E]. Raises
    NotFiniteError if a feature is not finite.
    """
    _check_finite(image=image_features, prompt=prompt_features)
    C, P, _ = prompt_features.shape
    ks = (1, min(5, C))
    right = F.one_hot(torch.as_tensor(labels), C).bool().to(image_features.device)
    classes = F.normalize(prompt_features.float().mean(dim=1), dim=-1)
    ensemble = _hits(_ranks(image_features.float() @ classes.T, right), ks)
    single = [_hits(_ranks(image_features.float() @ prompt_features[:, p].float().T, right), ks) for p in range(P)]
    hits, chances = (torch.stack([of_prompt[i] for of_prompt in single]).mean(dim=0) for i in (0, 1))
    alone = _metrics(["single_prompt_top1", "single_prompt_top5"], hits, chances)
    return _metrics(["top1", "top5"], *ensemble) | alone


def token_accuracy(predicted: Tensor, truth: Tensor) -> Metric:
    """Return the share of tokens [N] that are predicted right; chance is always predicting the most common token."""
    value, chance = (predicted == truth).double().mean().item(), truth.bincount().max().item() / len(truth)
    return Metric(round(100 * value, 4), round(100 * chance, 4), len(truth))


def linear_probe(train: Tensor, train_labels: Sequence[int]) -> Callable[[Tensor, Sequence[int]], Metric]:
    """Fit a logistic regression to frozen, standardised features [N, D]; return a function for its accuracy."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000, C=0.1))
    probe.fit(train.float().cpu().numpy(), train_labels)
    commonest = np.bincount(train_labels).argmax()

    def accuracy(test: Tensor, test_labels: Sequence[int]) -> Metric:
        value = probe.score(test.float().cpu().numpy(), test_labels)
        chance = float(np.mean(np.asarray(test_labels) == commonest))
        return Metric(round(100 * value, 4), round(100 * chance, 4), len(test_labels))

    return accuracy
