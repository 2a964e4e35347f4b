"""What an encoder is worth: the same LLaVA-style model on each encoder, several seeds, the same questions.

1. Encoders trained here that are missing are pretrained: `clips` with the recipe demo, `clip` with clip_baseline on
   the same data, for the same samples and steps.
2. A cell is one encoder and one seed: stage 1, stage 2 and the evaluation, as ordinary runs of the scripts. Cells of
   one seed share the start of the adapters, the order of the samples and every other setting; the projector starts in
   the same way (on the demo: fitted in closed form to the captions, on each encoder's own features).
3. mllm/compare_figures.py turns what the cells left into figures, mllm/compare_report.py those into the report.

    OUTPUT/encoders/clips-seed0/    a pretraining run       OUTPUT/cells/random-seed2/    a cell, as mllm/train.py
    OUTPUT/cells/random-seed2.log   what it printed         OUTPUT/report.{json,md,html}

A finished cell is never run again, one that was cut goes on from its last checkpoint, and one with other settings
than those asked for is refused. A cell is locked while a process works on it, also by a child that outlived a killed
comparison.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import math
import os
import re
import runpy
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.live import Live
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from clips.checkpoint import write_atomically
from clips.cli import config_from_flags
from clips.compare import Commands, locked
from clips.config import RunConfig
from clips.config import difference as differing_fields
from clips.engine import choose_device
from clips.errors import UserError
from clips.finish import is_finished
from clips.testsets import KarpathySet
from mllm import arguments as train_arguments
from mllm.arguments import TrainArguments, flags_of_stage, parse_train_arguments
from mllm.data import read_json_records
from mllm.demo import DESCRIPTIONS, IMAGES, QUESTIONS, ensure_llava_demo
from mllm.evaluate import answer_dtype, open_questions
from mllm.run_log import read_json
from mllm.stages import STAGES
from mllm.train import DEMO_DIR, data_of, encoder_of
from mllm.vision import parse_vision_name

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
RECIPES = {"clips": "demo", "clip": "clip_baseline"}
"""Encoders that are pretrained where they are missing."""

DEMO_SHARE, QUICK_SHARE = 0.75, 0.15
"""Share of each stage's samples that a cell trains: of the demo's, and with --quick. Other data: all of them."""
QUICK_LIMIT = 400
"""Questions of each file with --quick, where --limit does not say."""

ASSUMED = {"align": 8.0, "instruct": 4.3, "evaluation": 16.0}
"""Samples and questions per second of one core on the demo: the time estimate as long as no cell has been measured."""
ASSUMED_PRETRAINING_S = 200.0
"""Seconds of one core for one pretraining run of the demo."""


@dataclass(frozen=True)
class Cell:
    encoder: str
    """Its name in the report."""
    vision: str
    """What train_llava.py loads."""
    seed: int
    directory: Path

    @property
    def name(self) -> str:
        return self.directory.name

    @property
    def log(self) -> Path:
        return self.directory.parent / f"{self.name}.log"

    @property
    def figures(self) -> Path:
        return self.directory / "evaluation" / "figures.json"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What was asked for. Equal plans give equal cells."""

    encoders: tuple[str, ...]
    seeds: int = 3
    output: Path = Path("runs/compare")
    jobs: int = 1
    quick: bool = False
    budget: float | None = None
    """Share of each stage's samples that a cell trains; None: as DEMO_SHARE and QUICK_SHARE say."""
    pretraining_seeds: int | None = None
    """Encoders pretrained of each kind, cells take them in turn; None: one for each seed, with --quick one."""
    train_flags: tuple[str, ...] = ()
    pretrain_flags: tuple[str, ...] = ()
    device: str = "auto"
    gpus: int = 1
    question_file: Path | None = None
    question_images: Path | None = None
    limit: int | None = None
    benchmarks: tuple[str, ...] = ()
    karpathy: Path | None = None
    image_root: Path | None = None

    def __post_init__(self) -> None:
        if self.seeds < 1 or self.jobs < 1 or self.gpus < 1:
            raise UserError("--seeds, --jobs and --gpus must be at least 1")
        if self.budget is not None and not 0 < self.budget <= 1:
            raise UserError(f"--budget {self.budget:g} must be above 0 and at most 1")
        if self.pretraining_seeds is not None and not 1 <= self.pretraining_seeds <= self.seeds:
            raise UserError(f"--pretraining-seeds {self.pretraining_seeds} must be between 1 and --seeds {self.seeds}")
        names = [_slug(encoder) for encoder in self.encoders]
        if len(self.encoders) < 2 or len(set(names)) < len(names):
            raise UserError(f"--encoders {','.join(self.encoders)}: give at least two different ones")
        if self.jobs > 1 and self.gpus > 1:
            raise UserError(
                f"--jobs {self.jobs} with --gpus {self.gpus}: the cells would share GPUs; choose one of them"
            )
        for option, given, own in (
            ("--train-flags", self.given_for_training, ("stage", "seed", "vision_tower", "output_dir", "device")),
            ("--pretrain-flags", self.given_for_pretraining, ("recipe", "seed", "name", "output_dir", "device")),
        ):
            if taken := [name for name in own if name in given]:
                raise UserError(f"{option}: --{taken[0]} is what the comparison itself sets; leave it out")
        kinds = [parse_vision_name(encoder)[0] for encoder in self.encoders]
        if self.karpathy is not None and not set(kinds) & set(RECIPES):
            raise UserError("--karpathy measures encoders with a text tower that were trained here: name clips or clip")
        if self.question_file is None and not self.is_demo and not self.benchmarks:
            raise UserError(
                "the models are trained on other data than the demo's, so the demo's questions say nothing about them: "
                "give --question-file (and --question-images), or --benchmarks"
            )
        if self.benchmarks and importlib.util.find_spec("lmms_eval") is None:
            raise UserError("--benchmarks needs lmms-eval, which is not installed: pip install lmms-eval")

    @cached_property
    def given_for_training(self) -> set[str]:
        """Names of the fields that `train_flags` give, for either stage and in any spelling."""
        words = [flags_of_stage(list(self.train_flags), stage.name) for stage in STAGES.values()]
        return set().union(*(_given(train_arguments.parser(), stage_words) for stage_words in words))

    @cached_property
    def given_for_pretraining(self) -> set[str]:
        return _given(_pretraining_parser(), self.pretrain_flags)

    @property
    def is_demo(self) -> bool:
        """Whether the cells train on the demo data."""
        return "data_path" not in self.given_for_training

    @property
    def asks(self) -> bool:
        """Whether the cells answer questions (not only benchmarks)."""
        return self.is_demo or self.question_file is not None

    @property
    def kinds_pretrained(self) -> int:
        return self.pretraining_seeds or (1 if self.quick else self.seeds)

    @property
    def share(self) -> float:
        """Of each stage's samples, for every cell."""
        return self.budget or (QUICK_SHARE if self.quick else DEMO_SHARE if self.is_demo else 1.0)

    @property
    def questions(self) -> int | None:
        """Of each file, for every cell; None: all."""
        return self.limit or (QUICK_LIMIT if self.quick else None)

    @property
    def cells(self) -> list[Cell]:
        """Seed by seed, so that whole comparisons are there early."""
        return [
            Cell(name, self.vision(encoder, seed), seed, self.output / "cells" / f"{_slug(encoder)}-seed{seed}")
            for seed in range(self.seeds)
            for name, encoder in zip(self.names, self.encoders, strict=True)
        ]

    @property
    def names(self) -> list[str]:
        """What the report calls the encoders: by their kind, where there is one of that kind."""
        kinds = [encoder.partition(":")[0] for encoder in self.encoders]
        return [k if kinds.count(k) == 1 else e for k, e in zip(kinds, self.encoders, strict=True)]

    def vision(self, encoder: str, seed: int) -> str:
        """The name that mllm/vision.py resolves; `{seed}` in a given directory stands for the cell's seed."""
        kind, _, argument = encoder.partition(":")
        if kind in RECIPES and not argument:
            argument = str(self.pretrained(kind, seed))
        elif kind in ("random", "blind") and not argument:  # the architecture of the CLIPS encoder beside them
            given = next((name for name in self.encoders if name.partition(":")[0] == "clips"), "clips")
            argument = self.vision(given, seed).partition(":")[2]
        return f"{kind}:{argument}".replace("{seed}", str(seed)) if argument else kind

    def pretrained(self, kind: str, seed: int) -> Path:
        return self.output / "encoders" / f"{kind}-seed{seed % self.kinds_pretrained}"

    @property
    def pretraining(self) -> dict[Path, tuple[str, int]]:
        """Run directory → (kind, seed) of every encoder that the cells need from here."""
        needed = {cell.vision.partition(":")[2] for cell in self.cells}
        return {
            path: (kind, seed)
            for kind in RECIPES
            for seed in range(self.kinds_pretrained)
            if str(path := self.pretrained(kind, seed)) in needed
        }

    # ---------------------------------------------------------------------------------------- commands of a cell

    def flags(self, cell: Cell, stage: int) -> list[str]:
        """The flags of train_llava.py for one stage of a cell."""
        flags = ["--stage", str(stage), "--vision", cell.vision, "--seed", str(cell.seed)]
        flags += ["--output_dir", str(cell.directory), "--device", self.device, *self.train_flags]
        if self.share < 1:
            full = parse_train_arguments(flags).resolve(self.gpus)
            name = STAGES[stage].name
            if full.max_steps > 0:
                flags += [f"--{name}.max_steps", str(max(1, round(self.share * full.max_steps)))]
            else:
                flags += [f"--{name}.num_train_epochs", f"{self.share * full.num_train_epochs:g}"]
        return flags

    def arguments(self, cell: Cell, stage: int) -> TrainArguments:
        """The same as the run itself will read them; raises UserError for flags that it would refuse."""
        return parse_train_arguments(self.flags(cell, stage)).resolve(self.gpus)

    def train_command(self, cell: Cell, stage: int) -> list[str]:
        launcher = [sys.executable]
        if self.gpus > 1:
            launcher += ["-m", "deepspeed.launcher.runner", "--num_gpus", str(self.gpus)]
        return [*launcher, str(SCRIPTS / "train_llava.py"), *self.flags(cell, stage)]

    def evaluation_command(self, cell: Cell) -> list[str]:
        command = [sys.executable, str(SCRIPTS / "evaluate_llava.py"), "--model-path", str(cell.directory / "model")]
        command += ["--out", str(cell.figures.parent), "--device", self.device]
        command += ["--question-file", str(self.question_file)] if self.question_file else []
        command += ["--image-folder", str(self.question_images)] if self.question_images else []
        return command + (["--limit", str(self.questions)] if self.questions else [])

    def benchmark_command(self, cell: Cell) -> list[str]:
        """lmms-eval on the saved model, which is a stock transformers one: the tasks that have no results yet."""
        tasks = [task for task in self.benchmarks if task not in benchmarks_done(cell)]
        command = [sys.executable, "-m", "lmms_eval", "--model", "llava_hf", "--batch_size", "1"]
        command += ["--model_args", f"pretrained={cell.directory / 'model'}", "--tasks", ",".join(tasks)]
        return [*command, "--output_path", str(cell.directory / "benchmarks")]

    def pretrain_command(self, run: Path, kind: str, seed: int) -> list[str]:
        command = [sys.executable, str(SCRIPTS / "pretrain_clips.py"), "--recipe", RECIPES[kind], "--name", run.name]
        command += ["--output-dir", str(run.parent), "--seed", str(seed), "--device", self.device]
        return [*command, *self.pretrain_flags]

    def pretraining_config(self, run: Path, kind: str, seed: int) -> RunConfig:
        """What `pretrain_command` makes of its flags; raises UserError for what it would refuse."""
        _, _, *flags = self.pretrain_command(run, kind, seed)
        return config_from_flags(_pretraining_parser().parse_args(flags))

    def retrieval_command(self, run: Path) -> list[str]:
        command = [sys.executable, str(SCRIPTS / "evaluate_clips.py"), "--model", str(run), "--device", self.device]
        command += ["--karpathy", str(self.karpathy), "--image-root", str(self.image_root or self.karpathy.parent)]
        return [*command, "--out", str(run / f"evaluation-{self.karpathy.stem}.json")]

    # ---------------------------------------------------------------------------------------- what is asked

    @property
    def question_files(self) -> tuple[list[Path], Path | None]:
        """Files and folder of pictures that the cells are asked about."""
        if self.question_file is not None:
            return [self.question_file], self.question_images
        demo = ensure_llava_demo(DEMO_DIR)
        return [demo / QUESTIONS, demo / DESCRIPTIONS], demo / IMAGES

    @cached_property
    def evaluation(self) -> dict[str, Any]:
        """What decides which questions a cell answers."""
        dtype = answer_dtype("auto", choose_device(self.device))
        content = {}
        if self.question_file is not None:
            content = {"sha256": hashlib.sha256(self.question_file.read_bytes()).hexdigest()}
        questions = self.question_file.name if self.question_file else "the demo's"
        return {"questions": questions, "limit": self.questions, "dtype": str(dtype).removeprefix("torch.")} | content


