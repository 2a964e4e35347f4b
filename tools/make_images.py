#!/usr/bin/env python
"""Draw an image for the docs: `answers` of a model, `results` of a comparison, `curve` of a pretraining run, or `chat`.

`curve` shows loss and validation retrieval. `chat` is the page of scripts/chat.py in a headless Chromium after `--ask`.

`answers` shows, for each kind of question about the held-out style, the first image that every model (one per seed)
answers right, and as many of the first model's wrong answers as its share of right ones asks for. So the images are not
a random choice. The command prints their names.
"""

import importlib.util
import math
import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure as Plot
from PIL import Image

from clips import decode_image
from clips.common.errors import CommandError, UserError, run_command
from clips.common.files import check_target, read_json, read_json_records
from clips.common.flags import Parser
from clips.common.page import save_plot
from clips.common.plots import INK, SERIES, curves_plot, plain_axes
from clips.common.report import curves
from clips.common.runtime import unused_port
from mllm.data.demo import DEMO_DIR, IMAGES, UNSEEN_QUESTIONS
from mllm.data.questions import UNSEEN_ANSWERS
from mllm.evaluation.report import right_by_one_answer

WRONG = "#b3261e"
ANSWER_S = 240
"""Seconds to wait for an answer of the chat page."""
ALL = "accuracy"
"""The metric over all questions; `accuracy/KIND` is the metric of one kind."""
ENCODER_WORDS = {"clips": "CLIPS", "clip": "CLIP", "random": "untrained encoder", "blind": "without images"}
KIND_WORDS = {
    "identity": "what a thing is called",
    "count": "how many there are",
    "where": "where a thing is",
    "relation": "what is beside another thing",
    "yes_no": "yes or no",
    "overall": "all questions",
}
KINDS = ("identity", "where", "count", "relation", "yes_no")
"""Kinds of questions for which a right answer is shown, from left to right."""


def results_plot(encoders: dict[str, dict[str, Any]], chance: dict[str, float]) -> Plot:
    """Draw bars of means ± standard deviations over seeds, in percent, with lines for an untrained encoder and chance.

    `encoders` maps each name to its metrics, and `chance` each kind of question, and "overall", to a share.
    """
    first = next(iter(encoders.values()))
    metrics = [*(name for name in first if name.startswith(f"{ALL}/") and "@" not in name), ALL]
    kinds = [metric.partition("/")[2] or "overall" for metric in metrics]
    plot = Plot(figsize=(8, 3.8), dpi=150, layout="constrained")
    axes = plain_axes(plot, grid="y")
    trained = {name: measured for name, measured in encoders.items() if name not in ("random", "blind")}
    bar = 0.8 / len(trained)
    for i, (name, measured) in enumerate(trained.items()):
        centres = [number + bar * (i - (len(trained) - 1) / 2) for number in range(len(metrics))]
        means = [100 * measured[metric]["mean"] for metric in metrics]
        spreads = [100 * (measured[metric]["sd"] or 0.0) for metric in metrics]
        axes.bar(centres, means, bar * 0.92, label=ENCODER_WORDS.get(name, name), color=SERIES[i % len(SERIES)])
        axes.errorbar(centres, means, spreads, fmt="none", ecolor=INK, elinewidth=1.1, capsize=2.5)
        for centre, mean, spread in zip(centres, means, spreads, strict=True):
            axes.text(centre, mean + spread + 1.5, f"{mean:.0f}", ha="center", fontsize=8.5, color=INK)
    lines = {"the most frequent answer of each kind": [100 * chance[kind] for kind in kinds]}
    for name in ("blind", "random"):
        if name in encoders:
            lines[ENCODER_WORDS[name]] = [100 * encoders[name][metric]["mean"] for metric in metrics]
    for (name, values), style in zip(lines.items(), (":", "-.", "--"), strict=False):
        begins, ends = zip(*((number - 0.42, number + 0.42) for number in range(len(values))), strict=True)
        axes.hlines(values, begins, ends, color=INK, linestyle=style, linewidth=1.4, label=name)
    words = [textwrap.fill(KIND_WORDS.get(kind, kind), 13) for kind in kinds]
    labels = [f"{word}\n({first[metric]['items']:,})" for word, metric in zip(words, metrics, strict=True)]
    axes.set_xticks(range(len(metrics)), labels)
    axes.set_ylim(0, 100)
    axes.set_title("Right answers, %: mean over seeds ± standard deviation", loc="left", fontsize=10.5, color=INK)
    plot.legend(loc="outside lower center", ncols=4, fontsize=9, frameon=False, labelcolor=INK)
    return plot


