"""The picture of a comparison: its bars and lines are the report's figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import ROOT
from PIL import Image

from clips.common.errors import UserError
from clips.common.plots import LIGHT
from tools.make_pictures import results_plot, write_results

STORED = ROOT / "docs" / "results" / "compare.json"


def test_bars_and_error_bars_are_the_figures() -> None:
    report = json.loads(STORED.read_text())
    encoders = {name: encoder["metrics"] for name, encoder in report["encoders"].items()}
    axes = results_plot(encoders, report["differences"], LIGHT).axes[0]
    kinds = [label.get_text().partition("\n")[0] for label in axes.get_xticklabels()]
    assert kinds == ["identity", "count", "where", "background", "yes_no", "all questions"]
    bars = axes.patches
    assert len(bars) == len(kinds) * len(encoders)
    for name, drawn in zip(encoders, (bars[i : i + len(kinds)] for i in range(0, len(bars), len(kinds))), strict=True):
        metrics = [f"accuracy/{kind}" for kind in kinds[:-1]] + ["accuracy"]
        wanted = [100 * encoders[name][metric]["mean"] for metric in metrics]
        assert [bar.get_height() for bar in drawn] == pytest.approx(wanted)
    lines = [segment for collection in axes.collections for segment in collection.get_segments()]
    spreads = {round(float(high - low), 4) for (_, low), (_, high) in lines}
    shown = [m for e in encoders.values() for n, m in e.items() if n.startswith("accuracy") and "@" not in n]
    assert spreads == {round(200 * m["sd"], 4) for m in shown}
    told = next(row for row in report["differences"] if row["metric"] == "accuracy")
    points, low, high = (f"{100 * value:+.1f}".replace("-", "−") for value in (told["mean"], *told["ci95"]))
    assert f"{points} [{low}, {high}]" in axes.get_title(loc="left")


def test_the_picture_fits_a_page(tmp_path: Path) -> None:
    out = write_results(STORED, tmp_path / "new" / "results.png")
    assert Image.open(out).width >= 800
    assert out.stat().st_size < 200_000


def test_one_seed_has_no_error_bars(tmp_path: Path) -> None:
    figure = {"accuracy": {"mean": 0.5, "sd": None, "by_seed": [0.5], "items": 10}}
    axes = results_plot({"a": figure, "b": figure}, [], LIGHT).axes[0]
    assert all(low == high for c in axes.collections for (_, low), (_, high) in c.get_segments())


@pytest.mark.parametrize(
    ("content", "name", "words"),
    [
        ("{", "a.png", "no report.json"),
        ("[]", "a.png", "no report.json"),
        ('{"encoders": {"a": {"metrics": {}}}, "differences": []}', "a.png", "answered no questions"),
        ('{"encoders": {}, "differences": []}', "a.jpg", "name it .png or .svg"),
    ],
)
def test_what_cannot_be_drawn_is_refused(tmp_path: Path, content: str, name: str, words: str) -> None:
    report = tmp_path / "report.json"
    report.write_text(content)
    with pytest.raises(UserError, match=words):
        write_results(report, tmp_path / name)
