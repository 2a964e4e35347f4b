"""The processes that a comparison starts: their command lines, and the configurations that these come to."""

from __future__ import annotations

import math
import sys
from pathlib import Path

from clips import RunConfig, config_from_flags
from clips import parser as pretraining_parser
from clips.common.files import read_json_records
from mllm.compare.cells import RECIPES, Cell, PretrainedEncoder
from mllm.compare.comparison import QUICK_PRETRAINING, Comparison, budget_share, question_limit
from mllm.training.arguments import TrainArguments, parse_train_arguments
from mllm.training.prepare import data_of
from mllm.training.stages import STAGES

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


# ---------------------------------------------------------------------------------------------- both stages of a cell
def train_flags(comparison: Comparison, cell: Cell, stage: int) -> list[str]:
    """The flags of train_llava.py for one stage of a cell."""
    flags = ["--stage", str(stage), "--vision", cell.vision, "--seed", str(cell.seed)]
    flags += ["--output_dir", str(cell.directory), "--device", comparison.device, *comparison.train_flags]
    flags += ["--both_stages"]  # the same flags for both: each stage passes over the other's
    share = budget_share(comparison)
    if share < 1:
        full = parse_train_arguments(flags).resolve(comparison.gpus)
        name = STAGES[stage].name
        if full.max_steps > 0:
            flags += [f"--{name}.max_steps", str(max(1, round(share * full.max_steps)))]
        else:
            flags += [f"--{name}.num_train_epochs", f"{share * full.num_train_epochs:g}"]
    return flags


def train_arguments(comparison: Comparison, cell: Cell, stage: int) -> TrainArguments:
    """The same as the run itself will read them; raises UserError for flags that it would refuse."""
    return parse_train_arguments(train_flags(comparison, cell, stage)).resolve(comparison.gpus)


def train_command(comparison: Comparison, cell: Cell, stage: int) -> list[str]:
    launcher = [sys.executable]
    if comparison.gpus > 1:
        launcher += ["-m", "deepspeed.launcher.runner", "--num_gpus", str(comparison.gpus)]
    return [*launcher, str(SCRIPTS / "train_llava.py"), *train_flags(comparison, cell, stage)]


def stage_samples(comparison: Comparison, cell: Cell, stage: int) -> int:
    """Samples that one stage of a cell sees."""
    arguments = train_arguments(comparison, cell, stage)
    if arguments.max_steps > 0:
        return arguments.max_steps * arguments.batch_size
    return math.ceil(arguments.num_train_epochs * dataset_size(arguments))


def dataset_size(arguments: TrainArguments) -> int:
    """Samples that one epoch of a stage has."""
    return len(read_json_records(data_of(arguments)[0]))


# ---------------------------------------------------------------------------------------------- its answers
def evaluation_command(comparison: Comparison, cell: Cell) -> list[str]:
    command = [sys.executable, str(SCRIPTS / "evaluate_llava.py"), "--model", str(cell.directory / "model")]
    command += ["--output", str(cell.evaluation), "--device", comparison.device]
    command += ["--questions", str(comparison.question_file)] if comparison.question_file else []
    command += ["--image-folder", str(comparison.question_images)] if comparison.question_images else []
    limit = question_limit(comparison)
    return command + (["--limit", str(limit)] if limit else [])


# ---------------------------------------------------------------------------------------------- the encoders
def pretrain_command(comparison: Comparison, encoder: PretrainedEncoder) -> list[str]:
    command = [sys.executable, str(SCRIPTS / "pretrain_clips.py"), "--recipe", RECIPES[encoder.kind]]
    command += ["--name", encoder.name, "--output-dir", str(encoder.directory.parent), "--seed", str(encoder.seed)]
    command += ["--device", comparison.device]
    if comparison.quick:
        command += ["--samples", str(round(QUICK_PRETRAINING * _config_of(command).samples))]
    return [*command, *comparison.pretrain_flags]


def pretrain_config(comparison: Comparison, encoder: PretrainedEncoder) -> RunConfig:
    """What `pretrain_command` makes of its flags; raises UserError for what it would refuse."""
    return _config_of(pretrain_command(comparison, encoder))


def _config_of(command: list[str]) -> RunConfig:
    _, _, *flags = command
    return config_from_flags(pretraining_parser().parse_args(flags))


def retrieval_command(comparison: Comparison, split: Path, run: Path) -> list[str]:
    """Retrieval of a pretraining run's encoder on the Karpathy file `split`."""
    command = [sys.executable, str(SCRIPTS / "evaluate_clips.py"), "--model", str(run), "--device", comparison.device]
    command += ["--karpathy", str(split), "--image-root", str(comparison.image_root or split.parent)]
    return [*command, "--out", str(retrieval_figures(split, run))]


def retrieval_figures(split: Path, run: Path) -> Path:
    """Where `retrieval_command` leaves its figures."""
    return run / f"evaluation-{split.stem}.json"
