"""Figures on the card of a saved model: measured after it was written, and on exactly its weights.

MODEL/evaluation.json   whose weights (their SHA-256), and test set → figures (mllm/evaluation/evaluate.py)
MODEL/README.md         its last section shows them
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clips.common.files import read_json, write_atomically, write_json
from clips.common.hub import model_digest
from clips.common.page import Table, render
from mllm.model.load import FACTS

EVALUATION = "evaluation.json"
HEADING = "\n## Figures\n"


SHOWN = ("dtype", "exact_match", "cider")


def add_evaluation(directory: Path, test_set: str, figures: Mapping[str, Any]) -> bool:
    """Have the card of the model in `directory` show `figures`, measured on `test_set`; returns whether it does.

    It does not if the weights have changed since they were measured, or if another program saved them.
    `figures` are what mllm/evaluation/evaluate.py writes to figures.json.
    """
    card, weights = directory / "README.md", figures["weights"]
    if not (directory / FACTS).is_file() or not card.is_file() or model_digest(directory) != weights:
        return False
    text, heading, _ = card.read_text(encoding="utf-8").rpartition(HEADING)
    if not heading:
        return False
    there = read_json(directory / EVALUATION)
    earlier = there.get("test_sets", {}) if there.get("weights") == weights else {}
    measured = {name: figures[name] for name in SHOWN if name in figures}
    write_json(directory / EVALUATION, {"weights": weights, "test_sets": earlier | {test_set: measured}})
    write_atomically(card, text + heading + "\n" + figures_section(directory))
    return True


def figures_section(directory: Path) -> str:
    """Markdown: what was measured on the weights that are in `directory`."""
    there = read_json(directory / EVALUATION)
    of_these = there.get("test_sets", {}) if there and there["weights"] == model_digest(directory) else {}
    shown = {name: (figures["dtype"], _table(figures)) for name, figures in of_these.items()}
    return render("mllm.model", "figures.md.j2", figures=shown)


def _table(figures: Mapping[str, Any]) -> Table:
    rows = [
        (kind, f"{100 * row['accuracy']:.1f}", f"[{100 * row['low']:.1f}, {100 * row['high']:.1f}]", f"{row['n']:,}")
        for kind, row in figures.get("exact_match", {}).items()
    ]
    if "cider" in figures:
        rows.append(("CIDEr-D of descriptions", f"{figures['cider']['cider_d']:.2f}", "", f"{figures['cider']['n']:,}"))
    return Table(("", "right, %", "95 % interval", "questions"), rows)
