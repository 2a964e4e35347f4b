"""The cells of a comparison and the encoders that it pretrains: which there are, where, and what of them is done."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clips.common.errors import UserError
from clips.common.files import read_json
from clips.common.progress import last_record
from clips.common.rundir import METRICS
from mllm.compare.benchmarks import missing_benchmarks
from mllm.compare.comparison import Comparison, asks_questions
from mllm.compare.statistics import shared_runs
from mllm.encoders.registry import parse_vision_name

RECIPES = {"clips": "demo", "clip": "clip_baseline", "caption": "caption", "caption+web": "caption_web"}
"""Encoders that are pretrained where they are missing."""
WITH_TEXTS = ("clips", "clip")
"""Those of them that have features of texts, to measure retrieval by."""


@dataclass(frozen=True)
class PretrainedEncoder:
    """An encoder that the comparison pretrains itself: a run of scripts/pretrain_clips.py."""

    kind: str
    """Of `RECIPES`."""
    seed: int
    directory: Path

    @property
    def name(self) -> str:
        return self.directory.name

    @property
    def log(self) -> Path:
        return self.directory.parent / f"{self.name}.log"


LLAVA_STEP = 1000
"""Between the LLaVA seeds of one pretraining seed: the first run on encoder 3 has seed 3, the second 1003.

