"""What a comparison of encoders asks for, flag by flag, and what follows: its data, its budget, its questions.

Imports that need torch are inside the functions that train: verifying needs no torch.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from clips.common.files import sha256
from clips.common.flags import Parser, add_options, from_flags, option
from mllm.data.questions import LIKELIHOODS
from mllm.training.stages import STAGES

ENCODERS = ("clips", "clip", "random", "blind")
QUICK_ENCODERS = ("clips", "random")
SHARE = 0.5
"""Share of each stage's samples that a cell trains: of the demo's, and with --quick. Other data: all samples."""
QUICK_PRETRAINING = 0.5
"""Share of the samples of an encoder that is pretrained here, with --quick."""
SEEDS = 5
QUICK_LLAVA_RUNS = 4
LIMIT = 400
"""Questions of each file without --limit: the demo's, and with --quick. Of other files all."""
DATA_FLAG = re.compile(rf"--(?:(?:{'|'.join(s.name for s in STAGES.values())})\.)?(?:data_path|karpathy)(?:=|$)")
"""The flag that trains on other data than the demo's, for both stages or for one."""
DRAWN = "evenly over kinds and answers"
"""How a limit draws questions. A cell whose questions were drawn otherwise is asked again."""


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(filter(None, text.split(","))))


def _words(text: str) -> tuple[str, ...]:
    return tuple(shlex.split(text))


def _variant(text: str) -> tuple[str, tuple[str, ...]]:
    name, equals, flags = text.partition("=")
    if not (equals and re.fullmatch(r"\w+", name)):
        raise argparse.ArgumentTypeError(f"{text!r}: give NAME=FLAGS, such as 'tiles=--image_aspect_ratio anyres'")
    return name, _words(flags)


