"""Time to quality: how many samples and seconds a recipe, or a variant of it, needs to reach a target figure.

Each run validates every few steps. It reaches the target at its first validation where all of the target's figures are
at least the threshold, on the validation split. Seconds are those of the training steps until then, with the wait for
data, without validations and checkpoints. Beside them are the processor seconds of the training process, which a busy
machine hardly changes. A run goes on to its end, where its weights are measured on the test split. A seed that never
reaches the target counts as infinitely late, and moves the median.

With several multiples of the learning rates each variant first finds its own by seed 0: the one that reaches the target
after the fewest samples, or else ends nearest to it.
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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from clips.common.errors import UserError
from clips.common.escape import for_markdown
from clips.common.files import read_json
from clips.common.page import Table, print_table
from clips.common.rundir import UNSEEN, read_metrics
from clips.config import RunConfig
from clips.data.demo import VERSION
from clips.lab.pretraining import PretrainingRun, with_rates
from clips.lab.report import Code, Page, Paragraph, Section, write_report
from clips.lab.run import Runner
from clips.studies.variants import Variant, terminal

ENOUGH_SEEDS = 3
"""A variant with fewer seeds, or with a seed that never reaches the target, has no row on the leaderboard."""
COSTS = ("samples", "seconds", "cpu_seconds", "validation_seconds")
NAME = "to-quality"


@dataclass(frozen=True)
class Target:
    figures: tuple[str, ...]
    """Names as in metrics.jsonl."""
    threshold: float
    """Percent; all of the figures must be at least that."""

    def score(self, figures: Mapping[str, Any]) -> float:
        """The lowest of the target's figures; UserError for a figure that was not measured."""
        if unknown := [name for name in self.figures if name not in figures]:
            known = ", ".join(name for name in figures if name.endswith(("_r1", "_top1")))
            raise UserError(f"--figures {' '.join(unknown)}: not measured on the validation split; there are: {known}")
        return min(figures[name] for name in self.figures)


VARIANTS = tuple(
    Variant(f"{name}-{kind}", recipe, () if kind == "muon" else (f"optim.kind={kind}",))
    for name, recipe in (("clips", "demo"), ("clip", "clip_baseline"))
    for kind in ("muon", "adamw")
)
"""What is measured without `--variant`: both objectives with both optimizers."""


def read_variants(entries: Sequence[Sequence[str]]) -> list[Variant]:
    """`NAME RECIPE [FIELD=VALUE …]` each; VARIANTS if there are none. UserError for an entry that cannot be read."""
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
    names = [variant.label for variant in found]
    if len(set(names)) < len(names):
        raise UserError(f"--variant: a name is given twice: {', '.join(names)}")
    return found


