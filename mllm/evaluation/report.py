"""Write the page of a LLaVA run: twelve images with answers, and the share of right answers by kind beside chance."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np

from clips.common import report
from clips.common.files import read_json, read_json_records
from clips.common.page import Card, thumbnail
from clips.common.rundir import UNSEEN
from mllm.data.questions import LIKELIHOODS, TALKS, UNSEEN_ANSWERS, Question, images_of
from mllm.evaluation.cider import cider
from mllm.evaluation.scores import normalise

if TYPE_CHECKING:  # it imports torch, which the metrics do not need
    from mllm.data.images import ImageStore


def write_answer_report(run_dir: Path, store: ImageStore, evaluation: Path, directory: Path) -> Path:
    """Write the page of a run with the answers in `evaluation` into `directory`, and return its path.

    `store` holds the images of the questions.
    """
    metrics = read_json(evaluation / "results.json")
    path = evaluation / f"{UNSEEN_ANSWERS if UNSEEN_ANSWERS in metrics['sets'] else metrics['test_set']}.jsonl"
    facts = read_json(run_dir / "config.json").get("instruct", {}).get("facts", {})
    words = " · ".join(facts[name] for name in ("vision encoder", "language model") if name in facts)
    cards = _cards(read_json_records(path), store)
    return report.write_report(run_dir, [metrics], cards, facts=words, directory=directory)


def metrics_of(name: str, scored: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the metrics of a set of answers in the form of an encoder's evaluation.json.

    Shares are in percent. Chance is the score of the most frequent answer of each kind.

    Args:
        name: name of the set. Those of the held-out style are called unseen/METRIC, those in talks talks/METRIC.
        scored: result of `score`.
        lines: the answer lines, with or without likelihoods.
    """
    chance = right_by_one_answer([line for line in lines if line.get("expected") is not None])
    metrics: dict[str, dict[str, Any]] = {}
    for kind, row in scored.get("exact_match", {}).items():
        about = {"value": row["accuracy"], "chance": chance[kind] / row["n"], "low": row["low"], "high": row["high"]}
        metrics[kind] = {field: 100 * share for field, share in about.items()} | {"items": row["n"]}
        by_answer: dict[str, list[bool]] = {}
        for line in lines if name == TALKS else ():
            if line["kind"] == kind:
                by_answer.setdefault(normalise(line["expected"]), []).append(line["correct"])
        if set(by_answer) == {"yes", "no"}:
            for answer, right in by_answer.items():
                metrics[f"{kind}_if_{answer}"] = {"value": 100 * fmean(right), "items": len(right)}
    yes_no = dict(scored.get("yes_no", {}))
    items = yes_no.pop("n", 0)
    metrics |= {f"pope_{measure}": {"value": 100 * share, "items": items} for measure, share in yes_no.items()}
    likely = [line for line in lines if "share" in line]
    for kind in dict.fromkeys([*(line["kind"] for line in likely), "overall"]) if likely else ():
        by_kind = [line for line in likely if kind in (line["kind"], "overall")]
        for field in LIKELIHOODS:
            value = fmean(line[field] for line in by_kind) * (100 if field == "share" else 1)
            metrics[f"{field}_{kind}"] = {"value": value, "items": len(by_kind)}
    if "cider" in scored:
        metrics["cider_d"] = {"value": scored["cider"]["cider_d"], "items": scored["cider"]["n"]}
    place = {UNSEEN_ANSWERS: f"{UNSEEN}/", TALKS: f"{TALKS}/"}.get(name, "")
    return {place + name.replace("/", "|"): metric for name, metric in metrics.items()}


def right_by_one_answer(answers: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Return how many answers would be right, by kind and "overall", with the most frequent answer of each kind."""
    truths: dict[str, Counter[str]] = {}
    for line in answers:
        truths.setdefault(line["kind"], Counter())[normalise(line["expected"])] += 1
    right = {kind: max(counts.values()) for kind, counts in truths.items()}
    return right | {"overall": sum(right.values())}


def one_caption(questions: Sequence[Question]) -> dict[str, Any]:
    """Return the CIDEr-D of a single caption for all images, the best of the 50 most frequent references.

    The best one is chosen on a hundred images. A caption that only one image has is not scored on that image, because
    it would be its own reference. The result is empty if there are no references.
    """
    references = [question.references for question in questions if question.references]
    counts = Counter(text for texts in references for text in dict.fromkeys(texts))

    def score(text: str, asked: Sequence[Sequence[str]]) -> float:
        scores = cider([text] * len(asked), asked)[1]
        kept = [value for value, texts in zip(scores, asked, strict=True) if counts[text] > 1 or text not in texts]
        return float(np.mean(kept)) if kept else 0.0

    some = random.Random(0).sample(references, min(100, len(references)))
    tried = {text: score(text, some) for text, _ in counts.most_common(50)}
    if not tried:
        return {}
    best = max(tried, key=tried.__getitem__)
    return {"cider_d_of_one_caption": {"value": score(best, references), "items": len(references), "caption": best}}


def _cards(answers: Sequence[dict[str, Any]], store: ImageStore) -> list[Card]:
    cards: list[Card] = []
    drawn = random.Random(0).sample(answers, len(answers))
    for images, line in {images_of(line): line for line in drawn}.items():
        if not images or len(cards) == report.IMAGES:
            continue
        image = thumbnail(store.load(images[0]), report.SIDE)
        texts = [("answer", line["text"], line.get("correct"))]
        texts += [("truth", line["expected"], None)] if line.get("correct") is False else []
        cards.append(Card(line["prompt"], [image], texts))
    return cards