def _pretraining_parser() -> argparse.ArgumentParser:
    return runpy.run_path(str(SCRIPTS / "pretrain_clips.py"))["parser"]()


def _given(parser: argparse.ArgumentParser, words: Sequence[str]) -> set[str]:
    """Names of the values that `words` give, apart from defaults."""
    unset = argparse.Namespace(**dict.fromkeys(vars(parser.parse_args([]))))
    return {name for name, value in vars(parser.parse_args(words, unset)).items() if value is not None}


def _slug(encoder: str) -> str:
    return re.sub(r"[^\w.-]+", "-", encoder).strip("-")


# ---------------------------------------------------------------------------------------------- running


def check_cells(plan: Plan) -> None:
    """Raise UserError naming a cell whose directory holds other settings or another encoder than those asked for."""
    for cell in plan.cells:
        there = read_json(cell.directory / "config.json")
        changes = []
        for number, stage in STAGES.items():
            if stage.name in there:
                before = dict(there[stage.name]["trains"])
                fingerprint = before.pop("vision_fingerprint", None)
                now = json.loads(json.dumps(plan.arguments(cell, number).what_trains()))
                # The weights say which encoder it is; its path may be written in several ways.
                names = sorted(n for n in (before | now).keys() - {"vision_tower"} if before.get(n) != now.get(n))
                changes += [f"{stage.name}.{name}: {before.get(name)} there, {now.get(name)} asked" for name in names]
                if not names and fingerprint != encoder_of(plan.arguments(cell, number)).fingerprint:
                    changes.append(f"{cell.vision} holds other weights than those it was trained on")
        _refuse(cell.directory, f"cell {cell.name} ({cell.directory})", changes)
        answered = cell.figures.parent
        before = read_json(cell.directory / "cell.json").get("evaluation", {}) if answered.is_dir() else {}
        names = [name for name in before if before[name] != plan.evaluation.get(name)]
        changes = [f"{name}: {before[name]} there, {plan.evaluation.get(name)} asked" for name in names]
        _refuse(answered, f"cell {cell.name} was asked otherwise: {answered}", changes)