def chosen(runs: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return for each of KINDS the first question that all runs answer right, then wrong answers of the first run.

    The wrong ones are as many as the share of right answers asks for, of one kind after the other. No image is shown
    twice. Raises UserError if the runs answered different questions, or if a kind has no such one.
    """
    if len({tuple((answer["image"], answer["prompt"]) for answer in run) for run in runs}) != 1:
        raise UserError("--model: the models answered different questions")
    shown: dict[str, dict[str, Any]] = {}  # image → answer
    wrong = round(len(KINDS) * (1 / share_of_right(runs[0]) - 1))
    for kind, is_right in [*((kind, True) for kind in KINDS), *((kind, False) for kind in KINDS[:wrong])]:
        for first, *others in zip(*runs, strict=True):
            is_new = first["kind"] == kind and first["image"] not in shown
            rest = others if is_right else []
            if is_new and all(answer["correct"] == is_right for answer in (first, *rest)):
                shown[first["image"]] = first
                break
        else:
            raise UserError(f"no question of kind {kind} has a {'right' if is_right else 'wrong'} answer in every run")
    return list(shown.values())


def share_of_right(answers: Sequence[dict[str, Any]]) -> float:
    """Return the share of right answers, at least 1 %."""
    return max(0.01, fmean(answer["correct"] for answer in answers))


def answers_plot(shown: Sequence[dict[str, Any]], images: Path, title: str) -> Plot:
    """Draw the images with their questions above and their answers below."""
    rows = math.ceil(len(shown) / 4)
    plot = Plot(figsize=(8.4, 3.1 * rows), dpi=84, layout="constrained")
    plot.suptitle(title, fontsize=10.5, color=INK)
    for place, answer in enumerate(shown, start=1):
        axes = plot.add_subplot(rows, 4, place)
        axes.imshow(decode_image((images / answer["image"]).read_bytes()))
        axes.set_axis_off()
        axes.set_title(textwrap.fill(answer["prompt"], 26), fontsize=9, color=INK)
        below = answer["text"] if answer["correct"] else f"{answer['text']}\ncorrect: {answer['expected']}"
        colour = INK if answer["correct"] else WRONG
        axes.text(0.5, -0.06, below, transform=axes.transAxes, ha="center", va="top", fontsize=10.5, color=colour)
    return plot


def find_chromium() -> str | None:
    """Return the path of an installed Chromium or Chrome, or None."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def chat_page(model: Path, image: Path, questions: Sequence[str], out: Path) -> None:
    """Ask `questions` about `image` on the page of scripts/chat.py, and write a screenshot at twice its size to `out`.

    Raises UserError without Chromium, playwright or the image, and CommandError if an answer is not whole in time.
    """
    browser = find_chromium()
    if not image.is_file():
        raise UserError(f"--image {image}: there is no such file")
    if browser is None or importlib.util.find_spec("playwright") is None:
        raise UserError("chat needs Chromium (apt-get install chromium) and pip install playwright")
    from playwright.sync_api import sync_playwright

    from mllm.chat.web import launch

    port = unused_port()
    launch(str(model), port=port, block=False, device="cpu")
    with sync_playwright() as playwright:
        tab = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"]).new_page(
            viewport={"width": 860, "height": 800}, device_scale_factor=2
        )
        tab.set_default_timeout(1000 * ANSWER_S)
        tab.goto(f"http://127.0.0.1:{port}")
        box = tab.locator("textarea:visible").first
        for number, question in enumerate(questions):
            if number == 0:
                tab.locator("input[type=file]").first.set_input_files(image)
                tab.locator(".thumbnail-item").wait_for()
            box.fill(question)
            box.press("Enter")
            answer, before = tab.locator(".bot.message").nth(number), ""
            answer.wait_for()
            for _ in range(ANSWER_S):
                if before and answer.inner_text() == before:  # it is whole
                    break
                before = answer.inner_text()
                tab.wait_for_timeout(1000)
            else:
                raise CommandError(f"the page has not answered {question!r} after {ANSWER_S} seconds")
        tab.screenshot(path=out)
    shrink(out)


