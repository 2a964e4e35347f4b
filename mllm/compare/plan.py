"""What a comparison is: its encoders, seeds and settings, and the commands that follow from them."""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import math
import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from clips.common.errors import UserError
from clips.common.files import read_json
from clips.common.rundir import read_metrics
from clips.common.runtime import choose_device
from clips.config import RunConfig
from clips.training.cli import config_from_flags
from clips.training.cli import parser as pretraining_parser
from mllm.data.dataset import read_json_records
from mllm.data.demo import DEMO_DIR, DESCRIPTIONS, IMAGES, QUESTIONS, ensure_llava_demo
from mllm.encoders.registry import parse_vision_name
from mllm.evaluation.evaluate import answer_dtype
from mllm.training import arguments as train_arguments
from mllm.training.arguments import TrainArguments, flags_of_stage, parse_train_arguments
from mllm.training.prepare import data_of
from mllm.training.stages import STAGES

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
RECIPES = {"clips": "demo", "clip": "clip_baseline"}
"""Encoders that are pretrained where they are missing."""
DEMO_SHARE, QUICK_SHARE = 0.75, 0.15
"""Share of each stage's samples that a cell trains: of the demo's, and with --quick. Other data: all of them."""
QUICK_LIMIT = 400
"""Questions of each file with --quick, where --limit does not say."""


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
        return _given(pretraining_parser(), self.pretrain_flags)

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
        """The name that the registry resolves; `{seed}` in a given directory stands for the cell's seed."""
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
        return config_from_flags(pretraining_parser().parse_args(flags))

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


def _given(parser: argparse.ArgumentParser, words: Sequence[str]) -> set[str]:
    """Names of the values that `words` give, apart from defaults."""
    unset = argparse.Namespace(**dict.fromkeys(vars(parser.parse_args([]))))
    return {name for name, value in vars(parser.parse_args(words, unset)).items() if value is not None}


def _slug(encoder: str) -> str:
    return re.sub(r"[^\w.-]+", "-", encoder).strip("-")


def is_done(plan: Plan, cell: Cell) -> bool:
    answered = cell.figures.is_file() or not plan.asks
    return answered and (cell.directory / "instruct" / "done.json").is_file() and has_benchmarks(plan, cell)


def benchmarks_done(cell: Cell) -> list[str]:
    return read_json(cell.directory / "benchmarks" / "tasks.json").get("tasks", [])


def has_benchmarks(plan: Plan, cell: Cell) -> bool:
    return set(plan.benchmarks) <= set(benchmarks_done(cell))


def steps_seen(run: Path) -> dict[str, int]:
    """Samples and steps of a pretraining run's last logged step."""
    last = read_metrics(run, "train")[-1]
    return {"samples": last["samples"], "steps": last["step"]}


def stage_samples(plan: Plan, cell: Cell, number: int) -> int:
    """Samples that one stage of a cell sees."""
    arguments = plan.arguments(cell, number)
    if arguments.max_steps > 0:
        return arguments.max_steps * arguments.batch_size
    return math.ceil(arguments.num_train_epochs * len(read_json_records(data_of(arguments)[0])))


def _questions(path: Path, limit: int | None) -> int:
    count = len(read_json_records(path))
    return min(count, limit) if limit else count


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