def _refuse(place: Path, what: str, changes: list[str]) -> None:
    if changes:
        raise UserError(
            f"{what} holds other settings:\n  "
            + "\n  ".join(changes)
            + f"\nGive the comparison another --output, or remove {place}"
        )


def is_done(plan: Plan, cell: Cell) -> bool:
    answered = cell.figures.is_file() or not plan.asks
    return answered and (cell.directory / "instruct" / "done.json").is_file() and has_benchmarks(plan, cell)


def benchmarks_done(cell: Cell) -> list[str]:
    return read_json(cell.directory / "benchmarks" / "tasks.json").get("tasks", [])


def has_benchmarks(plan: Plan, cell: Cell) -> bool:
    return set(plan.benchmarks) <= set(benchmarks_done(cell))


def check_inputs(plan: Plan) -> None:
    """Raise UserError for what would end the comparison hours later: flags, encoders, questions, other settings."""
    for number in STAGES:
        plan.arguments(plan.cells[0], number)
    for path, (kind, seed) in plan.pretraining.items():
        asked = plan.pretraining_config(path, kind, seed)
        if asked.task.objective != kind:
            raise UserError(f"--pretrain-flags: {kind} would be trained with the objective {asked.task.objective}")
        if (path / "config.json").is_file():
            changes = differing_fields(RunConfig.load(path / "config.json"), asked)
            _refuse(path, f"encoder {path}", changes)
    if plan.question_file is not None:
        questions, _ = open_questions(plan.question_file, plan.question_images, plan.questions)
        if not any(question.answer is not None or question.references for question in questions):
            raise UserError(f"{plan.question_file} has neither answers nor references: there is nothing to compare")
    if plan.karpathy is not None:
        KarpathySet(plan.karpathy, plan.image_root or plan.karpathy.parent)


