"""Does the interval keep its promise? Differences that are none, and differences of a known size.

1. Observed: the answers of one encoder against those of the same encoder with other seeds (A/A), over many pairs of
   disjoint groups of seeds and halves of the pictures. Whatever is found there is false. Every such pair is by itself
   a comparison like any other of its size, so the share of false findings is without bias; but the pairs come from the
   same few seeds, and so agree more with each other than as many independent ones would.
2. Simulated: differences without a mean, drawn from normal effects with the variances found (mllm/compare/variance.py),
   as large as the comparison itself.

Power is the share of wins where a gap was put in: observed by turning that share of wrong answers right.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from clips.common.errors import UserError
from clips.common.escape import for_rich
from clips.common.files import read_json
from mllm.compare.statistics import independent_runs, interval, labels, over_groups, shared_runs
from mllm.compare.variance import Level, components, distinct_levels
from mllm.encoders.registry import parse_vision_name

PAIRS = 400
TRIES = 500
GAPS = (0.01, 0.02, 0.05)
AIM = (0.03, 0.07)
"""The share of false findings that an interval of 95 % may show."""


@dataclass(frozen=True)
class AnsweredRuns:
    """The right answers of several encoders' runs to the same questions."""

    scores: dict[str, np.ndarray]
    """Encoder → [R, I], 0 or 1."""
    shared: dict[str, np.ndarray]
    """Encoder → [R] groups of runs that share one of it."""
    clusters: np.ndarray
    """[I] pictures, as numbers from 0."""


@dataclass(frozen=True)
class Calibration:
    """How often an interval of one size finds what is not there, and what is."""

    about: str
    """The encoder, or the pair."""
    seeds: int
    """Independent seeds on each side."""
    pictures: int
    tries: int
    distinct: int | None
    """Different pairs of groups of seeds that there are; None where they are drawn."""
    false: float
    """Share of wins and losses where nothing differs."""
    power: dict[str, float | None]
    """Gap in points → share of wins; None where there are too few wrong answers to turn right."""


def calibrate(runs: AnsweredRuns, *, pairs: int = PAIRS, tries: int = TRIES) -> dict[str, list[dict[str, Any]]]:
    """`observed`, of every encoder with four independent seeds or more, and `simulated`, of every pair of encoders."""
    seen = (observed(name, runs, pairs=pairs) for name in runs.scores)
    drawn = (simulated(a, b, runs, tries=tries) for a, b in combinations(runs.scores, 2))
    return {
        "observed": [asdict(found) for found in seen if found is not None],
        "simulated": [asdict(found) for found in drawn if found is not None],
    }


def observed(encoder: str, runs: AnsweredRuns, *, pairs: int = PAIRS, seed: int = 0) -> Calibration | None:
    """The encoder against itself; None with fewer than two seeds on a side, which would say nothing about seeds."""
    scores, groups = runs.scores[encoder], independent_runs(runs.shared[encoder])
    seeds, pictures = int(groups.max()) + 1, int(runs.clusters.max()) + 1
    size, half = seeds // 2, pictures // 2
    if size < 2 or half < 2:
        return None
    rng, gaps = np.random.default_rng(seed), [gap for gap in GAPS if scores.mean() + gap <= 1]
    false, wins = 0, dict.fromkeys(gaps, 0)
    for _ in range(pairs):
        order, luck = rng.permutation(seeds), rng.random(scores.shape)
        chosen = np.isin(runs.clusters, rng.permutation(pictures)[:half])
        clusters = labels(runs.clusters[chosen].tolist())
        b = over_groups(scores[:, chosen], groups)[order[size : 2 * size]]
        for gap in (0.0, *gaps):
            raised = np.where(luck < gap / (1 - scores.mean()), 1.0, scores) if gap else scores
            verdict = interval(over_groups(raised[:, chosen], groups)[order[:size]] - b, clusters).verdict
            if gap:
                wins[gap] += verdict == "win"
            else:
                false += verdict != "tie"
    power = {_points(gap): wins[gap] / pairs if gap in wins else None for gap in GAPS}
    distinct = comb(seeds, size) * comb(seeds - size, size) // 2
    return Calibration(encoder, size, half, pairs, distinct, false / pairs, power)


def simulated(a: str, b: str, runs: AnsweredRuns, *, tries: int = TRIES, seed: int = 0) -> Calibration | None:
    """Differences as spread as those between two encoders, but for their mean; None with one run."""
    between = runs.scores[a] - runs.scores[b]
    shared = shared_runs([runs.shared[a], runs.shared[b]])
    groups, items = independent_runs(shared), np.arange(between.shape[1])
    if len(between) < 2 or len(items) < 2:
        return None
    rows = [("pretraining seed", shared), ("LLaVA seed", np.arange(len(between)))]
    draw = _Drawn(between, rows, [("picture", runs.clusters), ("question", items)], np.random.default_rng(seed))
    false, wins = 0, dict.fromkeys(GAPS, 0)
    for _ in range(tries):
        found = interval(over_groups(draw(), groups), runs.clusters)
        reach = found.high - found.mean
        false += abs(found.mean) > reach
        for gap in GAPS:
            wins[gap] += found.mean + gap > reach
    power: dict[str, float | None] = {_points(gap): wins[gap] / tries for gap in GAPS}
    return Calibration(
        f"{a} − {b}", int(groups.max()) + 1, int(runs.clusters.max()) + 1, tries, None, false / tries, power
    )


