"""The picture of a comparison: its bars and lines are the report's figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import ROOT
from PIL import Image

from clips.common.errors import UserError
from clips.common.plots import LIGHT
from mllm.evaluation.report import KINDS as KIND_WORDS
from tools.make_pictures import KINDS, Answer, chosen, results_plot, write_results

STORED = ROOT / "docs" / "results" / "compare.json"


def test_bars_and_error_bars_are_the_figures() -> None:
    report = json.loads(STORED.read_text())
    encoders = {name: encoder["metrics"] for name, encoder in report["encoders"].items()}
    axes = results_plot(encoders, LIGHT).axes[0]
    labels = [" ".join(label.get_text().split("\n")[:-1]) for label in axes.get_xticklabels()]
    kinds = ["identity", "count", "where", "relation", "yes_no", "overall"]
    assert labels == [KIND_WORDS[kind] for kind in kinds]
    metrics = [f"accuracy/{kind}" for kind in kinds[:-1]] + ["accuracy"]
    figures = [encoder[metric] for encoder in encoders.values() for metric in metrics]
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([100 * figure["mean"] for figure in figures])
    lines = [segment for collection in axes.collections for segment in collection.get_segments()]
    assert [high - low for (_, low), (_, high) in lines] == pytest.approx([200 * figure["sd"] for figure in figures])


def test_the_picture_fits_a_page(tmp_path: Path) -> None:
    out = write_results(STORED, tmp_path / "new" / "results.png")
    assert Image.open(out).width >= 800
    assert out.stat().st_size < 200_000


def test_shown_answers_are_right_in_every_run_but_the_last() -> None:
    def answers(*right: bool) -> list[Answer]:
        """Two questions of each kind about pictures 0 … 7, and one more about the first picture."""
        asked = [(f"{i}.jpg", kind) for i, kind in enumerate([*KINDS, *KINDS])] + [("0.jpg", KINDS[0])]
        return [Answer(image, kind, "?", "a", "a", ok) for (image, kind), ok in zip(asked, right, strict=True)]

    first = answers(True, True, True, True, False, True, True, True, True)
    second = answers(True, True, False, True, True, True, True, False, True)
    assert [answer.image for answer in chosen([first, second])] == ["0.jpg", "1.jpg", "6.jpg", "3.jpg", "4.jpg"]
    with pytest.raises(UserError, match="different questions"):
        chosen([first, second[1:]])
    with pytest.raises(UserError, match="no question of kind count has a right answer in every run"):
        chosen([answers(*(i % 4 != 2 for i in range(9)))])