def load_encoders(plan: Plan) -> None:
    """Load each encoder once that is not made here, in the way of the cells: before hours go into the others."""
    for cell in plan.cells[: len(plan.encoders)]:
        if Path(cell.vision.partition(":")[2]) not in plan.pretraining:
            encoder_of(plan.arguments(cell, 1))


def pretrain(plan: Plan, commands: Commands, console: Console) -> None:
    """Train the encoders that are missing, then make sure that the baseline saw what CLIPS saw."""

    def run(item: tuple[Path, tuple[str, int]]) -> None:
        path, (kind, seed) = item
        with locked(path, commands) as lock:
            if not is_finished(path):
                console.print(f"pretraining {path.name} (recipe {RECIPES[kind]})", highlight=False)
                command = plan.pretrain_command(path, kind, seed)
                commands.run(command, path.parent / f"{path.name}.log", pass_fds=[lock])

    commands.map(run, [item for item in plan.pretraining.items() if not is_finished(item[0])])
    for seed in range(plan.kinds_pretrained):
        pair = [plan.pretrained(kind, seed) for kind in RECIPES]
        if all(path in plan.pretraining for path in pair):
            assert_same_samples(*pair)


def assert_same_samples(clips: Path, clip: Path) -> None:
    """UserError unless both pretraining runs saw the same samples in as many steps of the same batches."""
    changes = [
        f"{name}: {ours} and {theirs}" for name, ours, theirs in _pretraining_settings(clips, clip) if ours != theirs
    ]
    if changes:
        raise UserError(f"{clip} is no fair baseline of {clips}, they saw different things:\n  " + "\n  ".join(changes))


