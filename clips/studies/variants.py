"""Studies of pretraining: variants of the recipes, trained with several seeds, and which variant is better.

Every run is an ordinary run of scripts/pretrain_clips.py below the study's folder. A finished run is never repeated.
A `Study` says which differences decide, before anything trains. The result of each study has one JSON layout:

    variants    name → label, recipe, settings, and `runs` with their metrics in percent
    questions   key → title, variants, caution, verdict, and `contrasts`: a − b with a 95 % interval and a verdict
    looks       seeds and deciding metric of every result that was written; after more than one it has no verdicts
"""

import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from clips.common.errors import UserError
from clips.common.files import read_json
from clips.common.live import say
from clips.common.page import Page
from clips.common.rundir import by_test_set, deciding_name
from clips.config import RunConfig
from clips.evaluation.testsets import PROTOCOLS
from clips.lab.grid import Run
from clips.lab.pretraining import PretrainingRun, measured_metrics, test_metrics
from clips.lab.report import write_result
from clips.lab.run import Runner
from clips.lab.stats import Verdict, difference, show_difference, verdict

DECIDING = "sentence_r1"
"""The metric that decides: retrieval with the test set's sentences, as in the paper's own tables. If the runs have a
test set `unseen`, as on the demo, its metric decides (`clips.common.rundir.deciding_name`)."""
MEANS = {f"{protocol}_r1": (f"{protocol}_i2t_r1", f"{protocol}_t2i_r1") for protocol in PROTOCOLS}
MEANS |= {
    f"{protocol}_neg_log_rank": (f"{protocol}_i2t_log_rank", f"{protocol}_t2i_log_rank") for protocol in PROTOCOLS
}
"""Means of both directions: R@1 of a protocol, and −100 times its mean log rank, so a point is 1 % of a rank."""
METRICS = (*(name for both in MEANS.values() for name in both), "zero_shot_top1", "linear_probe_top1")
SECONDS = "train_seconds"
"""The only one of a run's metrics that is not measured on the test split."""
Rows = Mapping[str, Sequence[Mapping[str, float]]]
"""The metrics of each variant's runs."""


@dataclass(frozen=True)
class Variant:
    """A recipe with settings: one row of a study."""

    label: str
    recipe: str
    settings: tuple[str, ...] = ()
    """Settings, as in `--set`."""
    times: float = 1.0
    """Samples of a run, as a multiple of the study's."""

    def run(self, name: str, seed: int, samples: int, settings: Sequence[str] = ()) -> PretrainingRun:
        """Return the run NAME-seedN. The variant's settings come last, so that common `settings` do not undo them."""
        total = round(samples * self.times)
        return PretrainingRun(self.recipe, f"{name}-seed{seed}", total, seed, (*settings, *self.settings))


def seeded_runs(
    variants: Mapping[str, Variant], seeds: Sequence[int], samples: int, settings: Sequence[str] = ()
) -> dict[str, list[PretrainingRun]]:
    """Return the runs of each variant, one for each of `seeds`, with `samples` samples times the variant's `times`."""
    return {name: [v.run(name, seed, samples, settings) for seed in seeds] for name, v in variants.items()}


@dataclass(frozen=True)
class Hypothesis:
    """A question that a study answers by comparing pairs of variants."""

    title: str
    variants: tuple[str, ...]
    contrasts: tuple[tuple[str, str], ...]
    """Pairs (a, b): is a better than b? Each pair is decided by itself."""
    caution: str = ""
    """What else could explain a difference."""
    paper: str = ""
    """What the paper says."""


