"""The page of a comparison of encoders, from the content of report.json (mllm/compare/analysis.py)."""

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clips.common.page import Block, Bullets, Card, Cards, Code, Folded, Page, Section, Table, thumbnail
from clips.common.plots import pretty
from clips.common.rundir import UNSEEN
from clips.lab.report import SIGNS, described, forest
from clips.lab.stats import FEWEST_SEEDS, UNDECIDED, show_difference, show_interval, turned
from mllm.compare.analysis import NEEDS_IMAGE, PROBE
from mllm.data.questions import LIKELIHOODS

OWN = (PROBE, "zero_shot_top1", "sentence_i2t_r1", "sentence_t2i_r1", "part_i2t_r1", "part_t2i_r1")
INTRINSIC = (*(f"{UNSEEN}/{name}" for name in OWN), *OWN)
"""The metrics of an encoder itself, in the order in which they are shown."""
THUMBNAIL = 160
FLOORS = {
    "blind": "blind gives the same tokens for every image, so its right answers come from the questions alone.",
    "random": "random is the untrained architecture of the CLIPS encoder, with other weights for each seed.",
}
STATISTICS = (
    "Brackets are 95 % intervals over questions and training runs, not corrected for multiple comparisons. "
    f"“Undecided”: {UNDECIDED} (docs/statistics.md)."
)
INTRINSIC_NOTE = (
    "Percent, mean ± standard deviation over seeds. The linear probe reads the mean of the projector's input tokens. "
    "Retrieval and zero-shot need a text tower."
)
EXAMPLES_NOTE = "From seed 0, drawn at random in both directions: they show how the models differ, not how often."
BENCHMARKS_NOTE = "As lmms-eval reports them. Single answers are not known here, so intervals are over seeds only."
Report = Mapping[str, Any]
Row = dict[str, Any]
METRICS = {"accuracy": "all questions", NEEDS_IMAGE: "not answered blind", "cider_d": "CIDEr-D × 100"}


def page(report: Report, image_folder: Path | None) -> Page:
    """Build the page from report.json. The images of its examples are read from `image_folder`."""
    settings = report["settings"]
    note = f"{len(report['encoders'])} encoders × {settings['llava_runs']} runs · {settings['language_model']}"
    note += f" · {report['time']}" + (" · quick budget" if settings["quick"] else "")

    overall = [row for row in report["differences"] if row["metric"] == "accuracy"]
    examples = _examples(report, image_folder)
    configuration = json.dumps({"settings": settings, "runs": report["runs"]}, indent=2)
    how: list[Block] = [Code(report["command"]), Folded("Settings and every run", [Code(configuration)])]

    cost = {name: encoder["cost"] for name, encoder in report["encoders"].items()}
    parts = list(dict.fromkeys(part for by_part in cost.values() for part in by_part))
    costs = [[name, *(f"{by[part]:,.1f}" if part in by else "–" for part in parts)] for name, by in cost.items()]
    sections = [
        *_decided(report, overall),
        *_benchmarks(report),
        *_encoders(report),
        *([Section("Where two models differ", [Cards(examples)], EXAMPLES_NOTE)] if examples else []),
        Section("Controls", [Bullets(controls(report))]),
        Section("What is not shown", [Bullets(not_shown(report))]),
        Section("Cost", [Table(["encoder", *map(pretty, parts)], costs)], "Seconds, mean over runs, on shared cores."),
        Section("Environment", how, described(report["environment"])),
    ]
    return Page("What the encoder is worth", note, sections)


def _pair(row: Row) -> str:
    return f"{row['a']} − {row['b']}"


# ------------------------------------------------------------------------------------------- what was found
def _decided(report: Report, overall: list[Row]) -> list[Section]:
    """Return the sections on findings, right answers and differences."""
    rows = report["differences"]
    if not rows:
        return []
    deciding = [sentence(row) for row in rows if row["metric"] == report["plan"]["decides"]]
    differences: list[Block] = [forest([(_pair(row), row) for row in overall], 100)] if overall else []
    for name in dict.fromkeys(map(_pair, rows)):
        lines = [
            [metric_name(row["metric"]), difference_text(row), SIGNS[row["verdict"]], f"{row['items']:,}"]
            for row in rows
            if _pair(row) == name
        ]
        differences.append(Folded(name, [Table(["", "difference [95 %]", "verdict", "questions"], lines)]))
    answers = "% right, and CIDEr-D of descriptions: mean ± standard deviation over seeds."
    return [
        Section("What was found", [Bullets(deciding, "big"), Bullets(floors(report))]),
        Section("Answers", [Table(*headline(report))], answers),
        Section("Differences, points", differences, STATISTICS),
    ]