def _pretraining_settings(*runs: Path) -> Iterator[tuple[str, Any, Any]]:
    """(name, of the first, of the second) of what decides which samples a run sees, and what it came to."""
    configs, seen = [read_json(run / "config.json") for run in runs], [steps_seen(run) for run in runs]
    yield "data", *(config["data"] for config in configs)
    yield "seed", *(config["train"]["seed"] for config in configs)
    yield "image tower", *(config["model"]["vision"] for config in configs)
    rates = ("lr", "muon_lr")  # each has its own best ones
    yield "phases", *([{k: v for k, v in p.items() if k not in rates} for p in c["phases"]] for c in configs)
    yield "samples and steps seen", *seen


def steps_seen(run: Path) -> dict[str, int]:
    """Samples and steps of a pretraining run's last logged step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["kind"] == "train"][-1]
    return {"samples": last["samples"], "steps": last["step"]}


def run_cell(plan: Plan, cell: Cell, commands: Commands, say: Callable[[Cell, str], None]) -> None:
    """Whatever is missing of a cell, each part as a process of its own."""
    say(cell, "waits for its lock")
    with locked(cell.directory, commands) as lock:
        cell.directory.mkdir(exist_ok=True)
        record = {"encoder": cell.encoder, "vision": cell.vision, "seed": cell.seed, "evaluation": plan.evaluation}
        write_atomically(cell.directory / "cell.json", json.dumps(record, indent=2) + "\n")
        parts = [
            (stage.name, plan.train_command(cell, number), (cell.directory / stage.name / "done.json").is_file())
            for number, stage in STAGES.items()
        ]
        parts.append(("evaluation", plan.evaluation_command(cell), cell.figures.is_file() or not plan.asks))
        if plan.benchmarks:
            parts.append(("benchmarks", plan.benchmark_command(cell), has_benchmarks(plan, cell)))
        for part, command, is_there in parts:
            if is_there:
                continue
            say(cell, part)
            begin = time.monotonic()
            try:
                commands.run(command, cell.log, pass_fds=[lock])
            finally:
                _add_cost(cell, part, time.monotonic() - begin)
        if plan.benchmarks:
            tasks = json.dumps({"tasks": sorted({*benchmarks_done(cell), *plan.benchmarks})})
            write_atomically(cell.directory / "benchmarks" / "tasks.json", tasks + "\n")
    say(cell, "done")


def _add_cost(cell: Cell, part: str, seconds: float) -> None:
    costs = read_json(cell.directory / "cost.json")
    costs[part] = round(costs.get(part, 0.0) + seconds, 1)
    write_atomically(cell.directory / "cost.json", json.dumps(costs) + "\n")


# ---------------------------------------------------------------------------------------------- the plan for people


PROGRESS = re.compile(r"\[(\w+) +([\d,]+)/([\d,]+)\].* left ([\d.]+) min|(answers): +(\d+)%")


def progress_of(cell: Cell) -> str:
    """How far the last line of a cell's log says that its part is."""
    if not cell.log.is_file():
        return ""
    with cell.log.open("rb") as file:
        file.seek(max(0, cell.log.stat().st_size - 4096))
        found = list(PROGRESS.finditer(file.read().decode(errors="replace")))
    if not found:
        return ""
    _, step, steps, left, _, percent = found[-1].groups()
    return f"{percent} %" if percent else f"{100 * _number(step) // _number(steps)} %, {left} min left"