def shrink(out: Path) -> None:
    """Reduce a PNG file in place to 256 colours, so that it stays below the 200 KB of an image in docs/images."""
    if out.suffix == ".png":
        with Image.open(out) as opened:
            opened.convert("RGB").quantize(256).save(out, optimize=True)


def parser() -> Parser:
    p = Parser(__doc__)
    p.add_argument("what", choices=("answers", "results", "curve", "chat"), help="what to draw")
    p.add_argument(
        "--report",
        type=Path,
        nargs="+",
        default=[Path("runs/compare/report.json")],
        help="report.json files for `results`, whose encoders are drawn together",
    )
    p.add_argument(
        "--model", type=Path, nargs="+", default=[Path("runs/llava-clips")], help="runs for `answers`, `chat`"
    )
    p.add_argument("--run", type=Path, default=Path("runs/demo"), help="run for `curve`")
    p.add_argument("--image", type=Path, help="image for `chat` (default: the demo's first test scene)")
    p.add_argument("--ask", nargs="+", default=["What is in the picture?"], help="questions for `chat`")
    p.add_argument("--output", type=Path, help="the PNG or SVG to write (default: runs/WHAT.png)")
    return p


def main() -> None:
    flags = parser().parse_args()
    out = flags.output or Path("runs", f"{flags.what}.png")
    check_target(out.parent)
    if out.suffix not in (".png", ".svg"):
        raise UserError(f"--output {out} must end with .png or .svg")
    if flags.what == "chat":
        chat_page(flags.model[0] / "model", flags.image or DEMO_DIR / IMAGES / "test-000000.jpg", flags.ask, out)
        print(f"written to {out}")
        return
    if flags.what == "answers":
        runs = [read_json_records(model / "evaluation" / f"{UNSEEN_ANSWERS}.jsonl") for model in flags.model]
        shown = chosen(runs)
        for answer in shown:
            print(f"{answer['image']}  {answer['prompt']}  {answer['text']}")
        wrong = sum(not answer["correct"] for answer in shown)
        of_all = f"{share_of_right(runs[0]):.0%} of {len(runs[0]):,} answers are right"
        title = f"{of_all}, so {wrong} of {len(shown)} here are wrong"
        plot = answers_plot(shown, DEMO_DIR / IMAGES, title)
    elif flags.what == "curve":
        plot = curves_plot(curves(flags.run)[:2])  # the loss, and the metrics of validation
    else:
        asked = read_json_records(DEMO_DIR / UNSEEN_QUESTIONS)
        chance = right_by_one_answer([{"kind": line["kind"], "expected": line["answer"]} for line in asked])
        counts = Counter(line["kind"] for line in asked) + Counter(overall=len(asked))
        encoders = chain.from_iterable(read_json(report)["encoders"].items() for report in flags.report)
        metrics = {name: encoder["metrics"] for name, encoder in encoders}
        plot = results_plot(metrics, {kind: right / counts[kind] for kind, right in chance.items()})
    save_plot(plot, out)
    shrink(out)
    print(f"written to {out}")


if __name__ == "__main__":
    sys.exit(run_command(main))
