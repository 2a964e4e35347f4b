"""Print the end of the quickstart: some answers, metrics beside chance and the normal range, and the page to open."""

import os
from pathlib import Path

from rich.console import Console

from clips.common.escape import for_rich
from clips.common.files import read_json, read_json_records
from clips.common.page import table_of
from clips.common.plots import pretty
from clips.common.rundir import REPORT, UNSEEN, by_test_set
from mllm.data.demo import DEMO_DIR, IMAGES
from mllm.data.questions import UNSEEN_ANSWERS

DEMO_NORMAL = {
    "sentence_i2t_r1": (60, 82),
    "sentence_t2i_r1": (56, 80),
    "zero_shot_top1": (62, 77),
    "linear_probe_top1": (63, 76),
    "overall": (60, 74),
    "identity": (44, 63),
    "count": (72, 92),
    "where": (64, 82),
    "relation": (33, 55),
    "yes_no": (72, 92),
}
"""Metric → its range in percent on the held-out artist's images in the quickstarts of three seeds (docs/results.md),
widened by the spread between seeds."""
PHOTOS_NORMAL = {
    "web_i2t_r1": (18, 30),
    "web_t2i_r1": (19, 31),
    "overall": (76, 84),
    "article_type": (67, 79),
    "base_colour": (62, 74),
    "gender": (83, 92),
    "usage": (84, 94),
    "yes_no": (77, 92),
}
"""Metric → its range in percent on the shop's photographs: three seeds on 7,983 of them (docs/photographs.md), widened
by the spread between seeds."""
SHOWN = ("identity", "where", "article_type", "base_colour", "yes_no")
"""Of each of these kinds the first question is shown."""


def print_summary(what: str = "demo") -> None:
    """Print the end of the quickstart `demo` or `photos`. Both of its runs must have been evaluated."""
    is_demo = what == "demo"
    encoder, model = Path("runs", what), Path("runs", "llava-clips" if is_demo else "llava-photos")
    measured = by_test_set(read_json(encoder / "evaluation.json").get("figures", {}), "seen")
    artists = UNSEEN if UNSEEN in measured else "seen"
    file = f"{UNSEEN_ANSWERS if artists == UNSEEN else 'answers'}.jsonl" if is_demo else "*/question.jsonl"
    answers = sorted((model / "evaluation").glob(file), key=os.path.getmtime)
    records = read_json_records(answers[-1])
    pictures = f"pictures by {artists} artists" if is_demo else "photographs of the test set"
    folder = DEMO_DIR / IMAGES if is_demo else Path("data/photos/test.tar")
    console = Console(emoji=False, highlight=False, soft_wrap=True)
    console.print(f"\nThree questions about {pictures}, the first of their kinds:")
    first = {record["kind"]: record for record in reversed(records)}
    for record in (first[kind] for kind in SHOWN if kind in first):
        right = "right" if record["correct"] else f"wrong: {record['expected']}"
        console.print(for_rich(f"  {folder / record['image']}"))
        console.print(for_rich(f"    {record['prompt']} – {record['text']} ({right})"))
    answered = by_test_set(read_json(answers[-1].with_name("figures.json"))["figures"], "seen")[artists]
    rows = []
    for name, (low, high) in (DEMO_NORMAL if is_demo else PHOTOS_NORMAL).items():
        figure = measured[artists].get(name) or answered.get(name)
        if figure:
            words = pretty(name) if name in measured[artists] else f"answers: {pretty(name)}"
            rows.append((words, f"{figure['value']:.1f}", f"{figure['chance']:.1f}", f"{low} to {high}"))
    console.print()
    console.print(table_of(pictures, ("figure", "%", "chance %", "normal %"), rows))
    console.print("For answers, chance is the score of the most frequent answer of each kind.")
    if not is_demo:
        console.print("Normal is the range of three seeds on 7,983 of the photographs (docs/photographs.md).")
    elif artists != UNSEEN:
        console.print("The test of unseen artists is missing, because npm got no drawings (docs/data.md).")
    console.print(for_rich(f"The page with pictures: {encoder / REPORT}"))