@dataclass(frozen=True)
class ToQuality:
    """The study: runs of variants at multiples of their learning rates, all validated alike."""

    output: Path
    variants: Sequence[Variant]
    target: Target
    seeds: int = 3
    every: int = 2_560
    """Samples between two validations."""
    rates: Sequence[float] = (1.0,)
    """Multiples of the learning rates."""
    data: str = "data/demo"
    device: str = "auto"

    def __post_init__(self) -> None:
        """Raise UserError for what cannot be measured, before anything trains."""
        if self.seeds < 1 or self.every < 1:
            raise UserError(f"--seeds {self.seeds} --every {self.every}: both must be at least 1")
        if not self.rates or any(not 0 < rate < math.inf for rate in self.rates):
            raise UserError(f"--rates {' '.join(map(str, self.rates))}: multiples must be above 0")
        for variant in self.variants:
            for rate in self.rates:
                run = self.run_of(variant, rate, 0)
                train = run.config().train
                if (train.eval_every, train.seed) != (self.every, 0):
                    changed = "its settings change the validations or the seed, which are the study's"
                    raise UserError(f"{run.name}: {changed}")

    def run_of(self, variant: Variant, rate: float, seed: int) -> PretrainingRun:
        name = f"{variant.label}-x{rate:g}-seed{seed}"
        settings = [f"train.eval_every={self.every}", f"data.demo_dir={json.dumps(self.data)}"]
        run = PretrainingRun(variant.recipe, name, None, seed, (*settings, *variant.settings), self.device)
        return with_rates(run, rate)

    def carry_out(self, *, dry_run: bool = False) -> dict[str, Any] | None:
        """Train what is missing, one run at a time, and write to-quality.json and to-quality.html into `output`.

        Returns the result: `variants` with the `summary` of each. A dry run prints the plan and returns None.
        """
        tried = [(v, rate, 0) for v in self.variants for rate in self.rates if len(self.rates) > 1]
        likely = [(v, self.rates[0], seed) for v in self.variants for seed in range(self.seeds)]
        self._runner(list(dict.fromkeys([*tried, *likely]))).print_plan(f"time to quality: runs in {self.output}")
        if dry_run:
            return None
        self.output.mkdir(parents=True, exist_ok=True)
        self._train(tried)
        rows: dict[str, dict[str, Any]] = {}
        for variant in self.variants:
            found = {rate: self.record(self.run_of(v, rate, 0)) for v, rate, _ in tried if v == variant}
            best = max(found, key=lambda rate: merit(found[rate])) if found else self.rates[0]
            self._train([(variant, best, seed) for seed in range(self.seeds)])
            about = {
                "recipe": variant.recipe,
                "settings": list(variant.settings),
                "rates": best,
                "searched": {f"{rate:g}": record for rate, record in found.items()},
            }
            records = [self.record(self.run_of(variant, best, seed)) for seed in range(self.seeds)]
            rows[variant.label] = about | summary(records)
        result = {
            "study": NAME,
            "command": shlex.join(["python", *sys.argv]),
            "target": asdict(self.target),
            "every": self.every,
            "seeds": self.seeds,
            "variants": rows,
        }
        result["leaderboard"], result["no_row"] = leaderboard(result)
        write_report(result, self.output, NAME, lambda: quality_page(result))
        return result

    def _runner(self, cells: Iterable[tuple[Variant, float, int]]) -> Runner:
        named = [(f"{v.label} × {rate:g}", self.run_of(v, rate, seed)) for v, rate, seed in cells]
        return Runner([run.cell(self.output, name) for name, run in named], 1, terminal(), torch.get_num_threads())

    def _train(self, cells: Sequence[tuple[Variant, float, int]]) -> None:
        runner = self._runner(cells)
        with runner.live():
            runner.run(runner.cells)

    def record(self, cell: PretrainingRun) -> dict[str, Any]:
        """What the run reached, and on which data and machine."""
        run, config = self.output / cell.name, cell.config()
        test = {name: figure["value"] for name, figure in read_json(run / "evaluation.json")["figures"].items()}
        precision = RunConfig.load(run / "config.json").train.precision  # what "auto" became
        return {
            "seed": cell.seed,
            "data": f"demo {VERSION}" if config.data.train == "demo" else config.data.train,
            "machine": f"{read_json(run / 'env.json')['device']}, {precision}",
            **reached(run, test, self.target),
        }


# ------------------------------------------------------------------------------------------- one run
def reached(run: Path, test: Mapping[str, float], target: Target) -> dict[str, Any]:
    """What it took until the target was reached, and what the run ended with.

    `test`: the figures at the end on the test split, and on artists never trained on (`UNSEEN`). The COSTS are None if
    no validation reaches the target.
    """
    steps, evals = read_metrics(run, "train"), read_metrics(run, "eval")
    first = next((line for line in evals if target.score(line) >= target.threshold), None)
    costs: dict[str, Any] = dict.fromkeys(COSTS)
    if first is not None:
        costs = {
            "samples": first["samples"],
            "seconds": seconds_until(steps, first["step"], "step_seconds"),
            "cpu_seconds": seconds_until(steps, first["step"], "step_cpu_seconds"),
            "validation_seconds": sum(v["validation_seconds"] for v in evals if v["step"] <= first["step"]),
        }
    return {
        **{key: value if value is None else round(value, 1) for key, value in costs.items()},
        "samples_of_the_run": evals[-1]["samples"],
        "last": {name: evals[-1][name] for name in target.figures},
        "distance": max(0.0, target.threshold - target.score(evals[-1])),
        "test": {name: test.get(name) for name in target.figures},
        UNSEEN: {name: test.get(f"{UNSEEN}/{name}") for name in target.figures},
    }


