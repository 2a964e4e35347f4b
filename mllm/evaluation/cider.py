"""CIDEr-D (Vedantam, Zitnick, Parikh 2015), the metric that captioning benchmarks report.

It follows coco-caption's cider_scorer.py: n-grams of 1 to 4 words, document frequencies from the references of the
corpus, clipped counts, a Gaussian penalty on the length difference (sigma 6), and a factor of 10. Only the tokenizer
differs: it takes lower-case words without punctuation, whereas the Java PTB tokenizer splits contractions.
"""

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
    """Return the mean CIDEr-D and the score, 0 … 10, of each candidate i with its reference captions `references[i]`.

    The document frequencies come from all `references`, so scores can be compared only within one corpus.
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
        candidate = vector(counts)
        similar = [_similarity(candidate, vector(other), counts[1].total() - other[1].total()) for other in others]
        scores.append(10 * float(np.mean(similar)))
    return float(np.mean(scores)) if scores else 0.0, scores


def _count(text: str) -> list[Counter[tuple[str, ...]]]:
    tokens = words(text)
    return [Counter(zip(*(tokens[i:] for i in range(n)), strict=False)) for n in range(1, 5)]


def _similarity(candidate: Vector, reference: Vector, length_difference: int) -> float:
    """Return the clipped cosine averaged over n. `length_difference` is in bigrams, as in the reference code."""
    total = 0.0
    for a, b in zip(candidate, reference, strict=True):
        norms = math.sqrt(sum(w * w for w in a.values())) * math.sqrt(sum(w * w for w in b.values()))
        if norms:
            total += sum(min(weight, b.get(gram, 0.0)) * b.get(gram, 0.0) for gram, weight in a.items()) / norms
    return total / 4 * math.exp(-(length_difference**2) / (2 * SIGMA**2))
