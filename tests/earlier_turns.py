"""How often a rule that is fitted on the texts of earlier turns guesses an answer, without the image."""

from collections.abc import Callable, Sequence

import numpy as np
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

Talk = Sequence[tuple[str, str]]
"""Questions and answers of a conversation."""


def guessed(talks: Sequence[Talk], kind_of: Callable[[str, str], str]) -> dict[str, tuple[float, float, int]]:
    """Return for each kind of later question: share that the better rule guesses, share of a constant, number.

    One rule knows the answer before, the other one is a logistic regression on all words and pairs of words of the
    earlier turns and of the question. Both are fitted on half of the conversations, and measured on the other half.
    """
    rows: dict[str, list[tuple[int, str, str, str]]] = {}
    for number, talk in enumerate(talks):
        for turn, (question, answer) in enumerate(talk):
            if turn:
                earlier = " . ".join(f"{a} {b}" for a, b in talk[:turn])
                row = (number // 2 % 2, f"{earlier} now {question}", talk[turn - 1][1], answer)
                rows.setdefault(kind_of(question, answer), []).append(row)
    results = {}
    for kind, found in rows.items():
        half, texts, before, answers = (np.array(column) for column in zip(*found, strict=True))
        fit, test = half == 0, half == 1
        values, counts = np.unique(answers[fit], return_counts=True)
        usual = values[counts.argmax()]
        after = {}
        for value in np.unique(before[fit]):
            names, numbers = np.unique(answers[fit & (before == value)], return_counts=True)
            after[value] = names[numbers.argmax()]
        by_answer = np.array([after.get(value, usual) for value in before])
        words = CountVectorizer(ngram_range=(1, 2), min_df=5, token_pattern=r"\w+")
        rule = make_pipeline(words, LogisticRegression(C=0.05, max_iter=200))
        by_words = rule.fit(texts[fit], answers[fit]).predict(texts)
        right = max(float((rule_says == answers)[test].mean()) for rule_says in (by_answer, by_words))
        results[kind] = (right, float((usual == answers)[test].mean()), int(test.sum()))
    return results
