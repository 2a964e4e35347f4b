"""Whether the order of encoders holds: verdicts over conditions, and the sentence that follows from them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from clips.common.errors import UserError
from mllm.compare.order import HOLDS, OPEN, PARTLY, TURNS, order_of, print_order, read_reports


def report(
    accuracy: dict[str, float],
    *,
    model: str = "SmolLM2-135M",
    budget: float = 0.75,
    other: dict[str, float] | None = None,
) -> dict:
    """A report in which differences of 3 points and more are told apart; `other`: of a second sort of pictures."""
    metrics = {"accuracy": accuracy} | ({"accuracy@seen": other} if other else {})
    names, rows = list(accuracy), []
    for metric, values in metrics.items():
        for i, a in enumerate(names):
            for b in names[i + 1 :]:
                gap = values[a] - values[b]
                verdict = "tie" if abs(gap) < 0.03 else "win" if gap > 0 else "loss"
                rows.append({"a": a, "b": b, "metric": metric, "mean": gap, "verdict": verdict})
    return {
        "settings": {
            "language_model": model,
            "stages": {"instruct": {"trains": {"language_model": "lora"}}},
            "budget_share": budget,
            "columns": ["unseen", "seen"][: len(metrics)],
        },
        "encoders": {n: {"metrics": {m: {"mean": v[n]} for m, v in metrics.items()}} for n in names},
        "differences": rows,
    }


def holds(order: dict) -> dict[str, str]:
    return {f"{pair['a']} − {pair['b']}": pair["holds"] for pair in order["pairs"]}


def test_an_order_that_holds_is_said_to() -> None:
    order = order_of([report({"clips": 0.6, "clip": 0.5}), report({"clip": 0.3, "clips": 0.4}, model="SmolLM2-360M")])
    assert holds(order) == {"clips − clip": HOLDS}
    assert [condition["tau"] for condition in order["conditions"]] == [1.0, 1.0]
    assert order["conclusion"].startswith("The conclusion does not depend on the language model")


def test_a_pair_that_changes_places_is_named_with_what_differs() -> None:
    first = report({"clips": 0.6, "clip": 0.5, "random": 0.3}, other={"clips": 0.5, "clip": 0.6, "random": 0.29})
    order = order_of([first, report({"clips": 0.7, "clip": 0.6, "random": 0.3}, budget=0.3)])
    assert holds(order) == {"clips − clip": TURNS, "clips − random": HOLDS, "clip − random": HOLDS}
    assert order["conclusion"].startswith("The conclusion depends on the budget or the pictures: clips and clip change")
    assert [condition["order"][0] for condition in order["conditions"]] == ["clips", "clip", "clips"]
    assert order["conditions"][1]["tau"] == pytest.approx(1 / 3)


def test_what_was_shown_once_is_not_called_shown() -> None:
    order = order_of([report({"clips": 0.6, "clip": 0.5}), report({"clips": 0.51, "clip": 0.5}, budget=0.1)])
    assert holds(order) == {"clips − clip": PARTLY}
    assert "not every difference was shown under every condition: clips and clip" in order["conclusion"]
    never = order_of([report({"clips": 0.51, "clip": 0.5})] * 2)
    assert holds(never) == {"clips − clip": OPEN}
    assert "No pair of encoders was told apart" in never["conclusion"]


def test_the_command_reads_reports_and_leaves_its_table(tmp_path: Path) -> None:
    places = []
    for name, model in (("first", "small"), ("second", "large")):
        place = tmp_path / name
        place.mkdir()
        (place / "report.json").write_text(json.dumps(report({"clips": 0.6, "clip": 0.5}, model=model)))
        places.append(place)
    with (tmp_path / "printed").open("w") as file:
        order = print_order(places, Console(file=file, width=160))
    assert json.loads((places[0] / "order.json").read_text()) == order
    text = (tmp_path / "printed").read_text()
    assert "large, lora" in text
    assert "clips > clip" in text
    with pytest.raises(UserError, match=r"--order: .*nowhere/report\.json is no report"):
        read_reports([tmp_path / "nowhere"])
    with pytest.raises(UserError, match="two encoders that all the comparisons have"):
        order_of([report({"clips": 0.6, "clip": 0.5}), report({"clips": 0.6, "siglip": 0.5})])