So no two runs on different encoders share a seed, which would make them alike in what is to be their own luck, and a
comparison with more of either kind of seed goes on from the cells that are there.
"""


@dataclass(frozen=True)
class Cell:
    """One run on one encoder: a run directory with both stages, the answers and what they cost.

    What tells it from others of the comparison: encoder, pretraining seed, LLaVA seed.
    """

    encoder: str
    """Its name in the report."""
    kind: str
    argument: str
    """What the registry makes the encoder from (mllm/encoders/registry.py): clips and runs/x of clips:runs/x."""
    pretraining_seed: int
    seed: int
    """The LLaVA seed, as train_llava.py is told it: of the projector, the adapters, the order, and of `random`."""
    directory: Path

    @property
    def run(self) -> str:
        """Both seeds in words."""
        first = f"seed {self.pretraining_seed}"
        return first if self.seed == self.pretraining_seed else f"{first}, LLaVA seed {self.seed}"

    @property
    def vision(self) -> str:
        """What train_llava.py loads."""
        return f"{self.kind}:{self.argument}" if self.argument else self.kind

    @property
    def pretraining_run(self) -> Path | None:
        """The run directory behind an encoder trained here, once it is there; None for any other, as one of the hub."""
        return Path(self.argument) if self.kind in RECIPES and Path(self.argument or "-").is_dir() else None

    @property
    def name(self) -> str:
        return self.directory.name

    @property
    def log(self) -> Path:
        return self.directory.parent / f"{self.name}.log"

    @property
    def evaluation(self) -> Path:
        """Directory of its answers and their figures."""
        return self.directory / "evaluation"

    @property
    def figures(self) -> Path:
        return self.evaluation / "figures.json"


def cells_of(comparison: Comparison) -> list[Cell]:
    """Run by run, so that whole comparisons are there early. Raises UserError for an encoder that is not known."""
    names, directory, cells = encoder_names(comparison), comparison.output / "cells", []
    for run in range(llava_runs(comparison)):
        pretraining, seed = run % comparison.seeds, run % comparison.seeds + LLAVA_STEP * (run // comparison.seeds)
        suffix = f"seed{pretraining}" if seed == pretraining else f"seed{pretraining}-llava{seed}"
        for name, encoder in zip(names, comparison.encoders, strict=True):
            vision = vision_of(comparison, encoder, pretraining)
            cells.append(Cell(name, *vision, pretraining, seed, directory / f"{slug(encoder)}-{suffix}"))
    return cells


def is_pretrained_anew(encoder: str) -> bool:
    """Whether each pretraining seed has a trained encoder of its own under this name."""
    kind, argument = parse_vision_name(encoder)
    return ("{seed}" in argument and kind not in ("random", "blind")) or (kind in RECIPES and not argument)


def llava_runs(comparison: Comparison) -> int:
    """LLaVA runs of each encoder: one more than pretraining seeds, where these can be told apart from LLaVA seeds."""
    nested = comparison.seeds > 1 and any(map(is_pretrained_anew, comparison.encoders))
    return comparison.llava_seeds or comparison.seeds + nested


def encoder_groups(comparison: Comparison, *names: str) -> np.ndarray:
    """[R] numbers from 0: runs with the same number share an encoder of those called `names` (statistics.shared_runs).

    Those trained anew are shared by the runs of a pretraining seed, `random` is another one in every run, and all
    others, `blind` too since it sees nothing, are the same in all runs.
    """
    runs = np.arange(llava_runs(comparison))
    of_kind = {True: runs % comparison.seeds, "random": runs}
    given = [e for n, e in zip(encoder_names(comparison), comparison.encoders, strict=True) if n in names]
    keys = [is_pretrained_anew(encoder) or parse_vision_name(encoder)[0] for encoder in given]
    return shared_runs([of_kind.get(key, np.zeros_like(runs)) for key in keys])


def encoder_names(comparison: Comparison) -> list[str]:
    """What the report calls the encoders: by their kind, where there is one of that kind."""
    kinds = [parse_vision_name(encoder)[0] for encoder in comparison.encoders]
    return [k if kinds.count(k) == 1 else e for k, e in zip(kinds, comparison.encoders, strict=True)]


def slug(encoder: str) -> str:
    """The encoder's name as part of a directory's."""
    return re.sub(r"[^\w.-]+", "-", encoder).strip("-")


def vision_of(comparison: Comparison, encoder: str, seed: int) -> tuple[str, str]:
    """(kind, argument) of an encoder in the cells of a pretraining seed; `{seed}` in what was given stands for it."""
    kind, argument = parse_vision_name(encoder)
    if kind in RECIPES and not argument:
        argument = str(pretrained_directory(comparison, kind, seed))
    elif kind in ("random", "blind") and not argument:  # the architecture of the CLIPS encoder beside them
        given = next((name for name in comparison.encoders if parse_vision_name(name)[0] == "clips"), "clips")
        argument = vision_of(comparison, given, seed)[1]
    return kind, argument.replace("{seed}", str(seed))


def pretrained_directory(comparison: Comparison, kind: str, seed: int) -> Path:
    """Run directory of the encoder that the cells of a pretraining seed take."""
    return comparison.output / "encoders" / f"{kind}-seed{seed}"


def encoders_to_pretrain(comparison: Comparison) -> list[PretrainedEncoder]:
    """Every encoder that the cells need from here, whether or not it is there already."""
    needed = {cell.argument for cell in cells_of(comparison)}
    encoders = [
        PretrainedEncoder(kind, seed, pretrained_directory(comparison, kind, seed))
        for kind in RECIPES
        for seed in range(comparison.seeds)
    ]
    return [encoder for encoder in encoders if str(encoder.directory) in needed]


# ---------------------------------------------------------------------------------------------- what runs have left
def is_done(comparison: Comparison, cell: Cell) -> bool:
    answered = cell.figures.is_file() or not asks_questions(comparison)
    trained = (cell.directory / "instruct" / "done.json").is_file()
    return answered and trained and not missing_benchmarks(comparison, cell.directory)


def vision_fingerprint(cell: Cell) -> str:
    """Of the encoder that the cell was trained on."""
    return read_json(cell.directory / "config.json")["instruct"]["trains"]["vision_fingerprint"]


def samples_seen(run: Path) -> dict[str, int]:
    """Samples and steps of a pretraining run's last logged step. Raises UserError where none was logged."""
    last = last_record(run / METRICS, kind="train")
    if last is None:
        raise UserError(f"{run / METRICS} holds no training step: remove {run}, then it is pretrained again")
    return {"samples": last["samples"], "steps": last["step"]}
