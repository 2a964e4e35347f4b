"""Time to quality: how many samples and seconds a recipe, or a variant of it, needs to reach a target figure.

A cell is an ordinary run of scripts/pretrain_clips.py under `output`/ that validates every few steps; one that is
finished is never run again. It reaches the target at its first validation at which all of the target's figures are at
least the threshold: on the validation split, whole as long as it has no more than `eval.max_images` pictures. Seconds
are those of the training steps up to there, the wait for data included, validations and checkpoints not; beside them
are the processor seconds of the training process, which a busy machine hardly changes, and what the validations took.
A run goes on to its end, where its weights are measured on the test split. A seed that never gets there counts as
infinitely late: it is told, and moves the median.

With several multiples of the learning rates each variant first finds its own, by seed 0 over its whole budget: that
which reaches the target after the fewest samples, or else the one that ends nearest to it. With `average` the mean of
the weights of so many checkpoints, one at each validation, is measured too, after the run: in any ZeRO stage, since
checkpoints are whole, and at no cost to the training.
"""

from __future__ import annotations

import datetime
import json
import math
import re
import shlex
import statistics
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from clips.common.errors import UserError
from clips.common.escape import for_markdown
from clips.common.files import read_json, write_json
from clips.common.rundir import UNSEEN, checkpoints, read_metrics
from clips.common.runtime import choose_device
from clips.config import RunConfig
from clips.data.demo import VERSION
from clips.evaluation.evaluate import evaluate
from clips.lab.pretraining import PretrainingRun, train, with_rates
from clips.studies.measuring import Row
from clips.weights import checkpoint
from clips.weights.load import load_model

ENOUGH_SEEDS = 3
"""Without as many, all of which get there, a variant has no row on the leaderboard."""
COSTS = ("samples", "seconds", "cpu_seconds", "validation_seconds")


@dataclass(frozen=True)
class Target:
    figures: tuple[str, ...]
    """Names as in metrics.jsonl."""
    threshold: float
    """In percent; all of them must be at least that."""

    def score(self, figures: Mapping[str, Any]) -> float:
        """The lowest of the target's figures; UserError where one was not measured."""
        if unknown := [name for name in self.figures if name not in figures]:
            known = ", ".join(name for name in figures if name.endswith(("_r1", "_top1")))
            raise UserError(f"--figures {' '.join(unknown)}: not measured on the validation split; there are: {known}")
        return min(figures[name] for name in self.figures)


@dataclass(frozen=True)
class Variant:
    name: str
    recipe: str
    settings: tuple[str, ...] = ()
    """As in `--set`."""


VARIANTS = (
    Variant("clips-muon", "demo"),
    Variant("clips-adamw", "demo", ("optim.kind=adamw",)),
    Variant("clip-muon", "clip_baseline"),
    Variant("clip-adamw", "clip_baseline", ("optim.kind=adamw",)),
)
"""What is measured where no `--variant` is given: both objectives with both optimizers."""


def read_variants(entries: Sequence[Sequence[str]]) -> list[Variant]:
    """`NAME RECIPE [FIELD=VALUE …]` each; VARIANTS where there are none. UserError for one that cannot be read."""
    if not entries:
        return list(VARIANTS)
    found = []
    for name, *rest in entries:
        if not re.fullmatch(r"[\w.-]+", name) or not rest or "=" in rest[0]:
            raise UserError(
                f"--variant {shlex.join([name, *rest])}: give a name, which becomes a folder's, a recipe, and then "
                "fields as in --set, such as: --variant short demo phases.0.samples=48000 phases.0.schedule=linear"
            )
        found.append(Variant(name, rest[0], tuple(rest[1:])))
    if len({variant.name for variant in found}) < len(found):
        raise UserError(f"--variant: a name is given twice: {', '.join(variant.name for variant in found)}")
    return found


