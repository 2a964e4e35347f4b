"""A command of scripts/ while the recipe `demo` is what it was up to f8a790f: python tests/first_demo.py SCRIPT FLAG …

A run is gone on with only as it began, so that old runs of a recipe need the recipe of their time.
"""

from __future__ import annotations

import runpy
import sys
from dataclasses import replace
from pathlib import Path

from clips import recipes
from clips.config import RunConfig

today = recipes.demo


def demo() -> RunConfig:
    run = today()
    model = replace(
        run.model,
        vision=replace(run.model.vision, image_size=64, patch_size=16),
        text=replace(run.model.text, context_length=32, vocab_size=512),
    )
    phase = replace(
        run.phases[0], name="64px", samples=80_000, batch_size=128, lr=1.5e-3, muon_lr=0.02, image_size=64,
        warmup_samples=6_400, schedule="trapezoid",
    )  # fmt: skip
    return replace(run, model=model, optim=replace(run.optim, muon_momentum=0.95), phases=(phase,))


if __name__ == "__main__":
    recipes.demo = recipes.RECIPES["demo"] = demo
    sys.argv = sys.argv[1:]
    runpy.run_path(str(Path(__file__).parent.parent / "scripts" / sys.argv[0]), run_name="__main__")