def _number(text: str) -> int:
    return int(text.replace(",", ""))


class Grid:
    """Encoders × seeds with what each cell is at; a table that lives on a terminal, one line a change elsewhere."""

    def __init__(self, plan: Plan, console: Console) -> None:
        self.plan, self.console = plan, console
        self.states = {cell: "done" if is_done(plan, cell) else "waits" for cell in plan.cells}

    def say(self, cell: Cell, state: str) -> None:
        self.states[cell] = state
        if not self.console.is_terminal:
            self.console.print(f"{cell.name}: {state}{self._accuracy(cell, state)}", highlight=False)

    def _accuracy(self, cell: Cell, state: str) -> str:
        if state != "done" or not cell.figures.is_file():
            return ""
        overall = read_json(cell.figures).get("exact_match", {}).get("overall")
        return f", {overall['accuracy']:.1%} right" if overall else ""

    def __rich__(self) -> Table:
        table = Table("encoder", *(f"seed {seed}" for seed in range(self.plan.seeds)), title_justify="left")
        for name in self.plan.names:
            table.add_row(name, *(self._text(cell) for cell in self.states if cell.encoder == name))
        return table

    def _text(self, cell: Cell) -> str:
        state = self.states[cell]
        if state == "waits":
            return "[dim]waits[/]"
        if state == "done":
            return f"[green]done{self._accuracy(cell, state)}[/]"
        return f"[bold]{state}[/] {progress_of(cell)}"

    def live(self) -> Any:
        is_terminal = self.console.is_terminal
        return Live(get_renderable=self.__rich__, console=self.console) if is_terminal else nullcontext()


def seconds_of_cell(plan: Plan) -> tuple[float, str]:
    """Estimated seconds of one cell, and where the estimate comes from."""
    finished = [read_json(cell.directory / "cost.json") for cell in plan.cells if is_done(plan, cell)]
    measured = [sum(costs.values()) for costs in finished if costs]
    if measured:
        return sum(measured) / len(measured), f"the mean of {len(measured)} finished cells"
    cell, seconds = plan.cells[0], 0.0
    for number, stage in STAGES.items():
        seconds += stage_samples(plan, cell, number) / ASSUMED[stage.name]
    if plan.asks:
        seconds += sum(_questions(path, plan.questions) for path in plan.question_files[0]) / ASSUMED["evaluation"]
    rates = ", ".join(f"{rate:g}/s {name}" for name, rate in ASSUMED.items())
    return seconds, f"an assumption for one core, no cell is finished yet ({rates})"


def stage_samples(plan: Plan, cell: Cell, number: int) -> int:
    """Samples that one stage of a cell sees."""
    arguments = plan.arguments(cell, number)
    if arguments.max_steps > 0:
        return arguments.max_steps * arguments.batch_size
    return math.ceil(arguments.num_train_epochs * len(read_json_records(data_of(arguments)[0])))


def _questions(path: Path, limit: int | None) -> int:
    count = len(read_json_records(path))
    return min(count, limit) if limit else count


