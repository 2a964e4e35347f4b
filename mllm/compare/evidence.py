"""How far the figures of a comparison can be trusted, as tables and words: the parts of the report about it.

What spreads, what it would take to see less, whether the intervals keep their promise, whether the order holds, and
which questions and answers say little.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from clips.common.escape import clip
from clips.common.page import Table
from mllm.compare.calibration import GAPS, calibration_sentences
from mllm.compare.order import order_rows
from mllm.compare.variance import ANSWERS, TOGETHER
from mllm.compare.words import counts_right_answers, metric_name, overall_rows, pair_name

Report = dict[str, Any]
ORDER = {"LLaVA seed": 1, "question": 1}
"""Finer levels, behind the coarser ones."""
VARIANCE_NOTE = (
    "Where a figure's uncertainty comes from: its standard error in points, and the part of its variance that each "
    "source gives, in percent, as many seeds and pictures as there are here being averaged. “Single answers” is what a "
    "seed does to one picture or question. A spread of few seeds is itself known badly: of five, to a factor between "
    "0.6 and 2.9. Seeds whose effects cannot be told apart stand in one column."
)
NEEDED_NOTE = (
    "How many of each show a difference of 1, 2 or 5 points over all questions in four of five comparisons: of one "
    "source alone, all else as it is here, and of seeds and pictures together, both grown by one factor. More pictures "
    "bring as many questions each as now. – where it alone cannot."
)
CALIBRATION_NOTE = (
    "Differences that are none, and some of a known size. Observed: an encoder's answers against those of the same "
    "encoder with other seeds, half of the pictures at a time; a gap is put in by turning that share of wrong answers "
    "right. Simulated: as spread as the two encoders' difference, and as large as this comparison. “False” should be "
    "5 %, and 3 to 7 are called so; compare_encoders.py --calibrate makes the same tables."
)
BLIND_NOTE = (
    "Questions that blind models answer right in more than half of their runs. “Not answered blind” above is without "
    "them. Where there are few answers that leaves out whole ones, as all yes of yes/no for models that always say "
    "yes: then look at the kind by itself."
)
ORDER_NOTE = (
    "The encoders by right answers over all questions, for each sort of pictures. Other language models and budgets "
    "are comparisons of their own: compare_encoders.py --order sets them beside each other."
)
LOOSE_NOTE = (
    "An answer counts as right when it is the expected one but for case, articles and the full stop at the end. "
    "Normalised: right, but only so. Prefix: counted wrong, but it begins with the expected words or letter and goes "
    "on. Where either is frequent, the scorer decides with."
)


def evidence(report: Report) -> list[dict[str, Any]]:
    """Sections of tables with a note, and lines before them, in the order of the report."""
    calibration, order = report.get("calibration"), report.get("order")
    parts = [
        ("Where the uncertainty comes from", VARIANCE_NOTE, variance_table(report), []),
        ("How many are needed", NEEDED_NOTE, needed_table(report), []),
        (
            "Does the interval keep its promise?",
            CALIBRATION_NOTE,
            calibration_table(report),
            calibration_sentences(calibration) if calibration else [],
        ),
        (
            "Does the order hold?",
            ORDER_NOTE,
            Table(*order_rows(order)) if order else None,
            order and [order["conclusion"]],
        ),
        ("Questions that need no picture", BLIND_NOTE, blind_table(report), []),
        ("Answers that are nearly right", LOOSE_NOTE, loose_table(report), []),
    ]
    return [{"title": t, "note": n, "table": table, "lines": lines} for t, n, table, lines in parts if table]


def variance_table(report: Report) -> Table | None:
    """Of every encoder's figures in the deciding column, and of every difference over all questions."""
    figures = [
        (f"{name}: {metric_name(metric)}", figure["variance"])
        for name, encoder in report["encoders"].items()
        for metric, figure in encoder["metrics"].items()
        if counts_right_answers(metric)
    ]
    figures += [(pair_name(row), row["variance"]) for row in overall_rows(report)]
    sources = _in_order(name for _, variance in figures for name in variance)
    rows = []
    for name, variance in figures:
        if (total := sum(variance.values())) > 0:
            shares = [f"{100 * variance[source] / total:.0f}" if source in variance else "–" for source in sources]
            rows.append([name, f"{100 * total**0.5:.2f}", *shares])
    return Table(["", "standard error", *sources], rows) if rows else None


def _in_order(sources: Iterable[str]) -> list[str]:
    """Names of sources of variance, seeds before pictures before single answers."""
    found = set(sources)
    return sorted(found, key=lambda name: (name == ANSWERS, "seed" not in name, " and " in name, ORDER.get(name, 0)))


def needed_table(report: Report) -> Table | None:
    rows = overall_rows(report)
    levels = _in_order(
        name for row in rows for found in row["needed"].values() for name in found if not name.endswith(TOGETHER)
    )
    lines = []
    for row in rows:
        for points, found in row["needed"].items():
            alone = [_count(found.get(level)) for level in levels]
            both = [_count(number) for name, number in found.items() if name.endswith(TOGETHER)]
            lines.append([pair_name(row), points, *alone, " × ".join(both) or "–"])
    return (
        Table(["", "points", *(f"{level}s" for level in levels), "seeds × pictures together"], lines) if lines else None
    )


def _count(number: int | None) -> str:
    return "–" if number is None else f"{number:,}"


def calibration_table(report: Report) -> Table | None:
    found = report.get("calibration", {})
    rows = [
        [
            f"{row['about']}, {way}",
            str(row["seeds"]),
            f"{row['pictures']:,}",
            f"{100 * row['false']:.1f}",
            *("–" if share is None else f"{100 * share:.0f}" for share in row["power"].values()),
        ]
        for way, of_way in found.items()
        for row in of_way
    ]
    gaps = [f"wins at {100 * gap:g} points, %" for gap in GAPS]
    return Table(["", "seeds", "pictures", "false, %", *gaps], rows) if rows else None


def blind_table(report: Report) -> Table | None:
    kinds = report.get("blind_questions", {}).get("kinds", {})
    rows = [
        [kind, f"{found['solved']:,} of {found['questions']:,}", _most_common(found["answers"])]
        for kind, found in kinds.items()
    ]
    return Table(["kind", "answered blind", "their answers"], rows) if rows else None


def _most_common(answers: dict[str, int]) -> str:
    shown = [f"{answer} ({times})" for answer, times in list(answers.items())[:5]]
    return ", ".join(shown) + (", …" if len(answers) > 5 else "") or "–"


def loose_table(report: Report) -> Table | None:
    rows = []
    for name, found in report.get("loose_answers", {}).items():
        for way in ("normalised", "prefix"):
            examples = [f"{one['text']} ({one['expected']}) × {one['times']}" for one in found[way]["examples"]]
            if examples:
                of_all = f"{found[way]['count']:,} of {found['answers']:,}"
                rows.append([f"{name}, {way}", of_all, "; ".join(clip(one, 80) for one in examples)])
    return Table(["", "answers", "most frequent: said (expected) × times"], rows) if rows else None