@dataclass(frozen=True)
class Study:
    """Variants, their runs for each seed, and the questions about them."""

    name: str
    """Name of the result's files: NAME.json and NAME.html."""
    title: str
    variants: Mapping[str, Variant]
    runs: Mapping[str, Sequence[PretrainingRun]]
    """The runs of each variant by its name, one for each seed."""
    questions: Mapping[str, Hypothesis]
    decides: str = DECIDING
    """The metric that decides, one of MEANS or METRICS."""

    def everything(self) -> list[PretrainingRun]:
        """Return the runs of all variants."""
        return [run for runs in self.runs.values() for run in runs]

    def planned(self, output: Path) -> list[Run]:
        """Return the `Run`s (clips/lab/grid.py) that train all variants below `output`."""
        planned = []
        for name, runs in self.runs.items():
            variant = self.variants[name]
            for run in runs:
                one = run.planned(output, name)
                planned.append(replace(one, about=" ".join([f"{one.about};", *variant.settings]).rstrip(";")))
        return planned

    def carry_out(
        self,
        output: Path,
        jobs: int,
        page: Callable[[dict[str, Any]], Page],
        *,
        dry_run: bool = False,
        more: Mapping[str, Any] | None = None,
    ) -> dict[str, Any] | None:
        """Train what is missing, write NAME.json and NAME.html into `output`, and return the result.

        Args:
            page: makes the page of the result.
            dry_run: print the plan and return None.
            more: further parts of the result.

        Raises UserError for an `output` whose runs have other settings; CommandError when a run fails.
        """
        runner = Runner(self.planned(output), jobs)
        for run in runner.runs:
            run.check()
        runner.print_plan(f"{self.title}: runs in {output}", {"decides": self.decides})
        if dry_run:
            return None
        output.mkdir(parents=True, exist_ok=True)
        begin = time.monotonic()
        was_finished = all(run.is_done() for run in runner.runs)
        runner.run(runner.runs)
        took = read_json(output / f"{self.name}.json").get("seconds") if was_finished else None
        result = self.result(output)
        result |= {"jobs": jobs, "seconds": round(time.monotonic() - begin) if took is None else took}
        result |= more or {}
        write_result(result, output, self.name, lambda: page(result))
        self._say(result, output)
        return result

    def result(self, output: Path) -> dict[str, Any]:
        """Return metrics, differences and verdicts of the finished runs in `output`."""
        runs = self.everything()
        names = measured([output / run.name for run in runs])
        seeds = max(map(len, self.runs.values()))
        before = output / f"{self.name}.json"
        written = read_json(before) if before.is_file() else {}
        first = min(run.seed for run in runs)
        looks = {f"{seeds} seeds{f' from {first}' if first else ''} by {self.decides}"}
        looks.update(written.get("looks", ["an older result"] if written else []))
        variants = {name: self._record(name, output, names) for name in self.runs}
        rows = {name: [run["metrics"] for run in variant["runs"]] for name, variant in variants.items()}
        return {
            "study": self.name,
            "command": shlex.join(["python", *sys.argv]),
            "samples": runs[0].config().samples,
            "seeds": seeds,
            "looks": sorted(looks),
            "deciding_metric": decides(list(next(iter(rows.values()))[0]), self.decides),
            "environment": environment(output / runs[0].name),
            "questions": {
                key: judge(question, rows, self.decides, kept=len(looks) == 1)
                for key, question in self.questions.items()
            },
            "variants": variants,
        }

    def _record(self, name: str, output: Path, metrics: Sequence[str]) -> dict[str, Any]:
        """Return a variant with its runs: configuration, command and metrics (percent)."""
        runs = [
            {
                "name": run.name,
                "seed": run.seed,
                "command": shlex.join(["python", *run.command(output)]),
                "metrics": run_metrics(output / run.name, metrics),
                "config": RunConfig.load(output / run.name / "config.json").to_dict(),
            }
            for run in self.runs[name]
        ]
        return {**asdict(self.variants[name]), "runs": runs}

    def _say(self, result: Mapping[str, Any], output: Path) -> None:
        for key, question in result["questions"].items():
            say(f"({key}) {question['title']}")
            for c in question["contrasts"]:
                say(f"  {c['a']} − {c['b']}: {show_difference(c)} {c['verdict']}")
        say(f"written to {output}/{self.name}.html and {self.name}.json")


