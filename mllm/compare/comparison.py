"""What a comparison was asked for, and what follows from it: its data, its budget, its questions.

What only a comparison that trains needs is imported where it is used: one that is verified waits for no torch.
"""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from clips.common.files import sha256
from mllm.training.stages import STAGES

DEMO_SHARE, QUICK_SHARE = 0.3, 0.1
"""Share of each stage's samples that a cell trains: of the demo's, and with --quick. Other data: all of them."""
QUICK_PRETRAINING = 0.5
"""Share of the samples that the encoders which are pretrained here see with --quick."""
SEEDS, QUICK_LLAVA_SEEDS = 5, 3
"""Pretraining seeds, where --seeds does not say; LLaVA runs on the one pretraining seed of --quick."""
DEMO_LIMIT, QUICK_LIMIT = 400, 200
"""Questions of each file, where --limit does not say: the demo's, and with --quick. Of other files all."""
DRAWN = "evenly over kinds and answers"
"""How a limit leaves questions; cells whose questions were chosen otherwise are asked again."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What was asked for, flag by flag (scripts/compare_encoders.py); equal ones give equal cells."""

    encoders: tuple[str, ...]
    seeds: int = SEEDS
    """Pretraining seeds."""
    llava_seeds: int | None = None
    """LLaVA runs of each encoder, on its pretraining seeds in turn; None: as `llava_runs` says."""
    output: Path = Path("runs/compare")
    jobs: int = 1
    quick: bool = False
    budget: float | None = None
    """Share of each stage's samples that a cell trains; None: as DEMO_SHARE and QUICK_SHARE say."""
    train_flags: tuple[str, ...] = ()
    pretrain_flags: tuple[str, ...] = ()
    device: str = "auto"
    gpus: int = 1
    question_file: Path | None = None
    question_images: Path | None = None
    limit: int | None = None
    benchmarks: tuple[str, ...] = ()
    include_path: Path | None = None
    """Folder of further tasks for lmms-eval."""
    karpathy: Path | None = None
    image_root: Path | None = None
    decides: str | None = None
    """The figure that the comparison is made for; None: `accuracy`, or `cider_d` where no question has an answer."""


def comparison_from_flags(flags: argparse.Namespace) -> Comparison:
    """Whether the flags fit each other is asked by mllm/compare/checks.py."""
    from clips.common.runtime import choose_device

    on_gpu = choose_device(flags.device).type == "cuda"
    both = not on_gpu and (os.cpu_count() or 1) >= 2
    return Comparison(
        encoders=tuple(filter(None, flags.encoders.split(","))),
        seeds=(1 if flags.quick else SEEDS) if flags.seeds is None else flags.seeds,
        llava_seeds=QUICK_LLAVA_SEEDS if flags.quick and flags.llava_seeds is None else flags.llava_seeds,
        output=Path(flags.output),
        jobs=flags.jobs or (2 if both else 1),
        quick=flags.quick,
        budget=flags.budget,
        train_flags=tuple(shlex.split(flags.train_flags)),
        pretrain_flags=tuple(shlex.split(flags.pretrain_flags)),
        device=flags.device,
        gpus=flags.gpus,
        question_file=Path(flags.question_file) if flags.question_file else None,
        question_images=Path(flags.question_images) if flags.question_images else None,
        limit=flags.limit,
        benchmarks=tuple(dict.fromkeys(filter(None, flags.benchmarks.split(",")))),
        include_path=Path(flags.include_path) if flags.include_path else None,
        karpathy=Path(flags.karpathy) if flags.karpathy else None,
        image_root=Path(flags.image_root) if flags.image_root else None,
        decides=flags.decides,
    )


# ---------------------------------------------------------------------------------------------- what follows from it
def given_fields(parser: argparse.ArgumentParser, words: Sequence[str]) -> set[str]:
    """Names of the values that `words` give, apart from defaults."""
    unset = argparse.Namespace(**dict.fromkeys(vars(parser.parse_args([]))))
    return {name for name, value in vars(parser.parse_args(words, unset)).items() if value is not None}


@lru_cache
def given_for_training(train_flags: tuple[str, ...]) -> set[str]:
    """Names of the fields that `train_flags` give, for either stage and in any spelling."""
    from mllm.training.arguments import flags_of_stage
    from mllm.training.arguments import parser as training_parser

    words = [flags_of_stage(list(train_flags), stage.name) for stage in STAGES.values()]
    return set().union(*(given_fields(training_parser(), stage_words) for stage_words in words))


def is_demo(comparison: Comparison) -> bool:
    """Whether the cells train on the demo data."""
    return "data_path" not in given_for_training(comparison.train_flags)


def asks_questions(comparison: Comparison) -> bool:
    """Whether the cells answer questions (not only benchmarks)."""
    return is_demo(comparison) or comparison.question_file is not None


def budget_share(comparison: Comparison) -> float:
    """Share of each stage's samples that every cell trains."""
    default = QUICK_SHARE if comparison.quick else DEMO_SHARE if is_demo(comparison) else 1.0
    return comparison.budget or default


def question_limit(comparison: Comparison) -> int | None:
    """Questions of each file that every cell is asked; None: all."""
    own = comparison.question_file is not None or not is_demo(comparison)
    return comparison.limit or (QUICK_LIMIT if comparison.quick else None if own else DEMO_LIMIT)


def question_files(comparison: Comparison) -> tuple[dict[str, Path], Path | None]:
    """What the answers to each file are called → the file, and the folder of pictures that they are about.

    Builds the demo where it is missing.
    """
    from mllm.data.demo import DEMO_DIR, IMAGES, demo_questions, ensure_llava_demo

    if comparison.question_file is not None:
        return {comparison.question_file.stem: comparison.question_file}, comparison.question_images
    demo = ensure_llava_demo(DEMO_DIR)
    return demo_questions(demo), demo / IMAGES


def evaluation_settings(comparison: Comparison) -> dict[str, Any]:
    """What decides which questions a cell answers, and how."""
    from clips.common.runtime import choose_device
    from mllm.evaluation.evaluate import answer_dtype

    dtype = answer_dtype("auto", choose_device(comparison.device))
    content: dict[str, Any] = {}
    if comparison.question_file is not None:
        content = {"sha256": sha256(comparison.question_file)}
    questions = comparison.question_file.name if comparison.question_file else "the demo's"
    limit = question_limit(comparison)
    content |= {"drawn": DRAWN} if limit is not None else {}
    return {"questions": questions, "limit": limit, "dtype": str(dtype).removeprefix("torch.")} | content