def print_plan(plan: Plan, console: Console) -> None:
    """Encoders to pretrain, the grid, the samples of each stage, and how long it will take."""
    cell = plan.cells[0]
    encoders = [path for path in plan.pretraining if not is_finished(path)]
    todo = [cell for cell in plan.cells if not is_done(plan, cell)]
    each, source = seconds_of_cell(plan)
    total = math.ceil(len(todo) / plan.jobs) * each
    total += math.ceil(len(encoders) / plan.jobs) * ASSUMED_PRETRAINING_S
    budget = ", ".join(f"{s.name} {stage_samples(plan, cell, n):,} samples" for n, s in STAGES.items())
    console.print(Grid(plan, console))
    facts = {
        "pretrain": ", ".join(path.name for path in encoders) or "nothing",
        "cells": f"{len(todo)} of {len(plan.cells)} to run, {plan.jobs} at a time",
        "each cell": budget + (f" ({plan.share:.0%} of the stages' own)" if plan.share < 1 else ""),
        "time": f"about {total / 60:.0f} min: {each / 60:.1f} min a cell, {source}",
        "writes to": str(plan.output),
    }
    for name, value in facts.items():
        console.print(f"  [bold]{name:<10}[/] {value}", highlight=False, soft_wrap=True)


# ---------------------------------------------------------------------------------------------- the command


def plan_from_flags(flags: argparse.Namespace) -> Plan:
    """Raises UserError for flags that do not fit each other."""
    on_gpu = choose_device(flags.device).type == "cuda"
    both = not on_gpu and (os.cpu_count() or 1) >= 2
    return Plan(
        encoders=tuple(filter(None, flags.encoders.split(","))),
        seeds=flags.seeds,
        output=Path(flags.output),
        jobs=flags.jobs or (2 if both else 1),
        quick=flags.quick,
        budget=flags.budget,
        pretraining_seeds=flags.pretraining_seeds,
        train_flags=tuple(shlex.split(flags.train_flags)),
        pretrain_flags=tuple(shlex.split(flags.pretrain_flags)),
        device=flags.device,
        gpus=flags.gpus,
        question_file=Path(flags.question_file) if flags.question_file else None,
        question_images=Path(flags.question_images) if flags.question_images else None,
        limit=flags.limit,
        benchmarks=tuple(filter(None, flags.benchmarks.split(","))),
        karpathy=Path(flags.karpathy) if flags.karpathy else None,
        image_root=Path(flags.image_root) if flags.image_root else None,
    )


def compare_from_flags(flags: argparse.Namespace) -> None:
    """What scripts/compare_encoders.py does."""
    plan, console = plan_from_flags(flags), Console(stderr=True)
    check_inputs(plan)
    print_plan(plan, console)
    if flags.dry_run:
        return
    compare(plan, console, sys.argv)


def compare(plan: Plan, console: Console, command: Sequence[str] = ()) -> Path:
    """Run what is missing and write the report; returns the page's path."""
    from mllm.compare_figures import collect, measure_encoders
    from mllm.compare_report import write_report

    commands = Commands(plan.jobs)
    (plan.output / "cells").mkdir(parents=True, exist_ok=True)
    load_encoders(plan)
    disable_progress_bar()  # of encoders that are loaded again for their figures: the grid is the view
    pretrain(plan, commands, console)
    check_cells(plan)
    if plan.asks:
        plan.question_files  # noqa: B018 - builds the demo once, before several processes want it
    grid = Grid(plan, console)
    with grid.live():
        commands.map(
            lambda cell: run_cell(plan, cell, commands, grid.say),
            [cell for cell in plan.cells if not is_done(plan, cell)],
        )
    if plan.karpathy:
        runs = {Path(cell.vision.partition(":")[2]) for cell in plan.cells if cell.vision.partition(":")[0] in RECIPES}
        todo = [run for run in sorted(runs) if not (run / f"evaluation-{plan.karpathy.stem}.json").is_file()]
        commands.map(lambda run: commands.run(plan.retrieval_command(run), plan.output / f"{run.name}.log"), todo)
    report = collect(plan, measure_encoders(plan, torch.device(choose_device(plan.device))), command)
    page = write_report(report, plan.output, plan.question_files[1] if plan.asks else None)
    console.print(
        f"\n[bold]{plan.output}[/bold] holds the comparison:\n"
        f"  page        {page}\n"
        f"  figures     {plan.output}/report.json, {plan.output}/report.md\n"
        f"  cells       {plan.output}/cells/  (each a run directory with its model)\n"
        f"Next:\n  python scripts/chat.py --model-path {plan.cells[0].directory}/model",
        highlight=False,
        soft_wrap=True,
    )
    return page
