"""What an image tower that everything serves costs: the demo with another image tower against the recipe's own.

The recipe, its learning rates and the number of samples stay the same, so a difference is the tower's difference under
a recipe that was tuned for the recipe's own tower.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clips.common.errors import UserError
from clips.lab.report import Page
from clips.recipes import TOWERS
from clips.studies.variants import Question, Study, Variant, check_counts, seeded_runs
from clips.studies.variants_page import page, seen_by_all

LIMITS = "The recipe and its rates were tuned for its own tower, and the models are tiny."


def compare_towers(
    output: Path, tower: str, seeds: int, samples: int, jobs: int, *, dry_run: bool = False
) -> dict[str, Any] | None:
    """Train what is missing, and write towers.json and towers.html. UserError for an unknown tower."""
    check_counts(seeds, jobs)
    return towers_study(tower, seeds, samples).carry_out(output, jobs, towers_page, dry_run=dry_run)


def towers_study(tower: str, seeds: int, samples: int) -> Study:
    """The demo recipe with `tower` and with its own tower."""
    if not TOWERS.get(tower):
        raise UserError(f"--tower {tower!r}: choose one of: {', '.join(name for name in TOWERS if TOWERS[name])}")
    settings = {
        name: tuple(f"model.vision.{field}={json.dumps(value)}" for field, value in TOWERS[name].items())
        for name in (tower, "clips")
    }
    variants = {name: Variant(f"tower {name}", "demo", own) for name, own in settings.items()}
    question = Question(f"The tower {tower} against the recipe's own", (tower, "clips"), ((tower, "clips"),))
    return Study("towers", "image towers", variants, seeded_runs(variants, seeds, samples), {"towers": question})


def towers_page(result: Mapping[str, Any]) -> Page:
    return page(result, "Image towers", seen_by_all(result), LIMITS)