def sentence(row: Row) -> str:
    """Return a difference in words. Its metric may be right answers, their likelihood, or CIDEr-D."""
    a, b = row["a"], row["b"]
    size = difference_text(row | {"mean": abs(row["mean"]), "ci95": None}).removeprefix("+")
    metric = re.split("[/@]", row["metric"])[0]
    unit = {"cider_d": "points of CIDEr-D × 100", "log_likelihood": "nats per token"}.get(metric, "points")
    points = f"{size} {unit} {interval_text(row)}"
    if row["verdict"] == "undecided":
        return f"{a} − {b} is undecided: {difference_text(row)}."
    if row["verdict"] == "tie":
        return f"{a} and {b} tie: the difference of {points} is not significantly different from zero."
    if metric in LIKELIHOODS:
        return f"{a} is {points} {'above' if row['verdict'] == 'win' else 'below'} {b}: {metric_name(row['metric'])}."
    if metric == "cider_d":
        return f"{a} describes {points} {'better' if row['verdict'] == 'win' else 'worse'} than {b}."
    kind = "questions" if row["metric"] == "accuracy" else f"{metric_name(row['metric'])} questions"
    return f"{a} answers {points} {'more' if row['verdict'] == 'win' else 'fewer'} {kind} right than {b}."


def floors(report: Report) -> list[str]:
    """Return a sentence for each encoder that does not beat `blind` or a variant of it."""
    blind = {name for name, encoder in report["encoders"].items() if encoder["kind"] == "blind"}
    below = []
    for row in report["differences"]:
        if row["metric"] == "accuracy" and (row["a"] in blind) != (row["b"] in blind):
            other, floor, decided = row["a"], row["b"], row["verdict"]
            if other in blind:
                other, floor, decided = floor, other, turned(decided)
            if decided in ("tie", "loss"):
                below.append(f"{other} does not beat {floor} beyond the interval, so it was not shown to use images.")
    return below


# ------------------------------------------------------------------------------------------- benchmarks, the encoders
def _benchmarks(report: Report) -> list[Section]:
    encoders = report["encoders"]
    rows = []
    for name in next(iter(encoders.values()))["benchmarks"]:
        metrics = [encoder["benchmarks"][name] for encoder in encoders.values()]
        spreads = ["" if metric["sd"] is None else f" ± {metric['sd']:.2g}" for metric in metrics]
        rows.append([name, *(f"{f['mean']:.4g}{spread}" for f, spread in zip(metrics, spreads, strict=True))])
    if not rows:
        return []
    differences = [
        [f"{_pair(row)}: {row['metric']}", show_difference(row, digits=3)] for row in report["benchmark_differences"]
    ]
    tables = [Table(["lmms-eval", *encoders], rows), Table(["", "difference [95 %]"], differences)]
    return [Section("Benchmarks", tables, BENCHMARKS_NOTE)]


def _encoders(report: Report) -> list[Section]:
    """Return the section on the metrics of the encoders themselves."""
    encoders = {name: encoder["intrinsic"] for name, encoder in report["encoders"].items()}
    chances = {name: metric["chance"] for metrics in encoders.values() for name, metric in metrics.items()}
    names = [name for name in INTRINSIC if name in chances]
    names += [name for name in chances if ": " in name and name.endswith("_r1")]  # other test sets, e.g. COCO
    if not names:
        return []
    head = ["encoder"]
    for name in names:
        test_set, _, plain = name.rpartition("/")
        head.append(("linear probe" if plain == PROBE else pretty(plain)) + (f", {test_set}" if test_set else ""))
    rows = [[encoder, *(percent_text(metrics.get(name)) for name in names)] for encoder, metrics in encoders.items()]
    rows.append(["chance", *(f"{chances[name]:.1f}" for name in names)])
    return [Section("The encoders themselves", [Table(head, rows)], INTRINSIC_NOTE)]


def _examples(report: Report, image_folder: Path | None) -> list[Card]:
    from mllm.data.images import ImageStore  # imports torch, which verifying does not need

    store = ImageStore(image_folder) if image_folder else None
    cards = []
    for example in report["examples"]:
        texts: list[tuple[str, str, bool | None]] = [
            (name, answer, name == example["right"]) for name, answer in example["answers"].items()
        ]
        texts.append(("truth", example["truth"], None))
        name = example["image"]
        images = [thumbnail(store.load(name), THUMBNAIL)] if store and name else []
        cards.append(Card(example["question"], images, texts))
    return cards