class _Drawn:
    """Draws [R, I] with the variances of `scores` and no mean."""

    def __init__(self, scores: np.ndarray, runs: Sequence[Level], items: Sequence[Level], rng: np.random.Generator):
        rows = [groups for _, groups in distinct_levels(runs)]
        columns = [groups for _, groups in distinct_levels(items)]
        deviations = np.sqrt(np.maximum(components(scores, rows, columns), 0))
        rows, columns = [np.zeros(len(scores), int), *rows], [np.zeros(scores.shape[1], int), *columns]
        self.rng = rng
        self.effects = [
            (float(deviations[i, j]), row, column)
            for i, row in enumerate(rows)
            for j, column in enumerate(columns)
            if deviations[i, j] > 0
        ]
        self.shape = scores.shape

    def __call__(self) -> np.ndarray:
        total = np.zeros(self.shape)
        for deviation, row, column in self.effects:
            values = self.rng.standard_normal((row.max() + 1, column.max() + 1))
            total += deviation * values[np.ix_(row, column)]
        return total


def _points(gap: float) -> str:
    return f"{100 * gap:g}"


# ---------------------------------------------------------------------------------------------- of a finished one
def stored_runs(directory: Path) -> dict[str, AnsweredRuns]:
    """File of answers → its runs, of the cells that `directory` holds. Raises UserError where they do not fit together.

    Read are `cells/*/cell.json` and `cells/*/evaluation/*.jsonl`, so that nothing of how the comparison was called is
    needed.
    """
    cells = []
    for path in sorted((directory / "cells").glob("*/cell.json")):
        record = read_json(path)
        if not {"encoder", "vision", "pretraining_seed", "seed"} <= record.keys():
            raise UserError(f"{path} is of an older comparison, which did not say its pretraining seed: run it again")
        cells.append((record["seed"], record["encoder"], record["vision"], path.parent / "evaluation"))
    if not cells:
        raise UserError(f"{directory} holds no cells of a comparison: give the --output of compare_encoders.py")
    cells.sort(key=lambda cell: cell[0])
    visions: dict[str, list[str]] = {}
    answered: dict[str, dict[str, list[list[float]]]] = {}
    asked: dict[str, list[tuple[Any, Any]]] = {}
    seeds: dict[str, list[int]] = {}
    for seed, encoder, vision, evaluation in cells:
        visions.setdefault(encoder, []).append(vision)
        seeds.setdefault(encoder, []).append(seed)
        for path in sorted(evaluation.glob("*.jsonl")):
            lines = [line for line in map(json.loads, path.read_text().splitlines()) if "correct" in line]
            questions = [(line["question_id"], line.get("image")) for line in lines]
            if not lines:
                continue
            if asked.setdefault(path.name, questions) != questions:
                raise UserError(f"{path} answers other questions than the cells before it")
            rows = answered.setdefault(path.name, {}).setdefault(encoder, [])
            rows.append([float(line["correct"]) for line in lines])
    found = {}
    for name, by_encoder in answered.items():
        if len({tuple(given) for given in seeds.values()}) > 1 or any(
            len(rows) != len(visions[encoder]) for encoder, rows in by_encoder.items()
        ):
            raise UserError(f"{directory}: not every encoder has answered {name} with every seed: finish it first")
        clusters = labels([image or f"question {number}" for number, image in asked[name]])
        shared = {encoder: _shared(visions[encoder]) for encoder in by_encoder}
        found[name] = AnsweredRuns({e: np.array(rows) for e, rows in by_encoder.items()}, shared, clusters)
    return found


def _shared(visions: Sequence[str]) -> np.ndarray:
    """As cells.encoder_groups, from what the cells say."""
    kind = parse_vision_name(visions[0])[0]
    if kind in ("random", "blind"):
        return np.arange(len(visions)) if kind == "random" else np.zeros(len(visions), int)
    return labels(visions)


def print_calibration(directory: Path, console: Console) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """What `compare_encoders.py --calibrate DIR` does: tables of every file of answers; returns what they show."""
    results = {name: calibrate(runs) for name, runs in stored_runs(directory).items()}
    for name, result in results.items():
        for way, rows in result.items():
            gaps = [f"wins at {_points(gap)} points" for gap in GAPS]
            title = for_rich(f"{name}, {way}")
            table = Table("", "seeds", "pictures", "false wins", *gaps, title=title, title_justify="left")
            for row in rows:
                power = ["–" if share is None else f"{share:.1%}" for share in row["power"].values()]
                table.add_row(
                    for_rich(row["about"]), str(row["seeds"]), str(row["pictures"]), f"{row['false']:.1%}", *power
                )
            if rows:
                console.print(table)
        for line in calibration_sentences(result):
            console.print(line, highlight=False, soft_wrap=True)
    return results


def calibration_sentences(result: dict[str, list[dict[str, Any]]]) -> list[str]:
    """What both kinds of test say, in words."""
    lines = []
    for way, rows in result.items():
        if not rows:
            continue
        share = sum(row["false"] * row["tries"] for row in rows) / sum(row["tries"] for row in rows)
        kept = "as a 95 % interval should" if AIM[0] <= share <= AIM[1] else "not as a 95 % interval should"
        less = " (fewer: it is too wide, and wins are more certain than it says)" if share < AIM[0] else ""
        more = " (more: its wins are less certain than it says)" if share > AIM[1] else ""
        lines.append(f"{way.capitalize()}: {share:.1%} false wins or losses, {kept}{less}{more}.")
    few = [row for row in result["observed"] if row["distinct"] < row["tries"]]
    if few:
        lines.append(
            f"The observed pairs are {few[0]['seeds']} seeds against {few[0]['seeds']}, of which there are only "
            f"{few[0]['distinct']} different ones: the share they show can be far from the one of many seeds."
        )
    if not result["observed"]:
        lines.append("No A/A test of the answers themselves: it needs four seeds of an encoder.")
    return lines
