"""The cells of a comparison and the encoders that it pretrains: which there are, and where."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from clips.common.errors import UserError
from clips.common.files import read_json
from clips.common.rundir import METRICS, read_metrics
from clips.lab.stats import shared_runs
from mllm.compare.comparison import Comparison
from mllm.encoders.registry import parse_vision_name

RECIPES = {"clips": "demo", "clip": "clip_baseline"}
"""Encoders that are pretrained if they are missing → recipe."""
PLAN = "compare.json"
LLAVA_STEP = 1000
"""Between the LLaVA seeds of one pretraining seed: the first run on encoder 3 has seed 3, the second 1003.

So no two runs on different encoders share a seed, and a comparison with more seeds goes on from the cells it has.
"""


@dataclass(frozen=True)
class PretrainedEncoder:
    """An encoder that the comparison pretrains itself: a run of scripts/pretrain_clips.py."""

    kind: str
    seed: int
    directory: Path


@dataclass(frozen=True)
class EncoderCell:
    """One run on one encoder: a run directory with both stages, the answers and the costs."""

    encoder: str
    kind: str
    argument: str
    """What the registry makes the encoder from (mllm/encoders/registry.py): clips and runs/x of clips:runs/x."""
    pretraining_seed: int
    seed: int
    """The LLaVA seed: of the projector, the adapters, the order, and of `random`."""
    directory: Path
    variant: str = ""

    @property
    def run(self) -> str:
        first = f"seed {self.pretraining_seed}"
        return first if self.seed == self.pretraining_seed else f"{first}, LLaVA seed {self.seed}"

    @property
    def vision(self) -> str:
        return f"{self.kind}:{self.argument}" if self.argument else self.kind

    @property
    def pretraining_run(self) -> Path | None:
        """The run directory of an encoder trained here, once it is there; None for any other encoder."""
        return Path(self.argument) if self.kind in RECIPES and Path(self.argument or "-").is_dir() else None

    @property
    def name(self) -> str:
        return self.directory.name

    @property
    def evaluation(self) -> Path:
        return self.directory / "evaluation"

    @property
    def figures(self) -> Path:
        return self.evaluation / "figures.json"

    def read(self, name: str) -> dict[str, Any]:
        return read_json(self.directory / name)

    def fingerprint(self) -> str:
        return self.read("config.json")["instruct"]["trains"]["vision_fingerprint"]


def cells_of(comparison: Comparison) -> list[EncoderCell]:
    """Run by run, so that whole comparisons are there early. Raises UserError for an unknown encoder."""
    cells = []
    for run in range(llava_runs(comparison)):
        pretraining = comparison.first_seed + run % comparison.seeds
        seed = pretraining + LLAVA_STEP * (run // comparison.seeds)
        suffix = f"seed{pretraining}" if seed == pretraining else f"seed{pretraining}-llava{seed}"
        for arm in arms_of(comparison):
            kind, argument = vision_of(comparison, arm.encoder, pretraining)
            directory = comparison.output / "cells" / f"{arm.folder}-{suffix}"
            cells.append(EncoderCell(arm.name, kind, argument, pretraining, seed, directory, arm.variant))
    return cells


def is_pretrained_anew(encoder: str) -> bool:
    """Whether each pretraining seed has an encoder of its own under this name."""
    kind, argument = parse_vision_name(encoder)
    return ("{seed}" in argument and kind not in ("random", "blind")) or (kind in RECIPES and not argument)


def llava_runs(comparison: Comparison) -> int:
    """LLaVA runs of each encoder: one more than pretraining seeds, if these can be told apart from LLaVA seeds."""
    nested = comparison.seeds > 1 and any(map(is_pretrained_anew, comparison.encoders))
    return comparison.llava_runs or comparison.seeds + nested


def encoder_groups(comparison: Comparison, *names: str) -> np.ndarray:
    """[R] numbers from 0: runs with the same number share an encoder of those called `names` (stats.shared_runs).

    Runs of a pretraining seed share the encoders that are trained anew. `random` is another encoder in every run. All
    others are the same in all runs, also `blind`, which sees nothing.
    """
    runs = np.arange(llava_runs(comparison))
    of_kind = {True: runs % comparison.seeds, "random": runs}
    named = [arm.encoder for arm in arms_of(comparison) if arm.name in names]
    keys = [is_pretrained_anew(encoder) or parse_vision_name(encoder)[0] for encoder in named]
    return shared_runs([of_kind.get(key, 0 * runs) for key in keys])


class Arm(NamedTuple):
    """One column of the report: an encoder, and the variant of the training on it."""

    name: str
    encoder: str
    variant: str

    @property
    def folder(self) -> str:
        return re.sub(r"[^\w.-]+", "-", f"{self.encoder}-{self.variant}").strip("-")


def arms_of(comparison: Comparison) -> list[Arm]:
    """Each encoder without a variant, then with each; called by kind if no other encoder is of this kind."""
    kinds = [parse_vision_name(encoder)[0] for encoder in comparison.encoders]
    names = [k if kinds.count(k) == 1 else e for k, e in zip(kinds, comparison.encoders, strict=True)]
    arms = [Arm(name, encoder, "") for name, encoder in zip(names, comparison.encoders, strict=True)]
    return arms + [Arm(f"{arm.name}, {name}", arm.encoder, name) for name, _ in comparison.variants for arm in arms]


def encoder_names(comparison: Comparison) -> list[str]:
    return [arm.name for arm in arms_of(comparison)]


def vision_of(comparison: Comparison, encoder: str, seed: int) -> tuple[str, str]:
    """(kind, argument) of an encoder in the cells of a pretraining seed, which replaces `{seed}`."""
    kind, argument = parse_vision_name(encoder)
    if kind in RECIPES and not argument:
        argument = str(pretrained_directory(comparison, kind, seed))
    elif kind in ("random", "blind") and not argument:  # the architecture of the CLIPS encoder beside them
        given = next((name for name in comparison.encoders if parse_vision_name(name)[0] == "clips"), "clips")
        argument = vision_of(comparison, given, seed)[1]
    return kind, argument.replace("{seed}", str(seed))


def pretrained_directory(comparison: Comparison, kind: str, seed: int) -> Path:
    return comparison.output / "encoders" / f"{kind}-seed{seed}"


def encoders_to_pretrain(comparison: Comparison) -> list[PretrainedEncoder]:
    """Every encoder that the cells need from here, whether or not it is there already."""
    needed = {cell.argument for cell in cells_of(comparison)}
    encoders = [
        PretrainedEncoder(kind, seed, pretrained_directory(comparison, kind, seed))
        for kind in RECIPES
        for seed in range(comparison.first_seed, comparison.first_seed + comparison.seeds)
    ]
    return [encoder for encoder in encoders if str(encoder.directory) in needed]


def samples_seen(run: Path) -> dict[str, int]:
    """Samples and steps of a pretraining run's last logged step. Raises UserError if none was logged."""
    lines = read_metrics(run, "train")
    if not lines:
        raise UserError(f"{run / METRICS} holds no training step: remove {run}, then it is pretrained again")
    return {"samples": lines[-1]["samples"], "steps": lines[-1]["step"]}