def to_quality(
    output: Path,
    variants: Sequence[Variant],
    target: Target,
    *,
    seeds: int = 3,
    every: int = 2_560,
    rates: Sequence[float] = (1.0,),
    average: int = 0,
    demo_dir: str = "data/demo",
    device: str = "auto",
) -> dict[str, Any]:
    """Train what is missing, one run at a time, and return what was found: see `summary` of each variant.

    `every`: samples between two validations. `rates`: multiples of the learning rates. `average`: see above; 0, none.
    UserError for what cannot be measured so.
    """
    if average == 1 or average < 0:
        raise UserError(f"--average {average}: give the number of checkpoints, at least 2, or 0 for none")
    if not rates or any(not 0 < rate < math.inf for rate in rates):
        raise UserError(f"--rates {' '.join(map(str, rates))}: multiples must be above 0")
    study = _Study(output, target, every, average, demo_dir, device)
    for variant in variants:
        for rate in rates:
            study.check(study.cell(variant, rate, 0))  # a setting that is refused is so before anything trains
    output.mkdir(parents=True, exist_ok=True)
    if len(rates) > 1:
        study.measure([study.cell(variant, rate, 0) for variant in variants for rate in rates])
    rows: dict[str, dict[str, Any]] = {}
    for variant in variants:
        tried = {rate: study.record(study.cell(variant, rate, 0)) for rate in rates} if len(rates) > 1 else {}
        best = max(tried, key=lambda rate: merit(tried[rate]["weights"])) if tried else rates[0]
        cells = [study.cell(variant, best, seed) for seed in range(seeds)]
        study.measure(cells)
        records = [study.record(cell) for cell in cells]
        about = {
            "recipe": variant.recipe,
            "settings": list(variant.settings),
            "rates": best,
            "searched": {f"{rate:g}": found["weights"] for rate, found in tried.items()},
        }
        rows[variant.name] = about | summary([record["weights"] for record in records])
        if average:
            means = [record["mean"] for record in records]
            rows[f"{variant.name}, mean of {average}"] = about | {"average": average} | summary(means)
    return {
        "command": shlex.join(["python", *sys.argv]),
        "target": asdict(target),
        "every": every,
        "seeds": seeds,
        "variants": rows,
    }


@dataclass(frozen=True)
class _Study:
    """What all cells share."""

    output: Path
    target: Target
    every: int
    average: int
    demo_dir: str
    device: str

    def cell(self, variant: Variant, rate: float, seed: int) -> PretrainingRun:
        """Averages need a checkpoint at each validation: those runs have names of their own."""
        name = f"{variant.name}-x{rate:g}-seed{seed}"
        settings = [f"train.eval_every={self.every}", f"data.demo_dir={json.dumps(self.demo_dir)}"]
        if self.average:
            name += "-kept"
            settings += [f"train.checkpoint_every={self.every}", f"train.keep_every={self.every}"]
        run = PretrainingRun(variant.recipe, name, None, seed, (*settings, *variant.settings), self.device)
        return with_rates(run, rate)

    def check(self, cell: PretrainingRun) -> None:
        """UserError unless `cell` is measured as all others are."""
        config = cell.config().train
        if (config.eval_every, config.seed) != (self.every, cell.seed):
            raise UserError(f"{cell.name}: its settings change the validations or the seed, which are the study's")

    def measure(self, cells: Sequence[PretrainingRun]) -> None:
        console = Console(emoji=False, stderr=True)
        train(cells, self.output, 1, console, threads=torch.get_num_threads())
        if self.average:
            for cell in cells:
                measure_averages(self.output / cell.name, self.average, self.device)

    def record(self, cell: PretrainingRun) -> dict[str, Any]:
        """What the run's own weights reached ("weights") and, with `average`, their means ("mean")."""
        run, config = self.output / cell.name, cell.config()
        test = {name: figure["value"] for name, figure in read_json(run / "evaluation.json")["figures"].items()}
        found = {"weights": reached(run, read_metrics(run, "eval"), test, self.target)}
        if self.average:
            averaged = read_json(averages_file(run, self.average))
            found["mean"] = reached(run, averaged["eval"], averaged["test"], self.target)
        precision = RunConfig.load(run / "config.json").train.precision  # what "auto" became
        about = {
            "seed": cell.seed,
            "data": f"demo {VERSION}" if config.data.train == "demo" else config.data.train,
            "machine": f"{read_json(run / 'env.json')['device']}, {precision}",
        }
        return {key: about | value for key, value in found.items()}


