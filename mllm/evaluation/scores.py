"""Score answers: exact match by kind of question, POPE's metrics, CIDEr-D. Also write LLaVA's answer lines."""

import hashlib
import json
import re
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from scipy.stats import binomtest

from mllm.data.questions import Question
from mllm.evaluation.cider import cider

SOURCES = ("scores.py", "cider.py")
"""The files that determine the score of an answer."""


def scorer_version() -> str:
    """Return the SHA-256 of `SOURCES`. Scorers of equal version give equal scores."""
    return hashlib.sha256(b"".join(Path(__file__).with_name(name).read_bytes() for name in SOURCES)).hexdigest()


# ---------------------------------------------------------------------------------------------- metrics
def normalise(text: str) -> str:
    """Return `text` in lower case, with single spaces, without articles and without a full stop at its end.

    Articles alone stay, because "A" may be the letter of a choice, which an empty answer must not match.
    """
    text = text.lower().strip().rstrip(".")
    kept = re.sub(r"\b(a|an|the)\b", " ", text)
    return " ".join(kept.split()) or " ".join(text.split())


def is_right(answer: str, expected: str) -> bool:
    return normalise(answer) == normalise(expected)


Exactness = Literal["exact", "normalised", "prefix", "wrong"]


def exactness(answer: str, expected: str) -> Exactness:
    """Return how literally an answer matches the expected one.

    "normalised" counts as right, but only after `normalise`. "prefix" counts as wrong: the answer begins with the
    expected words and continues, or gives the letter of a choice in another form ("(B)", "B. A fox").
    """
    if answer.strip() == expected.strip():
        return "exact"
    if is_right(answer, expected):
        return "normalised"
    said, wanted = (re.findall(r"\w+", normalise(text)) for text in (answer, expected))
    return "prefix" if wanted and said[: len(wanted)] == wanted else "wrong"


def says_yes(text: str) -> bool:
    """Return False if the first sentence of an answer has the word "no" or "not", else True, as POPE does."""
    return not {"no", "not"} & set(text.lower().split(".")[0].replace(",", "").split())


def yes_no_metrics(answers: Sequence[str], expected: Sequence[bool]) -> dict[str, float]:
    """Return POPE's metrics (Li et al. 2023), where "yes" is the positive class."""
    said = [says_yes(answer) for answer in answers]
    true_positive = sum(s and e for s, e in zip(said, expected, strict=True))
    precision = true_positive / max(1, sum(said))
    recall = true_positive / max(1, sum(expected))
    return {
        "accuracy": sum(s == e for s, e in zip(said, expected, strict=True)) / len(said),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if precision + recall else 0.0,
        "yes_share": sum(said) / len(said),
        "n": len(said),
    }


def exact_match_metrics(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return the accuracy of each kind, and "overall" last, with 95 % Wilson intervals, where the answer is known."""
    scored = [(q.kind, is_right(a, q.answer)) for q, a in zip(questions, answers, strict=True) if q.answer is not None]
    groups = {kind: [right for k, right in scored if k == kind] for kind in dict.fromkeys(kind for kind, _ in scored)}
    groups["overall"] = [right for _, right in scored]
    metrics = {}
    for kind, right in groups.items():
        if right:
            interval = binomtest(sum(right), len(right)).proportion_ci(method="wilson")
            metrics[kind] = {"accuracy": sum(right) / len(right), "low": interval.low, "high": interval.high}
            metrics[kind]["n"] = len(right)
    return metrics


def score(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, Any]:
    """Return all metrics that these questions allow, under the keys `exact_match`, `yes_no` and `cider`."""
    metrics: dict[str, Any] = {}
    exact = exact_match_metrics(questions, answers)
    if exact:
        metrics["exact_match"] = exact
    binary = [
        (a, normalise(q.answer) == "yes")
        for q, a in zip(questions, answers, strict=True)
        if q.answer is not None and normalise(q.answer) in ("yes", "no")
    ]
    if binary:
        metrics["yes_no"] = yes_no_metrics([a for a, _ in binary], [e for _, e in binary])
    described = [(a, q.references) for q, a in zip(questions, answers, strict=True) if q.references]
    if described:
        mean, _ = cider([a for a, _ in described], [r for _, r in described])
        metrics["cider"] = {"cider_d": mean, "n": len(described)}
    return metrics


def answer_line(question: Question, answer: str, model_name: str) -> str:
    """Return a line of JSON in LLaVA's answer format, with `kind`, `expected` and `correct` if the answer is known."""
    line = {"question_id": question.id, "prompt": question.text, "text": answer}
    line |= {"answer_id": uuid.uuid4().hex[:22], "model_id": model_name, "metadata": {}}
    if question.image is not None:
        line["image"] = question.image
    if question.earlier:
        line["earlier"] = question.earlier
    if question.answer is not None:
        line |= {"kind": question.kind, "expected": question.answer, "correct": is_right(answer, question.answer)}
    return json.dumps(line, ensure_ascii=False) + "\n"
