"""CIDEr-D (Vedantam, Zitnick, Parikh 2015), the figure that captioning benchmarks report.

Follows coco-caption's cider_scorer.py: n-grams of 1 to 4 words, document frequencies from the references of the
corpus, clipped counts, a Gaussian penalty on the length difference (sigma 6), times 10. The one difference is the
tokenizer: lower-cased words without punctuation instead of the Java PTB tokenizer, which splits contractions.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

SIGMA = 6.0
WORD = re.compile(r"\w+(?:['’-]\w+)*")
Vector = list[dict[tuple[str, ...], float]]
"""TF-IDF weights of the n-grams, one dict for each n of 1 … 4."""


def words(text: str) -> list[str]:
    return WORD.findall(text.lower())


def cider(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, list[float]]:
    """Mean CIDEr-D and that of each candidate; `references[i]` are the reference captions of candidate i (≥ 1).

    The document frequencies come from `references`, so a score has a meaning only within one corpus. Range 0 … 10.
    """
    candidate_counts = [_count(text) for text in candidates]
    reference_counts = [[_count(text) for text in texts] for texts in references]
    document_frequency = Counter(
        gram for counts in reference_counts for gram in {gram for count in counts for n in count for gram in n}
    )
    log_documents = math.log(max(len(references), 1))

    def vector(counts: list[Counter[tuple[str, ...]]]) -> Vector:
        return [
            {gram: tf * (log_documents - math.log(max(1, document_frequency[gram]))) for gram, tf in count.items()}
            for count in counts
        ]

    scores = []
    for counts, others in zip(candidate_counts, reference_counts, strict=True):
        own = vector(counts)
        similar = [_similarity(own, vector(other), counts[1].total() - other[1].total()) for other in others]
        scores.append(10 * float(np.mean(similar)))
    return float(np.mean(scores)) if scores else 0.0, scores


def _count(text: str) -> list[Counter[tuple[str, ...]]]:
    tokens = words(text)
    return [Counter(zip(*(tokens[i:] for i in range(n)), strict=False)) for n in range(1, 5)]


def _similarity(own: Vector, other: Vector, length_difference: int) -> float:
    """Mean over n of the clipped cosine; `length_difference` counts bigrams, as the reference code does."""
    total = 0.0
    for a, b in zip(own, other, strict=True):
        norms = math.sqrt(sum(w * w for w in a.values())) * math.sqrt(sum(w * w for w in b.values()))
        if norms:
            total += sum(min(weight, b.get(gram, 0.0)) * b.get(gram, 0.0) for gram, weight in a.items()) / norms
    return total / 4 * math.exp(-(length_difference**2) / (2 * SIGMA**2))
