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
| kind | blind | random | random − blind |
|---|---|---|---|
| all | {blind: accuracy} | {random: accuracy} | {random − blind: accuracy} |
-->
<!-- /figures -->
"""


def test_the_pages_of_this_repository_hold_the_figures_of_their_files() -> None:
    assert update_pages(check=True) == []


def test_a_file_of_results_is_taken_from_an_archive_that_verifies(place: Path, tmp_path: Path) -> None:
    """From raw answers to a table: the figures in the page are those that were computed again."""
    comparison = finish(comparison_of(place, encoders=("random:clips-run", "blind:clips-run"), seeds=2))
    report = reported(comparison)
    root = tmp_path / "root"
    (root / "docs" / "results").mkdir(parents=True)
    (root / "README.md").write_text("# Readme\n")
    (root / "docs" / "page.md").write_text(PAGE)
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
