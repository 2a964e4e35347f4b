"""What a tower that everything serves costs: the demo with another image tower against the recipe's own.

The recipe, its learning rates and the number of samples stay the same, so a difference is the tower's under a recipe
that was tuned for the other. Every run is an ordinary one of scripts/pretrain_clips.py under `output`/; what is
finished is never run again.
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

from rich.console import Console

from clips.common.errors import UserError
from clips.common.escape import for_rich
from clips.common.files import write_json
from clips.lab.pretraining import PretrainingRun, read_figures, train
from clips.recipes import TOWERS
from clips.studies.equal_time import differences_from, table_of_figures


def compare_towers(output: Path, tower: str, seeds: int, samples: int, jobs: int) -> None:
    """Train what is missing, and write `towers.json` and a table. UserError for an unknown tower."""
    if tower not in TOWERS or not TOWERS[tower]:
        raise UserError(f"--tower {tower!r}: choose one of: {', '.join(name for name in TOWERS if TOWERS[name])}")
    if seeds < 2:
        raise UserError(f"--seeds {seeds}: an interval needs at least 2, and 3 to be of use")
    output.mkdir(parents=True, exist_ok=True)
    console = Console(emoji=False, stderr=True)
    runs = {name: [tower_run(name, seed, samples) for seed in range(seeds)] for name in (tower, "clips")}
    directories = train([run for group in runs.values() for run in group], output, jobs, console)
    groups = {name: [read_figures(directories[run]) for run in group] for name, group in runs.items()}
    differences = differences_from(tower, groups)
    result = {
        "command": shlex.join(["python", *sys.argv]),
        "samples": samples,
        "groups": groups,
        f"{tower}_minus": differences,
    }
    write_json(output / "towers.json", result)
    console.print(table_of_figures(groups, tower, differences))
    console.print(f"written to {for_rich(str(output / 'towers.json'))}")


def tower_run(tower: str, seed: int, samples: int) -> PretrainingRun:
    """The demo recipe with the image tower `tower`."""
    settings = tuple(f"model.vision.{field}={json.dumps(value)}" for field, value in TOWERS[tower].items())
    return PretrainingRun("demo", f"{tower}-seed{seed}", samples, seed, settings)
