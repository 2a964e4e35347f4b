"""The docs' images show what their files say."""

import pytest
from conftest import ROOT

from clips.common.errors import UserError
from clips.common.files import read_json
from tools.make_images import ALL, KINDS, chosen, results_plot


def test_bars_and_lines_of_the_stored_comparison() -> None:
    reports = [read_json(ROOT / "docs" / "results" / f"{name}.json") for name in ("drawings", "drawings-floors")]
    encoders = {name: encoder["metrics"] for report in reports for name, encoder in report["encoders"].items()}
    metrics = [*(f"{ALL}/{kind}" for kind in ("identity", "count", "where", "relation", "yes_no")), ALL]
    chance = dict.fromkeys((*KINDS, "overall"), 0.25)
    (axes,) = results_plot(encoders, chance).axes
    heights = [bar.get_height() for bars in axes.containers if len(bars) == len(metrics) for bar in bars]
    expected = [100 * encoders[name][metric]["mean"] for name in ("clips", "clip") for metric in metrics]
    assert heights == pytest.approx(expected)
    lines = {lines.get_label(): [line[0][1] for line in lines.get_segments()] for lines in axes.collections}
    assert lines["the most frequent answer of each kind"] == [25.0] * len(metrics)
    untrained = [100 * encoders["random"][metric]["mean"] for metric in metrics]
    assert lines["untrained encoder"] == pytest.approx(untrained)


def test_right_answers_of_all_models_and_wrong_ones_in_the_first_model_s_share() -> None:
    def answers(wrong: set[int]) -> list[dict[str, object]]:
        kinds = [kind for kind in KINDS for _ in range(4)]
        return [
            {"image": f"{i}.jpg", "prompt": "?", "kind": kind, "correct": i not in wrong}
            for i, kind in enumerate(kinds)
        ]

    first, second = answers({0, 4, 8, 12, 16, 17}), answers({1, 5})
    shown = chosen([first, second])
    assert [line["image"] for line in shown] == ["2.jpg", "6.jpg", "9.jpg", "13.jpg", "18.jpg", "0.jpg", "4.jpg"]
    assert [line["correct"] for line in shown] == [True] * 5 + [False] * 2  # 14 of 20 are right
    with pytest.raises(UserError, match="different questions"):
        chosen([first, second[:-1]])
    with pytest.raises(UserError, match="no question of kind identity has a right answer"):
        chosen([first, answers({0, 1, 2, 3})])
