"""Figures of an encoder from its features: retrieval both ways, zero-shot classification, a linear probe.

Ties are broken at random, in expectation: equal scores never help, and a model whose features are all the same
scores exactly chance.

Shapes: I images · T texts · C classes · P prompts per class · E embedding width · D width of the image tower.
"""

from __future__ import annotations

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
class Figure:
    """One measured number, in percent."""

    value: float
    chance: float
    items: int


def expected_hits(better: Tensor, tied: Tensor, positives: Tensor, k: int) -> Tensor:
    """Chance that one of the `positives` is among the first k, when they and `tied` negatives score the same.

    `better` negatives score above them. All [N]; float64 [N] in [0, 1]. Hypergeometric: the k − better slots
    left are filled without replacement from positives + tied items.
    """
    miss = torch.ones(len(better), dtype=torch.float64)
    for j in range(k):
        draw = (tied - j).clamp(min=0).double() / (tied + positives - j).clamp(min=1)
        miss *= torch.where(j < k - better, draw, 1.0)
    return 1 - miss


def _hits(scores: Tensor, positive: Tensor, ks: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Expected hits of each row at every k and their chance level, both [len(ks), N], in [0, 1].

    `scores` [N, M] of N queries against M candidates, `positive` [N, M] marks the right ones (≥ 1 in each row).
    """
    best = scores.masked_fill(~positive, -torch.inf).amax(dim=1, keepdim=True)
    above = scores > best + TIE
    near = (scores >= best - TIE) & ~above
    better, near_right = above.sum(1), (near & positive).sum(1)
    tied, right = near.sum(1) - near_right, positive.sum(1)
    counts = (better.cpu(), tied.cpu(), near_right.cpu())
    chance = (torch.zeros(len(scores)), (scores.shape[1] - right).cpu(), right.cpu())
    return (torch.stack([expected_hits(*counts, k) for k in ks]), torch.stack([expected_hits(*chance, k) for k in ks]))


def _figures(names: Sequence[str], hits: list[tuple[Tensor, Tensor]]) -> dict[str, Figure]:
    values, chances = (torch.cat([part[i] for part in hits], dim=1) for i in (0, 1))
    return {
        name: Figure(round(100 * value.mean().item(), 4), round(100 * chance.mean().item(), 4), values.shape[1])
        for name, value, chance in zip(names, values, chances, strict=True)
    }


@torch.no_grad()
def retrieval_metrics(
    image_features: Tensor, text_features: Tensor, text_to_image: Sequence[int], texts: Sequence[str], chunk: int = 512
) -> dict[str, Figure]:
    """Recall at 1, 5, 10 both ways: `i2t_r1` … `t2i_r10`. Features [I, E] and [T, E] are L2-normalised.

    Text t belongs to image `text_to_image[t]`; every image needs at least one. Equal strings count as the same caption:
    image → text is a hit if any of the image's captions, or an equal string, is among the first k; text → image if the
    image is the caption's own or has an equal caption. If images share a caption there is also `i2t_r1_strict` …, as
    clip_benchmark counts: only the image's own text is right.
    """
    for name, features in (("image", image_features), ("text", text_features)):
        if not torch.isfinite(features).all():
            raise NotFiniteError(f"evaluation: {name} features hold NaN or infinity")
    images, T = len(image_features), len(text_features)
    if not len(texts) == len(text_to_image) == T or set(text_to_image) != set(range(images)):
        raise ValueError("every text needs one image and every image at least one text")
    owner = np.asarray(text_to_image)
    string_of = np.unique(np.asarray(texts, dtype=object), return_inverse=True)[1]
    image_features, text_features = image_features.float(), text_features.float()
    figures = _recall(image_features, text_features, owner, string_of, chunk)
    if len(set(zip(owner, string_of, strict=True))) > len(set(string_of)):
        strict = _recall(image_features, text_features, owner, np.arange(T), chunk)
        figures |= {f"{name}_strict": figure for name, figure in strict.items()}
    return figures


def _recall(
    image_features: Tensor, text_features: Tensor, owner: np.ndarray, caption_of: np.ndarray, chunk: int
) -> dict[str, Figure]:
    """Recall both ways, text t being of image `owner[t]` [T]; texts with one `caption_of` [T] are the same caption."""
    from scipy.sparse import csr_array

    T, device = len(text_features), image_features.device
    owns = csr_array((np.ones(T, dtype=bool), (owner, caption_of)))  # image × caption
    owned_by = owns.T.tocsr()
    i2t, t2i = [], []
    for start in range(0, len(image_features), chunk):
        rows = slice(start, start + chunk)
        positive = torch.from_numpy(owns[rows].toarray()[:, caption_of]).to(device)
        i2t.append(_hits(image_features[rows] @ text_features.T, positive, RECALL_AT))
    for start in range(0, T, chunk):
        rows = slice(start, start + chunk)
        positive = torch.from_numpy(owned_by[caption_of[rows]].toarray()).to(device)
        t2i.append(_hits(text_features[rows] @ image_features.T, positive, RECALL_AT))
    return _figures([f"i2t_r{k}" for k in RECALL_AT], i2t) | _figures([f"t2i_r{k}" for k in RECALL_AT], t2i)


@torch.no_grad()
def choosing_figure(figures: Mapping[str, float]) -> float | None:
    """The figure by which a checkpoint is chosen, larger is better: the sum of R@1, R@5 and R@10 both ways (rsum).

    It is of the picture's own sentences if the set has them; without retrieval it is another figure in percent.
    """
    for protocol in ("sentence", "part", "web"):
        recalls = [figures.get(f"{protocol}_{way}_r{k}") for way in ("i2t", "t2i") for k in (1, 5, 10)]
        present = [recall for recall in recalls if recall is not None]
        if present:
            return sum(present)
    return figures.get("zero_shot_top1", figures.get("caption_token_top1"))


def zero_shot_metrics(image_features: Tensor, prompt_features: Tensor, labels: Sequence[int]) -> dict[str, Figure]:
    """Accuracy of the nearest class. Images [I, E], prompts [C, P, E], both L2-normalised; `labels` are class indices.

    `top1`, `top5`: a class is the normalised mean of its prompts (the usual ensemble). `single_prompt_top1/5`: each
    prompt alone, averaged over the prompts.
    """
    C, P, _ = prompt_features.shape
    ks = (1, min(5, C))
    right = F.one_hot(torch.as_tensor(labels), C).bool().to(image_features.device)
    classes = F.normalize(prompt_features.float().mean(dim=1), dim=-1)
    ensemble = _hits(image_features.float() @ classes.T, right, ks)
    single = [_hits(image_features.float() @ prompt_features[:, p].float().T, right, ks) for p in range(P)]
    hits, chances = (torch.stack([found[i] for found in single]).mean(dim=0) for i in (0, 1))
    alone = _figures(["single_prompt_top1", "single_prompt_top5"], [(hits, chances)])
    return _figures(["top1", "top5"], [ensemble]) | alone


def token_accuracy(predicted: Tensor, truth: Tensor) -> Figure:
    """Share of the tokens [N] that are predicted; chance is that of always naming the commonest one."""
    value, chance = (predicted == truth).double().mean().item(), truth.bincount().max().item() / len(truth)
    return Figure(round(100 * value, 4), round(100 * chance, 4), len(truth))


def linear_probe(train: Tensor, train_labels: Sequence[int]) -> Callable[[Tensor, Sequence[int]], Figure]:
    """A logistic regression on frozen features [N, D], standardised by them; returns its accuracy on others."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000, C=0.1))
    probe.fit(train.float().cpu().numpy(), train_labels)
    commonest = np.bincount(train_labels).argmax()

    def accuracy(test: Tensor, test_labels: Sequence[int]) -> Figure:
        value = probe.score(test.float().cpu().numpy(), test_labels)
        chance = float(np.mean(np.asarray(test_labels) == commonest))
        return Figure(round(100 * value, 4), round(100 * chance, 4), len(test_labels))

    return accuracy
