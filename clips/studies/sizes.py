"""Pictures of several aspects at equal tokens: squashed to one square, or taken at sizes of several aspects.

The demo is drawn on three canvases. A size is a quarter of a canvas, and each size has as many patches as the square.
The recipe, its rates, the samples and the order of the data are the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clips.data.demo import IMAGE_SIZE, canvases
from clips.lab.report import Page
from clips.recipes import recipe
from clips.studies.variants import Question, Study, Variant, check_counts, check_settings, seeded_runs
from clips.studies.variants_page import page, seen_by_all

DATA = ("data.demo_dir=data/demo_aspects", "data.demo_aspects=true")
SCALE = IMAGE_SIZE // recipe("demo").phases[0].image_size
SIZES = json.dumps([[side // SCALE for side in canvas] for canvas in canvases(IMAGE_SIZE)])
SEVERAL = (f"phases.*.sizes={SIZES}", f"eval.sizes={SIZES}")
VARIANTS = {
    "squash": Variant("squashed to the square", "demo"),
    "drawn": Variant("sizes in turn, whatever the picture's aspect", "demo", SEVERAL),
    "native": Variant("the size of the picture's own aspect", "demo", (*SEVERAL, "phases.*.by_aspect=true")),
}
QUESTION = Question(
    title="Sizes of several aspects against the square, at equal tokens",
    variants=tuple(VARIANTS),
    contrasts=(("native", "squash"), ("drawn", "squash"), ("native", "drawn")),
    caution="In tests “squashed to the square” meets the squash that it was trained on. The other two take each test "
    "picture at the size of its own aspect, where nothing is stretched.",
)
LIMITS = (
    "A third of the pictures is square, the others are 2.25 times as wide as high or the other way round. The recipe's "
    "rates were tuned for the square. The models are tiny, and drawings are no evidence about photographs."
)


def compare_sizes(
    output: Path, settings: Sequence[str], seeds: int, samples: int, jobs: int, *, dry_run: bool = False
) -> dict[str, Any] | None:
    """Train what is missing, and write sizes.json and sizes.html. `settings`: `--set` of all runs."""
    check_counts(seeds, jobs)
    study = sizes_study(seeds, samples, settings)
    check_settings(study.everything())
    return study.carry_out(output, jobs, sizes_page, dry_run=dry_run)


def sizes_study(seeds: int, samples: int, settings: Sequence[str] = ()) -> Study:
    runs = seeded_runs(VARIANTS, seeds, samples, (*DATA, *settings))
    return Study("sizes", "pictures of several aspects", VARIANTS, runs, {"sizes": QUESTION})


def sizes_page(result: Mapping[str, Any]) -> Page:
    return page(result, "Pictures of several aspects", seen_by_all(result), LIMITS)