# ------------------------------------------------------------------------------------------------------- one run
def reached(run: Path, evals: Sequence[Mapping[str, Any]], test: Mapping[str, float], target: Target) -> dict[str, Any]:
    """What it took until the target was reached, and what the run ended with.

    `evals`: a line for each validation with its `step`, `samples` and figures, in order; `test`: the figures at the
    end on the test split, and on artists never trained on (`UNSEEN`) where it has them. The COSTS are None where no
    validation reaches the target.
    """
    steps, validations = read_metrics(run, "train"), read_metrics(run, "eval")
    first = next((line for line in evals if target.score(line) >= target.threshold), None)
    costs: dict[str, Any] = dict.fromkeys(COSTS)
    if first is not None:
        costs = {
            "samples": first["samples"],
            "seconds": seconds_until(steps, first["step"], "step_seconds"),
            "cpu_seconds": seconds_until(steps, first["step"], "step_cpu_seconds"),
            "validation_seconds": sum(v["validation_seconds"] for v in validations if v["step"] <= first["step"]),
        }
    return {
        **{key: value if value is None else round(value, 1) for key, value in costs.items()},
        "samples_of_the_run": validations[-1]["samples"],
        "last": {name: evals[-1][name] for name in target.figures},
        "distance": max(0.0, target.threshold - target.score(evals[-1])),
        "test": {name: test.get(name) for name in target.figures},
        UNSEEN: {name: test.get(f"{UNSEEN}/{name}") for name in target.figures},
    }


def seconds_until(lines: Sequence[Mapping[str, Any]], step: int, each: str) -> float:
    """Of the first `step` steps; the field `each` of a line of metrics.jsonl is the mean of the steps since the last.

    Between two lines every step counts alike.
    """
    total, done = 0.0, 0
    for line in lines:
        until = min(line["step"], step)
        total, done = total + (until - done) * line[each], until
    return total


def merit(record: Mapping[str, Any]) -> tuple[float, float]:
    """What a learning rate is chosen by: few samples to the target, and without it little distance at the end."""
    return -_or_never(record["samples"]), -record["distance"]


# ------------------------------------------------------------------------------------------------------- averages
def averages_file(run: Path, count: int) -> Path:
    return run / f"averages-{count}.json"


def measure_averages(run: Path, count: int, device: str = "auto") -> None:
    """Validate the mean of each `count` checkpoints in a row, and test that of the last ones; once.

    `averages_file` gets "eval", a line with the step and samples of the newest of them and the figures, and "test".
    UserError for a run with fewer checkpoints.
    """
    out = averages_file(run, count)
    if out.is_file():
        return
    paths = checkpoints(run)[::-1]
    if len(paths) < count:
        raise UserError(f"--average {count}: {run} has {len(paths)} checkpoints: average fewer, or validate more often")
    loaded = load_model(paths[-1])
    model, config = loaded.model.to(choose_device(device)), loaded.run
    weights: deque[dict[str, Tensor]] = deque(maxlen=count)
    lines = []
    for path in paths:
        found = checkpoint.load(path, "checkpoint")
        weights.append(found.weights())
        if len(weights) == count:
            size = config.phases[min(found.state.phase, len(config.phases) - 1)].image_size
            model.load_state_dict(mean_of(weights))
            figures = evaluate(model, loaded.tokenizer, config, "val", image_size=size)
            at = {"step": found.state.step, "samples": found.state.samples}
            lines.append(at | {name: figure.value for name, figure in figures.items()})
    figures = evaluate(model, loaded.tokenizer, config, "test", image_size=config.phases[-1].image_size)
    write_json(out, {"eval": lines, "test": {name: figure.value for name, figure in figures.items()}})


