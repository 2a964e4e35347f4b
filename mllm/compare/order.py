"""Whether the order of the encoders holds for another language model, another budget, other pictures.

A condition is one column of questions of one finished comparison. The first is the one that the conclusion was drawn
from: the deciding column of the comparison that is named first. A pair of encoders turns where one condition shows a
win and another a loss; a win beside a tie was not shown twice, but nothing speaks against it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from scipy import stats

from clips.common.errors import UserError
from clips.common.escape import for_rich
from clips.common.files import write_json

ORDER = "order.json"
HOLDS, TURNS, PARTLY, OPEN = "holds", "turns", "shown in part", "never told apart"
Report = dict[str, Any]


def order_of(reports: Sequence[Report]) -> dict[str, Any]:
    """Conditions with their ranking and Kendall's τ to the first; pairs with their verdicts; the conclusion in words.

    Only encoders that every report has count; raises UserError for fewer than two.
    """
    shared = [name for name in reports[0]["encoders"] if all(name in report["encoders"] for report in reports)]
    if len(shared) < 2:
        raise UserError("an order needs two encoders that all the comparisons have, by the same names")
    conditions = [_condition(report, column, shared) for report in reports for column in report["settings"]["columns"]]
    first = [conditions[0]["accuracy"][name] for name in shared]
    for condition in conditions:
        tau = stats.kendalltau(first, [condition["accuracy"][name] for name in shared]).statistic
        condition["tau"] = None if tau != tau else float(tau)  # of encoders that are all equal there is none
    pairs = []
    for a, b in combinations(shared, 2):
        verdicts = [condition["verdicts"][f"{a} − {b}"] for condition in conditions]
        said = set(verdicts)
        holds = TURNS if {"win", "loss"} <= said else OPEN if said == {"tie"} else PARTLY if "tie" in said else HOLDS
        pairs.append({"a": a, "b": b, "verdicts": verdicts, "holds": holds})
    return {"conditions": conditions, "pairs": pairs, "conclusion": _conclusion(conditions, pairs)}


def _condition(report: Report, column: str, names: Sequence[str]) -> dict[str, Any]:
    settings = report["settings"]
    metric = "accuracy" if column == settings["columns"][0] else f"accuracy@{column}"
    accuracy = {n: report["encoders"][n]["metrics"][metric]["mean"] for n in names}
    turned = {"win": "loss", "loss": "win", "tie": "tie"}
    verdicts = {}
    for row in report["differences"]:
        if row["metric"] == metric:
            verdicts[f"{row['a']} − {row['b']}"] = row["verdict"]
            verdicts[f"{row['b']} − {row['a']}"] = turned[row["verdict"]]
    how = settings["stages"]["instruct"]["trains"].get("language_model")
    return {
        "language_model": settings["language_model"] + (f", {how}" if how else ""),
        "budget": settings["budget_share"],
        "column": column,
        "accuracy": accuracy,
        "order": sorted(names, key=lambda name: -accuracy[name]),
        "verdicts": verdicts,
    }


def _conclusion(conditions: list[dict[str, Any]], pairs: list[dict[str, Any]]) -> str:
    differs = [
        words
        for key, words in (("language_model", "language model"), ("budget", "budget"), ("column", "pictures"))
        if len({condition[key] for condition in conditions}) > 1
    ]
    what = " or the ".join(differs) or "run"

    def names(holds: str) -> str:
        return ", ".join(f"{pair['a']} and {pair['b']}" for pair in pairs if pair["holds"] == holds)

    if turned := names(TURNS):
        return f"The conclusion depends on the {what}: {turned} change places beyond their intervals."
    if partly := names(PARTLY):
        return (
            f"No pair changes places with the {what}, but not every difference was shown under every condition: "
            f"{partly} are told apart in some and tie in others."
        )
    if names(HOLDS):
        return f"The conclusion does not depend on the {what}: what is told apart is so, the same way, each time."
    return "No pair of encoders was told apart under any condition: there is no order that could hold."


def read_reports(directories: Sequence[Path]) -> list[Report]:
    """report.json of each; raises UserError for a directory without a finished comparison of this edition."""
    reports = []
    for directory in directories:
        path = directory / "report.json"
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
            settings = report["settings"]
            if not {"columns", "language_model", "budget_share"} <= settings.keys():
                raise KeyError("columns")
            if any("accuracy" not in encoder["metrics"] for encoder in report["encoders"].values()):
                raise KeyError("accuracy")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"--order: {path} is no report of a comparison whose models answered: {error!r}") from None
        reports.append(report)
    return reports


def order_rows(order: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and lines of the table of conditions."""
    names = list(order["conditions"][0]["accuracy"])
    rows = []
    for condition in order["conditions"]:
        right = [f"{100 * condition['accuracy'][name]:.1f}" for name in names]
        tau = "–" if condition["tau"] is None else f"{condition['tau']:.2f}"
        where = [condition["language_model"], f"{condition['budget']:.0%}", condition["column"]]
        rows.append([*where, *right, " > ".join(condition["order"]), tau])
    return ["language model", "budget", "pictures", *names, "order", "Kendall's τ"], rows


def pair_rows(order: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and lines of the table of pairs: the verdict under each condition, in the order of the conditions."""
    rows = [[f"{pair['a']} − {pair['b']}", *pair["verdicts"], pair["holds"]] for pair in order["pairs"]]
    return ["", *(str(number) for number in range(1, len(order["conditions"]) + 1)), ""], rows


def print_order(directories: Sequence[Path], console: Console) -> dict[str, Any]:
    """What `compare_encoders.py --order DIR,DIR` does; order.json goes into the first directory."""
    order = order_of(read_reports(directories))
    for head, rows in (order_rows(order), pair_rows(order)):
        table = Table(*map(for_rich, head))
        for row in rows:
            table.add_row(*map(for_rich, row))
        console.print(table)
    console.print(for_rich(order["conclusion"]), highlight=False, soft_wrap=True)
    write_json(directories[0] / ORDER, order)
    return order