# ------------------------------------------------------------------------------------------- controls and limits
def controls(report: Report) -> list[str]:
    """Return sentences on what was equal in all runs, on the encoders `blind` and `random`, and on the fixed plan."""
    settings, encoders = report["settings"], report["encoders"]
    variants = report["plan"]["comparison"].get("variants", ())
    stages = [
        f"{name}: {stage['samples']:,} samples in batches of {stage['batch_size']}, projector {stage['projector']}"
        for name, stage in settings["stages"].items()
    ]
    distinct = settings["distinct_encoders"].items()
    most = max((count for name, count in distinct if encoders[name]["kind"] not in FLOORS), default=1)
    lines = [
        f"Equal in every run of a seed{', except the flags of its variant' * bool(variants)}: "
        f"{settings['language_model']}, data, order, steps, learning rates, initial weights. {'; '.join(stages)}.",
        f"Models are paired by seed and by question: {design_in_words(most, settings['llava_runs'])}.",
    ]
    columns = settings["columns"]
    if len(columns) > 1:
        lines.append(f"Kinds of images: {', '.join(columns)}. {columns[0]} decides.")
    for name, encoder in encoders.items():
        pretraining = [f", pretrained here on {run['samples']:,} samples" for run in encoder["pretraining"][:1]]
        lines.append(f"{name}: {encoder['described']}{''.join(pretraining)}")
    lines += [f"{name}: trained with {shlex.join(flags)}" for name, flags in variants]
    kinds = {encoder["kind"] for encoder in encoders.values()}
    lines += [f"Floor: {text}" for kind, text in FLOORS.items() if kind in kinds]

    fixed, decides = report["fixed"], report["plan"]["decides"]
    what = f"Decided by: {metric_name(decides)}. " if decides else ""
    if fixed["kept"]:
        lines.append(f"{what}The plan was fixed before all runs, and kept: compare.json, SHA-256 {fixed['sha256']}.")
    else:
        differs = "; ".join(fixed["differs"])
        lines.append(f"{what}The plan in compare.json (SHA-256 {fixed['sha256']}) was not kept: {differs}.")
    return lines


def not_shown(report: Report) -> list[str]:
    """Return sentences on the limits of these metrics."""
    settings, encoders = report["settings"], report["encoders"]
    distinct = settings["distinct_encoders"].items() if settings["llava_runs"] > 1 else ()
    alone = [name for name, count in distinct if count == 1 and encoders[name]["kind"] not in FLOORS]
    seeds = min((row["seeds"] for row in report["differences"]), default=settings["llava_runs"])
    points = {
        "The demo's images are drawings, so this is no evidence about photographs.": settings["is_demo"],
        "The test in an unseen drawing style is missing, for want of its drawings. Encoders may differ only because "
        "they remember drawings.": settings["is_demo"] and UNSEEN not in settings["columns"],
        f"All runs of {', '.join(alone)} use one encoder each, so intervals hold for these encoders, not for the "
        "methods that made them (use --seeds, or {seed} in a path).": alone,
        f"{seeds} independent seed(s) show numbers but decide nothing.": seeds < FEWEST_SEEDS,
        "There was one language model, one projector, one set of learning rates for all frozen encoders, and "
        f"{settings['budget_share']:.0%} of the stages' samples. With full training models may differ otherwise.": True,
    }
    return [text for text, holds in points.items() if holds]


# ------------------------------------------------------- in words: one spelling for report, verification and docs
def metric_name(metric: str) -> str:
    """Return a metric in words, with its column, the kind of images, if its name has one."""
    plain, at, column = metric.partition("@")
    name = METRICS.get(plain) or plain.removeprefix("accuracy/").replace("_", " ").replace("/", ", ")
    return f"{name}, {column}" if at else name


def digits_and_scale(metric: str) -> tuple[int, int]:
    """Return digits and scale with which a metric is shown: nats as they are, all others × 100."""
    return (2, 1) if metric.startswith("log_likelihood") else (1, 100)


def difference_text(row: dict[str, Any]) -> str:
    """Return a row's mean difference as a text, in the unit of its metric."""
    return show_difference(row, *digits_and_scale(row["metric"]))


def interval_text(row: dict[str, Any]) -> str:
    """Return a row's 95 % interval as a text, in the unit of its metric."""
    return show_interval(row["ci95"], *digits_and_scale(row["metric"]))


def mean_and_sd(metric: str, value: dict[str, Any] | None) -> str:
    """Return mean and standard deviation of a metric of answers as a text, or "–" if an encoder has none."""
    digits, scale = digits_and_scale(metric)
    if value is None:
        return "–"
    spread = f" ± {scale * value['sd']:.{digits}f}" if value["sd"] is not None else ""
    return f"{scale * value['mean']:.{digits}f}{spread}"


def percent_text(metric: dict[str, Any] | None) -> str:
    """Return a metric of an encoder alone, which is in percent already, as a text, or "–" if it has none."""
    if metric is None:
        return "–"
    # There is no spread if one encoder serves all seeds.
    return f"{metric['mean']:.1f}" + (f" ± {metric['sd']:.1f}" if metric["sd"] else "")


def design_in_words(encoders: int, runs: int) -> str:
    """Return a text that says how many encoders of a kind there are, and how many LLaVA runs use each."""
    if runs % encoders:
        return f"{encoders} encoders of each kind, {runs} LLaVA runs on them in turn"
    each = runs // encoders
    return f"{encoders} encoder{'s' * (encoders > 1)} of each kind, {each} LLaVA run{'s' * (each > 1)} on each"


def headline(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the head and the rows of the table of right answers, encoders × metrics."""
    encoders = {name: encoder["metrics"] for name, encoder in report["encoders"].items()}
    metrics = list(dict.fromkeys(name for measured in encoders.values() for name in measured))
    rows = [[name, *(mean_and_sd(m, measured.get(m)) for m in metrics)] for name, measured in encoders.items()]
    return ["encoder", *map(metric_name, metrics)], rows