def _option(kind: Any, default: Any, text: str) -> Any:
    return option(default, text, type=kind, nargs=None, action="store")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The flags of scripts/compare_encoders.py; equal comparisons have equal cells."""

    encoders: tuple[str, ...] = _option(
        lambda text: tuple(filter(None, text.split(","))),
        ENCODERS,
        "names as of train_llava.sh --vision, with commas between; bare clips and clip are pretrained here, in "
        "clips:DIR {seed} is the pretraining seed (default: clips,clip,random,blind; --quick: clips,random)",
    )
    seeds: int = option(
        SEEDS, f"encoders of each kind that is pretrained here, one of each seed (default: {SEEDS}, --quick: 1)"
    )
    first_seed: int = option(0, "of --seeds that follow each other")
    llava_runs: int | None = option(
        None,
        "LLaVA runs of each kind of encoder, on its pretrained encoders in turn (default: one more than --seeds; "
        f"--quick: {QUICK_LLAVA_RUNS}; as many as --seeds if no encoder is trained here)",
    )
    output: Path = option(Path("runs/compare"), "where encoders, cells and the report are written")
    jobs: int = option(1, "cells beside each other (default: two on a CPU, one on a GPU)")
    quick: bool = option(False, "clips against random: one encoder of half of the samples, four LLaVA runs")
    budget: float | None = option(
        None, "share of each stage's samples that a cell trains (default: 0.5 on the demo and with --quick, else 1)"
    )
    train_flags: tuple[str, ...] = _option(_words, (), "further flags of train_llava.sh for every cell, in one string")
    variants: tuple[tuple[str, tuple[str, ...]], ...] = option(
        (),
        "each encoder also trains with these further flags: 'tiles=--image_aspect_ratio anyres'",
        type=_variant,
        metavar="NAME=FLAGS",
    )
    pretrain_flags: tuple[str, ...] = _option(
        _words, (), "further flags of pretrain_clips.py for all encoders that are trained here, in one string"
    )
    device: str = option("auto", "auto, cpu or cuda")
    gpus: int = option(1, "GPUs of each cell (deepspeed launcher)")
    questions: Path | None = option(None, "your own questions with answers (default: the demo's)")
    image_folder: Path | None = option(None, "folder or tar of the pictures of --questions")
    limit: int | None = option(
        None,
        "questions of each file, drawn evenly over kinds and answers (default: 400 of the demo's and with --quick)",
    )
    benchmarks: tuple[str, ...] = _option(
        _names, (), "tasks of lmms-eval, with commas between: gqa,pope,textvqa_val,mme"
    )
    include_path: Path | None = option(None, "folder with further tasks of lmms-eval, in its YAML format")
    decides: str | None = option(
        None,
        "the figure that decides, fixed before the first cell: accuracy, log_likelihood or share (probability), of a "
        "kind of question as accuracy/KIND, or cider_d (default: accuracy)",
        metavar="FIGURE",
    )


def flags_of(parser: Parser) -> None:
    """Add the flags of a comparison to `parser`."""
    add_options(parser, Comparison)
    parser.set_defaults(encoders=None, seeds=None, jobs=None)  # they depend on other flags and on the machine


def comparison_from_flags(flags: argparse.Namespace) -> Comparison:
    """The comparison that `flags` ask for; mllm/compare/checks.py asks whether they fit each other."""
    from clips.common.runtime import choose_device

    one_at_a_time = choose_device(flags.device).type == "cuda" or (os.cpu_count() or 1) < 2
    return from_flags(
        Comparison,
        flags,
        encoders=(QUICK_ENCODERS if flags.quick else ENCODERS) if flags.encoders is None else flags.encoders,
        seeds=(1 if flags.quick else SEEDS) if flags.seeds is None else flags.seeds,
        llava_runs=QUICK_LLAVA_RUNS if flags.quick and flags.llava_runs is None else flags.llava_runs,
        jobs=(1 if one_at_a_time else 2) if flags.jobs is None else flags.jobs,
    )


# ------------------------------------------------------------------------------------------- what follows
def is_demo(comparison: Comparison) -> bool:
    """Whether the cells train on the demo data.

    The words are searched, not parsed: a parser would act on the `--help` of an archive that is verified.
    """
    words = chain(comparison.train_flags, *(flags for _, flags in comparison.variants))
    return not any(map(DATA_FLAG.match, words))


def asks_questions(comparison: Comparison) -> bool:
    """Whether the cells answer questions, and not only benchmarks."""
    return is_demo(comparison) or comparison.questions is not None


def budget_share(comparison: Comparison) -> float:
    return comparison.budget or (SHARE if comparison.quick or is_demo(comparison) else 1.0)


def question_limit(comparison: Comparison) -> int | None:
    """Questions of each file that every cell is asked; None: all."""
    own = comparison.questions is not None or not is_demo(comparison)
    return comparison.limit or (LIMIT if comparison.quick or not own else None)


def question_files(comparison: Comparison) -> tuple[dict[str, Path], Path | None]:
    """Name of the answers → question file, and the folder of the pictures. Builds the demo if it is missing.

    No files if there are benchmarks alone.
    """
    from mllm.data.demo import DEMO_DIR, IMAGES, demo_questions, ensure_any_llava_demo

    if not asks_questions(comparison):
        return {}, None
    if comparison.questions is not None:
        return {comparison.questions.stem: comparison.questions}, comparison.image_folder
    demo = ensure_any_llava_demo(DEMO_DIR)
    return demo_questions(demo), demo / IMAGES


def evaluation_settings(comparison: Comparison) -> dict[str, Any]:
    """What decides which questions a cell answers, and how."""
    from clips.common.runtime import choose_device
    from mllm.evaluation.evaluate import answer_dtype

    dtype = answer_dtype("auto", choose_device(comparison.device))
    questions, limit = comparison.questions, question_limit(comparison)
    return {
        "questions": questions.name if questions else "the demo's",
        "limit": limit,
        "dtype": str(dtype).removeprefix("torch."),
        **({"sha256": sha256(questions)} if questions else {}),
        **({"drawn": DRAWN} if limit is not None else {}),
        **({"likelihood": True} if (comparison.decides or "").startswith(LIKELIHOODS) else {}),
    }
