"""Print the end of the quickstart: some answers, metrics beside chance and the normal range, and the page to open."""

import os
from pathlib import Path

from clips.common.escape import one_line
from clips.common.files import read_json, read_json_records
from clips.common.page import print_table, table_of
from clips.common.paths import REPOSITORY
from clips.common.plots import pretty
from clips.common.rundir import REPORT, UNSEEN, by_test_set, read_evaluation
from mllm.data.demo import DEMO_DIR, IMAGES
from mllm.data.questions import UNSEEN_ANSWERS

NORMAL = REPOSITORY / "docs" / "results" / "quickstart.json"
"""The file with the usual range of each quickstart's metrics in percent, and with what was measured."""
SHOWN = 3
"""Number of kinds of questions of which the first one is shown."""


def print_summary(what: str = "demo") -> None:
    """Print the end of the quickstart `demo` or `photos`. Both of its runs must have been evaluated."""
    is_demo = what == "demo"
    encoder, model = Path("runs", what), Path("runs", "llava-clips" if is_demo else "llava-photos")
    measured = by_test_set(read_evaluation(encoder / "evaluation.json").get("metrics", {}), "seen")
    style = UNSEEN if UNSEEN in measured else "seen"
    file = f"{UNSEEN_ANSWERS if style == UNSEEN else 'answers'}.jsonl" if is_demo else "*/question.jsonl"
    answers = max((model / "evaluation").glob(file), key=os.path.getmtime)
    answered = by_test_set(read_json(answers.with_name("results.json"))["metrics"], "seen")[style]
    images = (
        f"images in {'an unseen' if style == UNSEEN else 'a known'} drawing style"
        if is_demo
        else "photographs of the test set"
    )
    folder = DEMO_DIR / IMAGES if is_demo else Path("data/photos/test.tar")

    first = {record["kind"]: record for record in reversed(read_json_records(answers))}
    print(one_line(f"Questions about {images}, the first of their kinds:"))
    for kind in list(reversed(first))[:SHOWN]:
        record = first[kind]
        right = "right" if record["correct"] else f"wrong: {record['expected']}"
        print(one_line(f"  {folder / record['image']}"))
        print(one_line(f"    {record['prompt']} – {record['text']} ({right})"))

    normal = read_json(NORMAL).get(what, {"of": "", "ranges": {}})
    retrieved = {name: row for name, row in measured[style].items() if name.endswith(("_r1", "_top1"))}
    rows = []
    for prefix, metrics in (("", retrieved), ("answers: ", answered)):
        for name, row in metrics.items():
            if "chance" not in row:
                continue
            usual = " to ".join(map(str, normal["ranges"].get(name, ())))
            rows.append((prefix + pretty(name), f"{row['value']:.1f}", f"{row['chance']:.1f}", usual))
    print_table(table_of(images, ("metric", "%", "chance %", "normal %"), rows))
    print("For answers, chance is the score of the most frequent answer of each kind.")
    if normal["of"]:
        print(one_line(f"Normal is the range of {normal['of']}, widened by the spread between seeds."))
    if is_demo and style != UNSEEN:
        print("The test in an unseen drawing style is missing, because npm got no drawings (docs/data.md).")
    print(one_line(f"The page with images: {encoder / REPORT}"))
