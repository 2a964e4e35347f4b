"""The page of a LLaVA run: questions with pictures, and right answers by kind against chance."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clips import BrokenSample
from clips.common.files import read_json, read_json_records, replacing
from clips.common.page import (
    Bar,
    Bars,
    Card,
    Cards,
    Code,
    Folded,
    Page,
    Picture,
    Section,
    as_html,
    thumbnail,
)
from clips.common.rundir import REPORT, UNSEEN
from mllm.data.images import ImageStore
from mllm.data.questions import UNSEEN_ANSWERS, Question, images_of
from mllm.evaluation.cider import cider
from mllm.evaluation.scores import normalise

EXAMPLES, SIDE = 4, 200
"""Questions of each kind on the page, half of them wrong if there are enough; longest side of a picture, pixels."""
KINDS = {
    "identity": "what a thing is called",
    "count": "how many there are",
    "where": "where a thing is",
    "relation": "how two things stand",
    "yes_no": "yes or no",
    "overall": "all questions",
}


def write_report(run_dir: Path, store: ImageStore, own: Path | None = None) -> Path:
    """Write `run_dir`/report/index.html from the run's records and its evaluation; returns its path.

    `store` has the pictures of the questions. `own` is the folder of an evaluation on other questions than the demo's:
    the page goes there.
    """
    evaluation = own or run_dir / "evaluation"
    figures = read_json(evaluation / "figures.json")
    decides = UNSEEN_ANSWERS if UNSEEN in figures else next(iter(figures.get("sets", {})), "answers")
    path = evaluation / f"{decides}.jsonl"
    answers = [line for line in read_json_records(path) if line.get("expected") is not None] if path.is_file() else []
    page_of = own or run_dir
    with replacing(page_of / Path(REPORT).parent) as directory:
        html = as_html(_page(run_dir, store, figures, answers))
        (directory / Path(REPORT).name).write_text(html, encoding="utf-8")
    return page_of / REPORT


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
    commonest = right_by_one_answer(answers)
    return {
        kind: {
            "value": 100 * of_kind["accuracy"],
            "chance": 100 * commonest[kind] / of_kind["n"],
            "items": of_kind["n"],
        }
        for kind, of_kind in figures.get(UNSEEN, figures).get("exact_match", {}).items()
        if kind in commonest
    }


def _page(run_dir: Path, store: ImageStore, figures: dict[str, Any], answers: Sequence[dict[str, Any]]) -> Page:
    measured = _measured(figures, answers)
    config = read_json(run_dir / "config.json")
    facts = config.get("instruct", {}).get("facts", {})
    note = " · ".join(facts[name] for name in ("vision encoder", "language model") if name in facts)

    sections = []
    for kind, figure in measured.items():
        if kind != "overall":
            of_kind = [line for line in answers if line["kind"] == kind]
            about = f"{figure['value']:.0f} % right, chance {figure['chance']:.0f} %."
            title = KINDS.get(kind, kind).capitalize()
            sections.append(Section(title, [Cards(_examples(of_kind, store))], about))

    if measured:
        bars = [
            Bar(
                KINDS.get(kind, kind), figure["value"],
                (f"{figure['value']:.1f}", f"{figure['chance']:.2f}", f"{figure['items']:,}"),
                figure["chance"],
            )
            for kind, figure in measured.items()
        ]  # fmt: skip
        about = "Percent. The line on a bar is chance, the commonest answer of the kind."
        sections.append(Section("Right answers by kind", [Bars(bars, ("", "%", "chance", "items"))], about))

    command = [Code(figures["command"], wraps=True)] if figures.get("command") else []
    settings = Code(json.dumps(config, indent=2, ensure_ascii=False))
    sections.append(Section("Command and configuration", [Folded("How it was run", [*command, settings])]))
    return Page(run_dir.resolve().name, note, sections, sentence=_sentence(figures, measured))


def _sentence(figures: dict[str, Any], measured: dict[str, dict[str, Any]]) -> str:
    if "one_caption" in figures and not measured:
        own, floor = (figures[name]["cider_d"] for name in ("cider", "one_caption"))
        return f"Its descriptions have a CIDEr-D of {own:.2f}. One caption for all images would have {floor:.2f}."
    if "overall" not in measured:
        return "This model has not answered questions yet: python scripts/evaluate_llava.py"
    overall = measured["overall"]
    drawn = " about drawings by an artist whom no training shows" if UNSEEN in figures else ""
    return (
        f"It answers {overall['value']:.0f} of 100 questions right, out of {overall['items']:,}{drawn}. Always giving "
        f"the commonest answer of a kind would have {overall['chance']:.0f}."
    )


def _examples(lines: Sequence[dict[str, Any]], store: ImageStore) -> list[Card]:
    """Some answers with their pictures: right ones, then wrong ones. One of each truth comes first."""
    chosen: list[dict[str, Any]] = []
    for right in (True, False):
        of_kind = [line for line in lines if bool(line["correct"]) is right and line.get("image")]
        first = list({line["expected"]: line for line in reversed(of_kind)}.values())[::-1]
        rest = [line for line in of_kind if line not in first]
        chosen += (first + rest)[: EXAMPLES // 2]
    cards = []
    for line in chosen:
        texts = [("answer", line["text"], line["correct"])]
        texts += [] if line["correct"] else [("truth", line["expected"], None)]
        try:
            picture = Picture(thumbnail(store.load(images_of(line)[0]), SIDE))
        except BrokenSample:  # the demo was made anew since
            continue
        cards.append(Card(line["prompt"], [picture], texts))
    return cards
