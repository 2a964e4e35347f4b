"""Figures and pictures of the pages come from files under docs/results, these from archives that verify."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_compare import comparison_of, finish, made, place, reported

from clips.common.errors import CommandError
from clips.common.files import sha256
from mllm.compare.verify import pack
from tools.update_docs import take, update_pages

__all__ = ["made", "place"]  # fixtures
PAGE = """# Page

<!-- figures: compare
| kind | blind | clips | clips − blind |
|---|---|---|---|
| all | {blind: accuracy} | {clips: accuracy} | {clips − blind: accuracy} |
| seen artists | | {clips: accuracy@seen} | |
| probe, CLIP | {clip: zero_shot_top1 @pretraining} | | {clips − clip: zero_shot_top1 @pretraining} |
-->
| typed | by | a | hand |
<!-- /figures -->

The rest {stays: as it is}.
"""


def root_with(tmp_path: Path, page: str) -> Path:
    root = tmp_path / "root"
    (root / "docs" / "results").mkdir(parents=True)
    (root / "README.md").write_text("# Readme\n")
    (root / "docs" / "page.md").write_text(page)
    return root


def write_results(root: Path) -> None:
    compare = {
        "encoders": {
            "blind": {"metrics": {"accuracy": {"mean": 0.2341, "sd": None}}, "intrinsic": {}},
            "clips": {
                "metrics": {"accuracy": {"mean": 0.61, "sd": 0.0212}, "accuracy@seen": {"mean": 0.7, "sd": 0.03}},
                "intrinsic": {},
            },
        },
        "differences": [{"a": "clips", "b": "blind", "metric": "accuracy", "mean": 0.3751, "ci95": [-0.01, 0.4]}],
    }
    (root / "docs" / "results" / "compare.json").write_text(json.dumps(compare))
    difference = {"mean": 19.0, "ci95": [-30.04, -2.5]}
    contrast = {"a": "clips", "b": "clip", "metric": "zero_shot_top1", "verdict": "loss"}
    contrast["figures"] = {"zero_shot_top1": difference}
    rates = {"clips": (90.0,), "clip": (70.0, 72.0)}
    variants = {
        name: {"runs": [{"figures": {"zero_shot_top1": rate}} for rate in found]} for name, found in rates.items()
    }
    pretraining = {"questions": {"equal": {"contrasts": [contrast]}}, "variants": variants}
    (root / "docs" / "results" / "pretraining.json").write_text(json.dumps(pretraining))


def test_the_pages_of_this_repository_hold_the_figures_of_their_files() -> None:
    assert update_pages(check=True) == []


def test_a_block_is_filled_and_the_rest_of_the_page_stays(tmp_path: Path) -> None:
    root = root_with(tmp_path, PAGE)
    write_results(root)
    page = root / "docs" / "page.md"
    assert update_pages(check=True, root=root) == [page]
    assert update_pages(check=False, root=root) == [page]
    text = page.read_text()
    assert "| all | 23.4 | 61.0 ± 2.1 | +37.5 [−1.0, +40.0] |\n" in text.partition("-->")[2]
    assert "| seen artists | | 70.0 ± 3.0 | |\n" in text.partition("-->")[2]
    assert "| probe, CLIP | 71.0 ± 1.4 | | **+19.0 [−30.0, −2.5]** |\n" in text.partition("-->")[2]
    assert "typed" not in text
    assert text.partition("-->")[0] == PAGE.partition("-->")[0]
    assert text.endswith("The rest {stays: as it is}.\n")
    assert update_pages(check=True, root=root) == []


def test_a_file_of_results_is_taken_from_an_archive_that_verifies(place: Path, tmp_path: Path) -> None:
    """From raw answers to a table: the figures in the page are those that were computed again."""
    comparison = finish(comparison_of(place, encoders=("random:clips-run", "blind:clips-run"), seeds=2))
    report = reported(comparison)
    root = root_with(tmp_path, PAGE.replace("clips", "random").split("| probe")[0] + "-->\n<!-- /figures -->\n")
    packed = place / "out.tar.xz"
    pack(comparison.output, packed)
    target = take(packed, "compare", root)
    content = json.loads(target.read_text())
    assert content["archive"] == {"file": "out.tar.xz", "bytes": packed.stat().st_size, "sha256": sha256(packed)}
    assert not {"cells", "examples", "files"} & content.keys()
    assert [row["ci95"] for row in content["differences"]] == [row["ci95"] for row in report["differences"]]
    update_pages(check=False, root=root)
    shown = f"{100 * report['encoders']['random']['metrics']['accuracy']['mean']:.1f} ±"
    assert shown in (root / "docs" / "page.md").read_text().partition("-->")[2]

    report["encoders"]["random"]["metrics"]["accuracy"]["mean"] += 0.1
    (comparison.output / "report.json").write_text(json.dumps(report))
    pack(comparison.output, packed)
    with pytest.raises(CommandError, match="is not what its report says"):
        take(packed, "compare", root)
    assert json.loads(target.read_text()) == content
