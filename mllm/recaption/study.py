"""The demo study's sets: pictures that no captioner's captions were trained on, captioned by what is trained here.

The last shards of the demo's training pictures are captioned by the newest chatting model and by a CLIPS captioner that
is trained on the shards before them. Their exact captions are the third set. Every step is a command of its own, so
what is there already is not made again.
"""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from clips import Fields, demo_split, ensure_any_demo, open_source
from clips.common.errors import UserError
from clips.common.escape import for_rich
from clips.common.jobs import Commands
from clips.common.rundir import is_finished
from mllm.data.demo import SHOW
from mllm.model.load import newest_model
from mllm.recaption.manifest import Folder
from mllm.recaption.options import DEMO

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
CAPTIONER_SHARE = 1.5
"""Samples that the CLIPS captioner sees, of those that each encoder does."""
CAPTIONER = ("model.captioner.inputs=tokens", "model.captioner.length=80", "model.text.context_length=80")
"""It writes word by word, and the demo's captions fit."""
PROMPT = "prompt.txt"
LONGEST = 96
"""Tokens of a caption of the demo."""
CAPTIONER_RATE = 250
"""Samples per second of the captioner's training; like the next two on two idle cores, to tell the time beforehand."""
MLLM_SECONDS = 0.2
"""A caption of the quickstart's model: SmolLM2-135M, 36 image tokens, some 35 tokens written, a few of them twice."""
CLIPS_SECONDS = 0.01
"""A caption of the CLIPS captioner."""
START_SECONDS = 20
"""Of each command, beside its work."""


@dataclass(frozen=True)
class Step:
    """A command of this project."""

    name: str
    """Of its log below the study's folder."""
    script: str
    flags: list[str]
    work: str
    seconds: float
    """About; 0 where its work is there already."""

    def run(self, log: Path) -> None:
        """To its end, what it prints in `log`. CommandError where it fails."""
        shown = for_rich(f"python scripts/{self.script} {shlex.join(self.flags)}")
        _console().print(f"{shown} → {for_rich(str(log))}", highlight=False, soft_wrap=True)
        commands, command = Commands(1), [sys.executable, str(SCRIPTS / self.script), *self.flags]
        commands.map(lambda _: commands.run(command, log), [None])  # which passes a signal on


@dataclass(frozen=True)
class Study:
    output: Path
    sets: dict[str, str]
    """Name → data of the sets "mllm", "clips" and "exact", once they are made."""
    steps: list[Step]
    notes: list[str]
    """What is to be said of the sets."""

    def show(self, runs: int, samples: int, seconds: float) -> None:
        """Print the whole plan: the steps, and after them so many encoders in so many seconds."""
        table = Table(title=for_rich(f"demo study in {self.output}"), title_justify="left")
        for column in ("step", "command", "work"):
            table.add_column(column, overflow="fold")
        table.add_column("minutes", justify="right")
        for step in self.steps:
            table.add_row(step.name, f"scripts/{step.script}", step.work, f"{step.seconds / 60:.1f}")
        trained = f"{runs} × {samples:,} samples"
        table.add_row("encoders", "scripts/pretrain_clips.py", trained, f"{seconds / 60:.1f}")
        total = seconds + sum(step.seconds for step in self.steps)
        table.caption = f"about {math.ceil(total / 60)} minutes on two idle cores with the quickstart's model"
        _console().print(table)

    def make(self) -> None:
        """Run each step to its end. CommandError where one fails."""
        self.output.mkdir(parents=True, exist_ok=True)
        (self.output / PROMPT).write_text(SHOW[0], encoding="utf-8")  # what the demo's models were asked in training
        for step in self.steps:
            step.run(self.output / f"{step.name}.log")


def plan_study(
    output: Path,
    *,
    samples: int,
    shards: int,
    model_path: str | None = None,
    demo_dir: Path = DEMO,
    settings: Sequence[str] = (),
) -> Study:
    """Which commands make the sets of the last `shards` shards.

    `samples` are those that each encoder sees, `settings` its `--set`; the captioner goes by both. UserError where
    there is no model, or where the demo has no more shards.
    """
    model = model_path or str(newest_model())
    ensure_any_demo(demo_dir)
    files = sorted(Path(demo_split(demo_dir, "train")).glob("*.tar"))
    if not 0 < shards < len(files):
        raise UserError(
            f"--shards {shards}: the demo has {len(files)}, and the CLIPS captioner is trained on the others"
        )
    seen, captioned = (";".join(map(str, part)) for part in (files[:-shards], files[-shards:]))
    pictures, seen_samples = len(open_source(captioned, Fields(), need_long=True)), round(CAPTIONER_SHARE * samples)
    flags = ["--name", "captioner", "--output-dir", str(output), "--data", seen, "--samples", str(seen_samples)]
    flags += ["--set", *settings, *CAPTIONER, "train.eval_every=0", "train.checkpoint_every=0"]
    seconds = 0.0 if is_finished(output / "captioner") else START_SECONDS + seen_samples / CAPTIONER_RATE
    steps = [Step("captioner", "pretrain_clips.py", flags, f"{seen_samples:,} samples", seconds)]
    sets = {}
    for name, captioner, each in (
        ("mllm", f"llava:{model}", MLLM_SECONDS),
        ("clips", f"clips:{output / 'captioner'}", CLIPS_SECONDS),
    ):
        sets[name] = str(output / "sets" / name)
        # All pairs are kept, so that the sets have the same pictures, and bad captions do what harm they do.
        flags = ["--data", captioned, "--output", sets[name], "--captioner", captioner]
        flags += ["--prompt", str(output / PROMPT), "--on-bad", "keep", "--max-new-tokens", str(LONGEST)]
        seconds = 0.0 if Folder(Path(sets[name])).report.is_file() else START_SECONDS + pictures * each
        steps.append(Step(f"set-{name}", "recaption.py", flags, f"{pictures:,} captions", seconds))
    notes = [
        f"mllm: {model}, asked “{SHOW[0]}” without the web caption. If it is the quickstart's, its language model was "
        "trained on other pictures, but the encoder that it sees with on these too.",
        f"clips: the captioner of an encoder that was trained on the other {len(files) - shards} shards "
        f"({seen_samples:,} samples), given the web caption.",
        "exact: the demo's own captions, made from what is in the picture.",
    ]
    return Study(output, sets | {"exact": captioned}, steps, notes)


def _console() -> Console:
    return Console(emoji=False, stderr=True)
