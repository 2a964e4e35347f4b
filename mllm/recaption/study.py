"""The demo study's sets: pictures that no captioner's captions were trained on, captioned by what is trained here.

The last shards of the demo's training pictures are captioned by the newest chatting model and by a CLIPS captioner that
is trained on the shards before them. Their exact captions are the third set. Every step is a command of its own, so
what is there already is not made again.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from clips import built_as, demo_split, ensure_demo
from clips.common.errors import UserError
from clips.common.escape import for_rich
from clips.common.jobs import Commands
from mllm.data.demo import SHOW
from mllm.model.load import newest_model

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
CAPTIONER_SAMPLES = 48_000
"""That the CLIPS captioner sees."""
CAPTIONER = ("model.captioner.inputs=tokens", "model.captioner.length=80", "model.text.context_length=80")
"""It writes word by word, and the demo's captions fit."""
LONGEST = 96
"""Tokens of a caption of the demo."""


def make_sets(
    output: Path,
    *,
    model_path: str | None = None,
    shards: int = 4,
    demo_dir: Path = Path("data/demo"),
    captioner_flags: Sequence[str] = (),
) -> tuple[dict[str, str], list[str]]:
    """Name → data of the sets "mllm", "clips" and "exact", and what is to be said of them.

    `captioner_flags` are further ones of the CLIPS captioner's pretraining. UserError where there is no model, or where
    the demo has no more than `shards` shards; CommandError where a command fails.
    """
    model = model_path or str(newest_model())
    if built_as(demo_dir) is None:  # whatever scenes are there count, of other sizes too
        ensure_demo(demo_dir)
    files = sorted(Path(demo_split(demo_dir, "train")).glob("*.tar"))
    if not 0 < shards < len(files):
        raise UserError(
            f"--shards {shards}: the demo has {len(files)}, and the CLIPS captioner is trained on the others"
        )
    seen, captioned = (";".join(map(str, part)) for part in (files[:-shards], files[-shards:]))
    output.mkdir(parents=True, exist_ok=True)
    prompt = output / "prompt.txt"
    prompt.write_text(SHOW[0], encoding="utf-8")  # what the demo's models were asked in training
    pretrain = ["--name", "captioner", "--output-dir", str(output), "--data", seen, "--samples", str(CAPTIONER_SAMPLES)]
    pretrain += ["--set", *CAPTIONER, "train.eval_every=0", "train.checkpoint_every=0", *captioner_flags]
    _run("captioner", "pretrain_clips.py", pretrain, output)
    sets = {}
    for name, captioner in (("mllm", f"llava:{model}"), ("clips", f"clips:{output / 'captioner'}")):
        sets[name] = str(output / "sets" / name)
        # All pairs are kept, so that the sets have the same pictures, and bad captions do what harm they do.
        words = ["--data", captioned, "--out", sets[name], "--captioner", captioner, "--prompt", str(prompt)]
        words += ["--on-bad", "keep", "--max-new-tokens", str(LONGEST)]
        _run(f"set-{name}", "recaption.py", words, output)
    notes = [
        f"mllm: {model}, asked “{SHOW[0]}” without the web caption. If it is the quickstart's, its language model was "
        "trained on other pictures, but the encoder that it sees with on these too.",
        f"clips: the captioner of an encoder that was trained on the other {len(files) - shards} shards "
        f"({CAPTIONER_SAMPLES:,} samples), given the web caption.",
        "exact: the demo's own captions, made from what is in the picture.",
    ]
    return sets | {"exact": captioned}, notes


def _run(name: str, script: str, flags: list[str], output: Path) -> None:
    """A command of this project to its end, what it prints in a file of `output`."""
    command = [sys.executable, str(SCRIPTS / script), *flags]
    log = output / f"{name}.log"
    shown = for_rich(f"python scripts/{script} {shlex.join(flags)}")
    Console(emoji=False, stderr=True).print(f"{shown} → {for_rich(str(log))}", highlight=False, soft_wrap=True)
    commands = Commands(1)
    commands.map(lambda _: commands.run(command, log), [None])  # which passes a signal on