def check_settings(runs: Sequence[PretrainingRun]) -> None:
    """Raise UserError for settings that a run refuses, and for seeds or samples other than those of the study."""
    for run in runs:
        config = run.config()
        if (config.train.seed, config.samples) != (run.seed, run.samples):
            would = f"would have seed {config.train.seed} and see {config.samples:,} samples"
            raise UserError(f"{run.name} {would}: --set may change neither, and --samples must be whole batches")


# ------------------------------------------------------------------------------------------- metrics and verdicts
def measured(runs: Sequence[Path]) -> list[str]:
    """Return the metrics that the test set of every run gave. Raises UserError if there are none."""
    measurements = [test_metrics(run) for run in runs]
    names = [name for name in METRICS if all(name in metrics for metrics in measurements)]
    if not names:
        raise UserError("data.test gives no metric: samples need `captions` (a list) or a `label` in their JSON")
    return names


def run_metrics(run: Path, names: Sequence[str] = METRICS) -> dict[str, float]:
    """Return a run's metrics, the means of both directions, and its training seconds."""
    metrics = measured_metrics(run, names)
    # Rounded, so that floating-point residue does not pass for a spread over seeds.
    means = {
        f"{test_set}/{name}" if test_set else name: round(
            mean(values[way] for way in both) * (-100 if name.endswith("_neg_log_rank") else 1), 6
        )
        for test_set, values in by_test_set(metrics, "").items()
        for name, both in MEANS.items()
        if set(both) <= set(values)
    }
    return metrics | means


def decides(metrics: Sequence[str], requested: str = DECIDING) -> str:
    """Return the name of the metric that decides a study: `requested`, or if that is missing the first one there is.

    If it was also measured on the held-out style, that value decides. Only `DECIDING` may be missing; for any other
    metric that the runs do not give UserError is raised.
    """
    if requested not in (DECIDING, *metrics):
        raise UserError(f"--decides {requested}: the runs give {', '.join(metrics)}")
    return deciding_name(next(name for name in (requested, *MEANS, *METRICS) if name in metrics), metrics)


def judge(question: Hypothesis, rows: Rows, requested: str = DECIDING, *, kept: bool = True) -> dict[str, Any]:
    """Return `question` as JSON, with the comparison of each of its pairs and all verdicts in one line.

    `rows` are the metrics of each variant's runs, and `requested` is the metric that decides (`decides`). Verdicts are
    "undecided" if the plan was not `kept`.
    """
    contrasts = [compared(a, b, rows, requested, kept=kept) for a, b in question.contrasts]
    return asdict(question) | {"contrasts": contrasts, "verdict": summary([c["verdict"] for c in contrasts])}


def compared(a: str, b: str, rows: Rows, requested: str = DECIDING, *, kept: bool = True) -> dict[str, Any]:
    """Return the difference a − b in the metric that decides, with interval and verdict, and the one in every metric.

    The arguments are those of `judge`.
    """
    metrics = [name for name in rows[a][0] if name != SECONDS]
    deciding = decides(metrics, requested)
    differences = {metric: difference(rows[a], rows[b], metric) for metric in metrics}
    by_seed = [[row[deciding] for row in rows[name]] for name in (a, b)]
    return {
        **{"a": a, "b": b, "metric": deciding, **differences[deciding]},
        "verdict": verdict(differences[deciding]["ci95"], *by_seed, kept=kept),
        "seeds": len(rows[a]),
        "metrics": differences,
    }


def summary(verdicts: Sequence[Verdict]) -> str:
    """Return one line for several comparisons: "win", or "1 of 3 win, 2 of 3 tie"."""
    counts = {kind: verdicts.count(kind) for kind in ("win", "loss", "tie", "undecided") if kind in verdicts}
    if len(counts) == 1:
        return verdicts[0]
    return ", ".join(f"{count} of {len(verdicts)} {kind}" for kind, count in counts.items())


# ------------------------------------------------------------------------------------------- what the runs had
def environment(run: Path) -> dict[str, Any]:
    """Return what a run recorded of its machine and packages, and the processors of this machine."""
    recorded = read_json(run / "env.json")
    names = ("python", "platform", "device", "packages")
    return {"cpus": os.cpu_count(), **{name: recorded[name] for name in names if name in recorded}}