def mean_of(weights: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each parameter."""
    held = list(weights)
    return {name: torch.stack([one[name] for one in held]).mean(0) for name in held[0]}


# ------------------------------------------------------------------------------------------------------- over seeds
def summary(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How many seeds got there, and of each of COSTS "median", "lowest" and "highest": None stands for never."""
    costs = {}
    for name in COSTS:
        values = [_or_never(record[name]) for record in records]
        found = {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}
        costs[name] = {key: value if value < math.inf else None for key, value in found.items()}
    return {"reached": sum(record["samples"] is not None for record in records), **costs, "runs": list(records)}


def _or_never(value: float | None) -> float:
    return math.inf if value is None else value


def table_rows(found: Mapping[str, Any]) -> list[Row]:
    """A row of each variant, for people."""
    rows: list[Row] = []
    for name, variant in found["variants"].items():
        rows.append({
            "variant": name,
            "rates": f"× {variant['rates']:g}",
            "reached": f"{variant['reached']} of {found['seeds']}",
            "samples": spread(variant["samples"]),
            "of": f"{variant['runs'][0]['samples_of_the_run']:,}",
            "seconds": spread(variant["seconds"]),
            "processor_s": spread(variant["cpu_seconds"]),
            "validating_s": spread(variant["validation_seconds"]),
            "last_validation": means(variant, "last"),
            UNSEEN: means(variant, UNSEEN),
            "test": means(variant, "test"),
        })  # fmt: skip
    return rows


def spread(cost: Mapping[str, float | None]) -> str:
    """`48,640 [46,080–51,200]`, the median and the range over seeds."""
    median, low, high = (_count(cost[key]) for key in ("median", "lowest", "highest"))
    return median if low == high else f"{median} [{low}–{high}]"


def _count(value: float | None) -> str:
    return "not reached" if value is None else f"{value:,.0f}"


def means(variant: Mapping[str, Any], when: str) -> str:
    """`96.9 / 96.1`: the target's figures, each its mean over seeds."""
    columns = zip(*(run[when].values() for run in variant["runs"]), strict=True)
    return " / ".join("–" if None in values else f"{statistics.mean(values):.1f}" for values in columns)


# ------------------------------------------------------------------------------------------------------- leaderboard
COLUMNS = (
    *("date", "change", "commit", "machine", "target", "samples", "seconds", "processor s"),
    *("unseen artist", "test"),
)
"""Of the table in docs/leaderboard.md."""


def leaderboard(found: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Rows for docs/leaderboard.md, ready to paste, and why the other variants have none."""
    rows, without = [], []
    for name, variant in found["variants"].items():
        if variant["reached"] < found["seeds"] or found["seeds"] < ENOUGH_SEEDS:
            reached_by = f"reached by {variant['reached']} of {found['seeds']} seeds"
            without.append(f"{name}: no row, {reached_by}; a row needs {ENOUGH_SEEDS} or more and all of them")
            continue
        change = f"{name}: {' '.join([variant['recipe'], *variant['settings']])}"
        change += f", rates × {variant['rates']:g}" if variant["rates"] != 1 else ""
        target = found["target"]
        data, machine = (
            for_markdown(" / ".join(sorted({run[key] for run in variant["runs"]}))) for key in ("data", "machine")
        )
        cells = {
            "date": datetime.date.today().isoformat(),
            "change": for_markdown(change),
            "commit": commit(),
            "machine": machine,
            "target": f"{data}: {', '.join(target['figures'])} ≥ {target['threshold']:g}",
            "samples": spread(variant["samples"]),
            "seconds": spread(variant["seconds"]),
            "processor s": spread(variant["cpu_seconds"]),
            "unseen artist": means(variant, UNSEEN),
            "test": means(variant, "test"),
        }
        rows.append(f"| {' | '.join(cells[column] for column in COLUMNS)} |")
    return rows, without


def commit() -> str:
    """Of this code, with `-dirty` where it was changed since; "unknown" outside a repository."""
    try:
        command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"