def seconds_until(lines: Sequence[Mapping[str, Any]], step: int, each: str) -> float:
    """Seconds of the first `step` steps; `each` of a line of metrics.jsonl is the mean since the line before."""
    total, done = 0.0, 0
    for line in lines:
        until = min(line["step"], step)
        total, done = total + (until - done) * line[each], until
    return total


def merit(record: Mapping[str, Any]) -> tuple[float, float]:
    """What chooses a learning rate: few samples to the target, then little distance at the end."""
    return -_or_never(record["samples"]), -record["distance"]


# ------------------------------------------------------------------------------------------- over seeds
def summary(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How many seeds reached the target, and "median", "lowest" and "highest" of each of COSTS; None means never."""
    costs = {}
    for name in COSTS:
        values = [_or_never(record[name]) for record in records]
        found = {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}
        costs[name] = {key: value if value < math.inf else None for key, value in found.items()}
    return {"reached": sum(record["samples"] is not None for record in records), **costs, "runs": list(records)}


def _or_never(value: float | None) -> float:
    return math.inf if value is None else value


def spread(cost: Mapping[str, float | None]) -> str:
    """`48,640 [46,080–51,200]`, the median and the range over seeds."""
    median, low, high = (
        "not reached" if value is None else f"{value:,.0f}"
        for value in (cost[key] for key in ("median", "lowest", "highest"))
    )
    return median if low == high else f"{median} [{low}–{high}]"


def means(variant: Mapping[str, Any], when: str) -> str:
    """`96.9 / 96.1`: the target's figures, each its mean over seeds."""
    columns = zip(*(run[when].values() for run in variant["runs"]), strict=True)
    return " / ".join("–" if None in values else f"{statistics.mean(values):.1f}" for values in columns)


HEAD = (
    *("variant", "rates", "reached", "samples", "of", "seconds", "processor s", "validating s", "last validation"),
    *("unseen artist", "test"),
)


def table_rows(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A row of each variant, with the columns of HEAD."""
    return [
        (
            *(name, f"× {v['rates']:g}", f"{v['reached']} of {found['seeds']}", spread(v["samples"])),
            f"{v['runs'][0]['samples_of_the_run']:,}",
            *(spread(v[cost]) for cost in COSTS[1:]),
            *(means(v, when) for when in ("last", UNSEEN, "test")),
        )
        for name, v in found["variants"].items()
    ]


def quality_page(result: Mapping[str, Any]) -> Page:
    target = result["target"]
    note = f"{', '.join(target['figures'])} ≥ {target['threshold']:g} on the validation split, {result['seeds']} seeds"
    rows = Code("\n".join([*result["no_row"], *result["leaderboard"]]), wraps=True)
    words = "Median [lowest–highest] over seeds. A seed that never reaches the target counts as infinitely late."
    sections = [
        Section("What it took", [Paragraph(words), Table(HEAD, table_rows(result))]),
        Section("Rows for docs/leaderboard.md", [rows]),
        Section("How it was run", [Paragraph(result["command"], "Command")]),
    ]
    return Page("Time to quality", note, sections)


def print_result(result: Mapping[str, Any] | None) -> None:
    """Print the table, and the rows of the leaderboard, on stdout; nothing for a dry run."""
    if result is not None:
        print_table("time to quality", HEAD, table_rows(result))
        print("\n".join(["", *result["no_row"], "", *result["leaderboard"]]))


# ------------------------------------------------------------------------------------------- leaderboard
COLUMNS = (
    *("date", "change", "commit", "machine", "target", "samples", "seconds", "processor s"),
    *("unseen artist", "test"),
)
"""Of the table in docs/leaderboard.md."""


def leaderboard(found: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Rows for docs/leaderboard.md, ready to paste, and why the other variants have no row."""
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
        cells = (
            *(datetime.date.today().isoformat(), for_markdown(change), commit(), machine),
            f"{data}: {', '.join(target['figures'])} ≥ {target['threshold']:g}",
            *(spread(variant[cost]) for cost in ("samples", "seconds", "cpu_seconds")),
            *(means(variant, when) for when in (UNSEEN, "test")),
        )
        rows.append(f"| {' | '.join(cells)} |")
    return rows, without


def commit() -> str:
    """The commit of this code, with `-dirty` if it was changed since; "unknown" outside a repository."""
    try:
        command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"
