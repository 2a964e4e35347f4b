"""The demo study's sets: pictures that no captioner's captions were trained on, captioned by what is trained here.

The last shards of the demo's training pictures are captioned by the newest chatting model, and by a CLIPS captioner
that is trained on the shards before them. The exact captions of the pictures are the third set.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from clips import Fields, demo_split, ensure_any_demo, open_source
from clips.common.errors import UserError
from clips.common.paths import SCRIPTS
from clips.common.rundir import is_finished
from clips.lab.grid import Cell, Step
from clips.lab.run import Runner
from mllm.data.demo import SHOW
from mllm.model.load import newest_model
from mllm.recaption.manifest import Folder
from mllm.recaption.options import DEMO

CAPTIONER_SHARE = 1.5
"""Samples that the CLIPS captioner sees, as a share of each encoder's samples."""
CAPTIONER = ("model.captioner.inputs=tokens", "model.captioner.length=80", "model.text.context_length=80")
"""The captioner writes word by word, and the demo's captions fit."""
PROMPT = "prompt.txt"
LONGEST = 96
"""Tokens of a caption of the demo."""
CAPTIONER_RATE = 250
"""Assumed samples per second of the captioner's training; like the next two, for two idle cores."""
CAPTION_SECONDS = {"mllm": 0.2, "clips": 0.01}
"""A caption of the quickstart's model (SmolLM2-135M, 36 image tokens), and of the CLIPS captioner."""
START_SECONDS = 20
"""Start-up time of each command."""


@dataclass(frozen=True)
class Study:
    output: Path
    sets: dict[str, str]
    """Name → data of the sets "mllm", "clips" and "exact", once they are made."""
    cells: list[Cell]
    """The commands that make the sets, in order."""
    notes: list[str]
    """Where the sets come from, in sentences."""

    def make(self, *, dry_run: bool = False) -> None:
        """Print the plan and run the commands that are missing, one after the other. CommandError if one fails."""
        runner = Runner(self.cells, 1, Console(emoji=False, stderr=True))
        runner.print_plan(f"demo study in {self.output}: the sets")
        if dry_run:
            return
        self.output.mkdir(parents=True, exist_ok=True)
        (self.output / PROMPT).write_text(SHOW[0], encoding="utf-8")  # what the demo's models were asked in training
        with runner.live():
            runner.run(self.cells)


def plan_study(
    output: Path,
    *,
    samples: int,
    shards: int,
    model: str | None = None,
    demo_dir: Path = DEMO,
    settings: Sequence[str] = (),
) -> Study:
    """The commands that make the sets of the last `shards` shards.

    `samples`: those of each encoder; `settings`: its `--set`. The captioner goes by both. UserError if there is no
    model, or if the demo has no more shards.
    """
    model = model or str(newest_model())
    ensure_any_demo(demo_dir)
    files = sorted(Path(demo_split(demo_dir, "train")).glob("*.tar"))
    if not 0 < shards < len(files):
        raise UserError(
            f"--shards {shards}: the demo has {len(files)}, and the CLIPS captioner is trained on the others"
        )
    seen, captioned = (";".join(map(str, part)) for part in (files[:-shards], files[-shards:]))
    pictures, seen_samples = len(open_source(captioned, Fields(), need_long=True)), round(CAPTIONER_SHARE * samples)
    run = output / "captioner"
    flags = ["--name", run.name, "--output", str(output), "--data", seen, "--samples", str(seen_samples)]
    flags += ["--set", *settings, *CAPTIONER, "train.eval_every=0", "train.checkpoint_every=0"]
    step = Step("training", _command("pretrain_clips.py", flags), lambda: is_finished(run))
    seconds, about = START_SECONDS + seen_samples / CAPTIONER_RATE, f"{seen_samples:,} samples"
    cells = [Cell("captioner", "", run, (step,), seconds=seconds, about=about)]
    sets = {}
    for name, captioner in (("mllm", f"llava:{model}"), ("clips", f"clips:{run}")):
        directory = output / "sets" / name
        sets[name] = str(directory)
        # All pairs are kept, so that the sets have the same pictures, and bad captions do what harm they do.
        flags = ["--data", captioned, "--output", sets[name], "--captioner", captioner]
        flags += ["--prompt", str(output / PROMPT), "--on-bad", "keep", "--max-new-tokens", str(LONGEST)]
        step = Step("captioning", _command("recaption.py", flags), Folder(directory).report.is_file)
        seconds, about = START_SECONDS + pictures * CAPTION_SECONDS[name], f"{pictures:,} captions"
        cells.append(Cell(f"set {name}", "", directory, (step,), seconds=seconds, about=about))
    notes = [
        f"mllm: {model}, asked “{SHOW[0]}” without the web caption. The quickstart's language model was trained on "
        "other pictures, but its encoder on these too.",
        f"clips: the captioner of an encoder that was trained on the other {len(files) - shards} shards "
        f"({seen_samples:,} samples), given the web caption.",
        "exact: the demo's own captions, made from what is in the picture.",
    ]
    return Study(output, sets | {"exact": captioned}, cells, notes)


def _command(script: str, flags: Sequence[str]) -> tuple[str, ...]:
    return (sys.executable, str(SCRIPTS / script), *flags)
