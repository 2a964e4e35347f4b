"""What the page of a LLaVA run shows: twelve images with answers, and right answers by kind against chance."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clips import BrokenSample
from clips.common import report
from clips.common.files import read_json, read_json_records
from clips.common.page import Card, Picture, thumbnail
from clips.common.rundir import UNSEEN
from mllm.data.images import ImageStore
from mllm.data.questions import UNSEEN_ANSWERS, Question, images_of
from mllm.evaluation.cider import cider
from mllm.evaluation.scores import normalise


def write_report(run_dir: Path, store: ImageStore, evaluation: Path, directory: Path) -> Path:
    """Write the page of a run with the answers in `evaluation` into `directory`, and return its path.

    `store` has the images of the questions.
    """
    figures = read_json(evaluation / "figures.json")
    decides = UNSEEN_ANSWERS if UNSEEN in figures else next(iter(figures.get("sets", {})), "answers")
    path = evaluation / f"{decides}.jsonl"
    answers = read_json_records(path) if path.is_file() else []
    measured = {"figures": _measured(figures, answers), "test_set": decides}
    facts = read_json(run_dir / "config.json").get("instruct", {}).get("facts", {})
    words = " · ".join(facts[name] for name in ("vision encoder", "language model") if name in facts)
    return report.write_report(run_dir, [measured], _cards(answers, store), facts=words, directory=directory)


def right_by_one_answer(answers: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Kind, and "overall" → right answers of a model that gives each kind's commonest answer."""
    truths: dict[str, Counter[str]] = {}
    for line in answers:
        truths.setdefault(line["kind"], Counter())[normalise(line["expected"])] += 1
    right = {kind: max(counts.values()) for kind, counts in truths.items()}
    return right | {"overall": sum(right.values())}


def one_caption(questions: Sequence[Question]) -> dict[str, Any]:
    """Return `one_caption`: the best of the 50 most frequent references if it described every image, and its CIDEr-D.

    The best is chosen on a hundred images. A caption of a single image is not scored on that image, where it would be
    its own reference. Empty without references.
    """
    references = [question.references for question in questions if question.references]
    counts = Counter(text for texts in references for text in dict.fromkeys(texts))

    def score(text: str, asked: Sequence[Sequence[str]]) -> float:
        scores = cider([text] * len(asked), asked)[1]
        kept = [own for own, texts in zip(scores, asked, strict=True) if counts[text] > 1 or text not in texts]
        return float(np.mean(kept)) if kept else 0.0

    some = random.Random(0).sample(references, min(100, len(references)))
    tried = {text: score(text, some) for text, _ in counts.most_common(50)}
    if not tried:
        return {}
    best = max(tried, key=tried.__getitem__)
    return {"one_caption": {"caption": best, "cider_d": score(best, references)}}


def _measured(figures: dict[str, Any], answers: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Kind → value and chance (its commonest answer) in percent, and items, of the questions that decide."""
    figures = figures.get(UNSEEN, figures)
    commonest = right_by_one_answer([line for line in answers if line.get("expected") is not None])
    measured = {
        kind: {"value": 100 * row["accuracy"], "chance": 100 * commonest[kind] / row["n"], "items": row["n"]}
        for kind, row in figures.get("exact_match", {}).items()
        if kind in commonest
    }
    if "one_caption" in figures:
        value, chance = (figures[name]["cider_d"] for name in ("cider", "one_caption"))
        measured["CIDEr-D"] = {"value": value, "chance": chance, "items": figures["cider"]["n"]}
    return measured


def _cards(answers: Sequence[dict[str, Any]], store: ImageStore) -> list[Card]:
    cards: list[Card] = []
    drawn = random.Random(0).sample(answers, len(answers))
    for images, line in {images_of(line): line for line in drawn}.items():
        if not images or len(cards) == report.IMAGES:
            continue
        try:
            picture = Picture(thumbnail(store.load(images[0]), report.SIDE))
        except BrokenSample:  # the demo was made anew since
            continue
        texts = [("answer", line["text"], line.get("correct"))]
        texts += [("truth", line["expected"], None)] if line.get("correct") is False else []
        cards.append(Card(line["prompt"], [picture], texts))
    return cards
