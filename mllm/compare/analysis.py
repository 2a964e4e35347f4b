"""The metrics of a comparison: scores of each encoder's models, differences between encoders, and report.json.

Except for time, machine and command, everything is computed from the files in the comparison's directory, without a
model and without torch, so that verify.py can recompute it elsewhere.

Scores are fractions. Shapes: R runs of an encoder · S independent ones among them · I questions.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, combinations
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

from clips.common.errors import UserError
from clips.common.files import read_json, sha256, write_json
from clips.common.rundir import METRICS
from clips.lab.grid import COST, RECORD, what_was_fixed
from clips.lab.stats import (
    FEWEST_SEEDS,
    Estimate,
    detectable,
    independent_runs,
    interval,
    labels,
    over_groups,
    over_runs,
    shared_runs,
    verdict,
)
from mllm.compare.comparison import (
    COLUMNS,
    PLAN,
    Comparison,
    EncoderRun,
    columns_of,
    deciding,
    is_pretrained_anew,
    of_deciding_column,
    samples_seen,
    stored_questions,
)
from mllm.data.questions import LIKELIHOODS, images_of, read_questions
from mllm.encoders.registry import parse_vision_name
from mllm.evaluation.cider import cider
from mllm.evaluation.scores import Exactness, exactness, scorer_version
from mllm.training.recipes import STAGES

ASKED = ("question_id", "prompt", "image", "kind", "expected")
"""Fields of an answer line that must be the same in all runs."""
EXAMPLES = 6
"""Most examples for each of the two ways in which a pair of models can differ."""
LOOSE_WAYS: tuple[Exactness, ...] = ("normalised", "prefix")
NEEDS_IMAGE = "needs_image"
REPORT = "report.json"
ENCODERS = "encoders.json"
"""The file with the metrics of each run's encoder alone, and the data of its pretraining."""
RECORDS = (
    *(RECORD, "config.json", "env.json", COST, "evaluation/results.json"),
    *(f"{stage.name}/done.json" for stage in STAGES.values()),
)
Lines = dict[EncoderRun, list[dict[str, Any]]]
NO_ANSWER = " in generating"
"""Text that lmms-eval logs if `generate` raised an error. It then scores an empty answer."""
PROBE = "probe_tokens_top1"
"""Linear probe on the mean of the projector's input tokens, which is the same method for every encoder."""
RUN_VARIANCE = 1.84e-4
ENCODER_VARIANCE = 1.84e-4
ANSWER_VARIANCE = 1.58e-4
IMAGE_VARIANCE = 0.30e-4
"""Variances of the difference in right answers between two encoders: between LLaVA runs on the same encoders, between
pretraining runs, and, both for `OF_QUESTIONS` questions, between single answers and between images. Only the last two
shrink with more questions; they are those of docs/results/drawings.json. The first two are what was left of the spread
in an earlier comparison of five seeds with one LLaVA run on each encoder, half of it each, because such a design cannot
separate them. The spread in drawings.json is smaller, which may be luck, so the larger one counts."""
OF_QUESTIONS = 1280


@dataclass
class ItemScores:
    """One metric of every encoder's models, question by question."""

    clusters: np.ndarray
    """[I] image names, because the questions about one image are resampled together."""
    by_encoder: dict[str, np.ndarray]
    """Scores [R, I] of each encoder's runs."""
    column: str
    kind: str | None = None

    def only(self, items: np.ndarray, kind: str | None = None) -> ItemScores:
        """Return the scores for the questions that the mask `items` [I] selects."""
        by_encoder = {name: scores[:, items] for name, scores in self.by_encoder.items()}
        return ItemScores(self.clusters[items], by_encoder, self.column, kind)


# ------------------------------------------------------------------------------------------- report.json
def keep_encoders(output: Path, measured: Mapping[EncoderRun, dict[str, dict[str, Any]]]) -> None:
    """Write OUTPUT/encoders.json. `measured` holds the metrics of the encoders alone (mllm/compare/probe.py)."""
    records = {run.name: {"metrics": metrics, "pretraining": _pretraining(run)} for run, metrics in measured.items()}
    write_json(output / ENCODERS, records)


def collect(comparison: Comparison, plan: Mapping[str, Any], command: Sequence[str]) -> dict[str, Any]:
    """Return the content of report.json. `plan` is what the flags ask for now (mllm/compare/comparison.py)."""
    machine = {"cores": os.cpu_count(), "jobs": comparison.jobs}
    return {
        "command": shlex.join(["python", *command]),
        "time": time.strftime("%Y-%m-%d %H:%M %Z"),
        "environment": comparison.runs[0].read("env.json") | machine,
        **computed(comparison, plan),
    }


def computed(comparison: Comparison, plan: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of report.json that is computed from the files of the comparison."""
    runs = comparison.runs
    questions = stored_questions(comparison.output)
    answers = read_answers(runs, questions) if plan["questions"] else {}
    scores = item_scores(answers, questions) if answers else {}
    fixed = what_was_fixed(comparison.output / PLAN, plan)
    metrics, differences = compare_scores(comparison, scores, kept=fixed["kept"])
    benchmarks, benchmark_differences = compare_benchmarks(comparison)

    return {
        "plan": plan,
        "fixed": fixed,
        "scorer": scorer_version(),
        "settings": _settings(comparison, plan) | {"columns": columns_of(questions)},
        "encoders": {
            name: {"metrics": metrics[name], "benchmarks": benchmarks.get(name, {})} | _encoder(comparison, name)
            for name in comparison.names
        },
        "differences": differences,
        **({"loose_answers": loose_answers(answers)} if answers else {}),
        **({"benchmark_differences": benchmark_differences} if comparison.benchmarks else {}),
        "runs": [_run_record(run, comparison.output, comparison.benchmarks) for run in runs],
        "examples": pick_examples(answers) if answers else [],
        "files": {name: sha256(comparison.output / name) for name in stored_files(comparison)},
    }


def stored_files(comparison: Comparison) -> list[str]:
    """Return the files from which the report is computed, as sorted paths relative to the comparison's directory."""
    output, questions = comparison.output, stored_questions(comparison.output)
    files = [output / PLAN, output / ENCODERS, *questions.values()]
    for run in comparison.runs:
        files += [run.directory / name for name in RECORDS]
        files += [run.evaluation / f"{name}.jsonl" for name in questions]
        files += [results for task in comparison.benchmarks if (results := newest_results(run.directory, task))]
    return sorted(path.relative_to(output).as_posix() for path in files if path.is_file())


def _encoder(comparison: Comparison, name: str) -> dict[str, Any]:
    """Return the description of an encoder, its metrics without a language model, and the cost of its runs."""
    runs = [run for run in comparison.runs if run.encoder == name]
    groups = independent_runs(encoder_groups(comparison, name))
    records = read_json(comparison.output / ENCODERS)
    of_runs = [records[run.name] for run in runs]
    by_run = [record["metrics"] for record in of_runs]
    intrinsic = {}
    for metric, first in by_run[0].items():
        if all(metric in metrics for metrics in by_run):
            about = {"chance": first["chance"], "items": first["items"], "test_set": first.get("test_set")}
            intrinsic[metric] = over_seeds([metrics[metric]["value"] for metrics in by_run], groups) | about
    return {
        "kind": runs[0].kind,
        "intrinsic": intrinsic,
        "described": runs[0].read("config.json")["instruct"]["facts"]["vision encoder"],
        "pretraining": [record["pretraining"] for record in of_runs if record["pretraining"]],
        "cost": _cost(runs),
    }


def _settings(comparison: Comparison, plan: Mapping[str, Any]) -> dict[str, Any]:
    runs = comparison.runs
    run = runs[0]
    config = run.read("config.json")
    stages = {}
    for stage in STAGES.values():
        trains = config[stage.name]["trains"]
        done = run.read(f"{stage.name}/done.json")
        stages[stage.name] = {
            **{name: done[name] for name in ("samples", "steps")},
            **{name: trains[name] for name in ("batch_size", "learning_rate")},
            "trains": config[stage.name]["freeze"],
            "projector": plan["budget"]["projector"][stage.name],
        }
    return {
        "encoders": list(comparison.encoders),
        "seeds": comparison.seeds,
        "llava_runs": comparison.runs_per_encoder,
        "quick": comparison.quick,
        "budget_share": plan["budget"]["share"],
        "distinct_encoders": {
            name: len({run.fingerprint() for run in runs if run.encoder == name}) for name in comparison.names
        },
        "is_demo": plan["is_demo"],
        "train_flags": list(comparison.train_flags),
        "language_model": config["instruct"]["facts"]["language model"],
        "stages": stages,
        "evaluation": run.read(RECORD)["evaluation"],
        "benchmarks": list(comparison.benchmarks),
    }


def _run_record(run: EncoderRun, output: Path, benchmarks: Sequence[str]) -> dict[str, Any]:
    return {
        **{name: getattr(run, name) for name in ("encoder", "pretraining_seed", "seed", "seeds")},
        "vision": run.read(RECORD)["vision"],
        "directory": run.directory.relative_to(output).as_posix(),
        "config": run.read("config.json"),
        "metrics": read_json(run.metrics),
        "benchmarks": benchmark_results(run.directory, benchmarks),
        "cost": run.read(COST),
    }


def _pretraining(run: EncoderRun) -> dict[str, Any] | None:
    """Return the run that pretrained this run's encoder here and its number of samples, or None if there is none."""
    pretrained = run.pretraining_run
    if pretrained is None or not all((pretrained / name).is_file() for name in ("config.json", METRICS)):
        return None
    config = read_json(pretrained / "config.json")
    made = {"run": str(pretrained), "recipe": config["recipe"], "seed": config["train"]["seed"]}
    return made | samples_seen(pretrained)


def _cost(runs: list[EncoderRun]) -> dict[str, float]:
    """Return the mean wall-clock seconds of each part over the runs, the training speed, and the largest memory.

    The time of a part is missing if its command was killed after the part was finished.
    """
    costs = [run.read(COST) for run in runs]
    every = dict.fromkeys(part for by_part in costs for part in by_part)
    parts = {part: mean(by_part[part] for by_part in costs if part in by_part) for part in every}
    cost = parts | {"seconds": sum(parts.values())}
    for stage in STAGES.values():
        done = [run.read(f"{stage.name}/done.json") for run in runs]
        cost[f"{stage.name}_samples_per_s"] = mean(row["samples_per_s"] for row in done)
        cost["peak_memory_gb"] = max(cost.get("peak_memory_gb", 0.0), *(row["peak_memory_gb"] for row in done))
    return cost


# ------------------------------------------------------------------------------------------- right answers
def read_answers(runs: Sequence[EncoderRun], questions: Iterable[str]) -> Lines:
    """Read each run's answers to the files `questions`. Raises UserError if a run answered other questions."""
    answers: Lines = {}
    names = list(questions)
    for run in runs:
        answers[run] = []
        for name in names:
            lines = (run.evaluation / f"{name}.jsonl").read_bytes().splitlines()
            answers[run] += [json.loads(line) | {"file": name} for line in lines]
        asked = [[{key: line.get(key) for key in ASKED} for line in answers[c]] for c in (run, runs[0])]
        if asked[0] != asked[1]:
            raise UserError(f"run {run.name} answered other questions than {runs[0].name}: remove {run.evaluation}")
    return answers


def item_scores(answers: Lines, questions: Mapping[str, Path]) -> dict[str, ItemScores]:
    """Score every answer of every run, and return the scores of each question by metric.

    Metrics are `accuracy`, `cider_d` for questions with references, `log_likelihood` and `share` if they were measured,
    and `needs_image`: the accuracy of the encoders other than blind ones, on those questions of the deciding column
    that blind models get wrong (left out if these are all or none). If there are several kinds of question, all but
    `cider_d` and `needs_image` are also given as METRIC/KIND. Metrics of other columns than the deciding one end with
    @COLUMN.

    Args:
        answers: the answer lines of each run, as `read_answers` returns them.
        questions: the question files by name of the answer file.
    """
    first = next(iter(answers.values()))
    deciding, *others = columns_of(line["file"] for line in first)
    metrics = _scores_of_column(answers, questions, deciding)
    for column in others:
        by_column = _scores_of_column(answers, questions, column)
        metrics |= {f"{name}@{column}": metric for name, metric in by_column.items()}

    overall = metrics.get("accuracy")
    if overall is not None:
        blind = {run.encoder for run in answers if run.kind == "blind"}
        left = ~solved_blind(overall, blind)
        if left.any() and not left.all():
            metric = metrics[NEEDS_IMAGE] = overall.only(left)
            for name in blind:
                del metric.by_encoder[name]
    return metrics


def _scores_of_column(answers: Lines, questions: Mapping[str, Path], column: str) -> dict[str, ItemScores]:
    first = next(iter(answers.values()))
    items = [i for i, line in enumerate(first) if COLUMNS.get(line["file"], line["file"]) == column]
    scored = [i for i in items if "correct" in first[i]]
    metrics: dict[str, ItemScores] = {}
    kinds = np.array([first[i]["kind"] for i in scored])
    for field in ("correct", *LIKELIHOODS) if scored else ():
        if field not in first[scored[0]]:
            continue
        name = "accuracy" if field == "correct" else field
        values = {run: [float(lines[i][field]) for i in scored] for run, lines in answers.items()}
        overall = metrics[name] = _item_scores(first, scored, values, column)
        for kind in dict.fromkeys(kinds.tolist()) if len(set(kinds)) > 1 else ():
            metrics[f"{name}/{kind}"] = overall.only(kinds == kind, kind)

    references = {
        (file, json.dumps(question.id), question.text, question.images): question.references  # ids may repeat
        for file, path in questions.items()
        for question in read_questions(path)
    }
    keys = [(line["file"], json.dumps(line["question_id"]), line["prompt"], images_of(line)) for line in first]
    described = [i for i in items if references.get(keys[i])]
    if described:
        texts = [references[keys[i]] for i in described]
        values = {run: cider([lines[i]["text"] for i in described], texts)[1] for run, lines in answers.items()}
        metrics["cider_d"] = _item_scores(first, described, values, column)
    return metrics


def _item_scores(
    first: Sequence[Mapping[str, Any]], items: Sequence[int], values: Mapping[EncoderRun, list[float]], column: str
) -> ItemScores:
    """Gather `values`, run → score of each question, by encoder. `items` are indices into the `first` run's lines."""
    clusters = np.array([" ".join(images_of(first[i])) or f"question {first[i]['question_id']}" for i in items])
    rows = defaultdict(list)
    for run, scores in values.items():
        rows[run.encoder].append(scores)
    return ItemScores(clusters, {encoder: np.array(by_run) for encoder, by_run in rows.items()}, column)


def compare_scores(
    comparison: Comparison, scored: dict[str, ItemScores], *, kept: bool = True
) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """Return the metrics of each encoder, keyed by encoder and metric, and a row for each pair's difference.

    Each has mean and interval over runs and images. Verdicts are "undecided" if the plan was not `kept`.
    """
    names = comparison.names
    summary: dict[str, dict[str, Any]] = {encoder: {} for encoder in names}
    differences = []
    for name, metric in scored.items():
        clusters = labels(metric.clusters.tolist())
        about = {"items": len(clusters), "kind": metric.kind, "column": metric.column}
        for encoder, scores in metric.by_encoder.items():
            groups, estimate = _estimated(comparison, scores, clusters, encoder)
            summary[encoder][name] = {**over_seeds(scores.mean(1).tolist(), groups), "ci95": estimate.ci95, **about}
        for a, b in combinations([encoder for encoder in names if encoder in metric.by_encoder], 2):
            between = metric.by_encoder[a] - metric.by_encoder[b]
            groups, estimate = _estimated(comparison, between, clusters, a, b)
            by_seed = [over_groups(metric.by_encoder[encoder], groups).mean(1).tolist() for encoder in (a, b)]
            row: dict[str, Any] = {
                **{"a": a, "b": b, "metric": name},
                **about,
                **{"mean": estimate.mean, "ci95": estimate.ci95},
                "verdict": verdict(estimate.ci95, *by_seed, kept=kept),
                **{"seeds": int(groups.max()) + 1, "runs": len(groups)},
            }
            differences.append(row)
    return summary, differences


def _estimated(
    comparison: Comparison, scores: np.ndarray, clusters: np.ndarray, *encoders: str
) -> tuple[np.ndarray, Estimate]:
    """Return the groups of independent runs [R], and the mean of `scores` [R, I] with its interval."""
    groups = independent_runs(encoder_groups(comparison, *encoders))
    return groups, interval(over_groups(scores, groups), clusters)


def over_seeds(values: Sequence[float], groups: np.ndarray) -> dict[str, Any]:
    """Return mean and standard deviation (None for a single group) over `groups` of runs, and the value of each run."""
    each = over_groups(np.array(values), groups).tolist()
    return {"mean": mean(each), "sd": stdev(each) if len(each) > 1 else None, "by_seed": list(values)}


def compare_benchmarks(comparison: Comparison) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """Return what `compare_scores` returns for lmms-eval's scores; intervals are over seeds, as it gives only means."""
    by_encoder: dict[str, list[dict[str, float]]] = defaultdict(list)
    for run in comparison.runs:
        by_encoder[run.encoder].append(benchmark_results(run.directory, comparison.benchmarks))
    runs = [results for by_run in by_encoder.values() for results in by_run]
    names = [name for name in runs[0] if all(name in results for results in runs)]

    summary = {}
    for encoder, results in by_encoder.items():
        groups = independent_runs(encoder_groups(comparison, encoder))
        summary[encoder] = {name: over_seeds([row[name] for row in results], groups) for name in names}
    differences = []
    for a, b in combinations(by_encoder, 2):
        groups = independent_runs(encoder_groups(comparison, a, b))
        for name in names:
            between = [x[name] - y[name] for x, y in zip(by_encoder[a], by_encoder[b], strict=True)]
            estimate = over_runs(over_groups(np.array(between), groups))
            row = {"a": a, "b": b, "metric": name, "mean": estimate.mean, "ci95": estimate.ci95}
            differences.append(row | {"seeds": int(groups.max()) + 1})
    return summary, differences


# ------------------------------------------------------------------------------------------- runs and power
def encoder_groups(comparison: Comparison, *names: str) -> np.ndarray:
    """Return [R] numbers from 0, equal for runs that share one of the encoders called `names` (stats.shared_runs).

    The runs of a pretraining seed share the encoders that are pretrained for each seed. `random` differs in every run.
    All others, also `blind`, are the same in all runs.
    """
    runs = np.arange(comparison.runs_per_encoder)
    by_kind = {True: runs % comparison.seeds, "random": runs}
    named = [arm.encoder for arm in comparison.arms if arm.name in names]
    keys = [is_pretrained_anew(encoder) or parse_vision_name(encoder)[0] for encoder in named]
    return shared_runs([by_kind.get(key, 0 * runs) for key in keys])


def detectable_difference(comparison: Comparison, questions: int) -> float:
    """Return the difference that this design detects with 80 % power if the variances are those of the demo."""
    groups = encoder_groups(comparison, *comparison.names)
    sizes = np.bincount(independent_runs(groups))
    seeds, runs = len(sizes), len(sizes) ** 2 / float((1 / sizes).sum())  # effective number, as groups differ in size
    luck = ANSWER_VARIANCE * OF_QUESTIONS / questions / runs
    pretraining = ENCODER_VARIANCE / seeds if groups.max() > 0 else 0.0
    images = IMAGE_VARIANCE * OF_QUESTIONS / questions
    return detectable(pretraining + RUN_VARIANCE / runs + luck, images, luck, seeds, questions)


def power_in_words(comparison: Comparison) -> str:
    """Return a text for the plan that says which difference the comparison can detect."""
    seeds = int(independent_runs(encoder_groups(comparison, *comparison.names)).max()) + 1
    if seeds < FEWEST_SEEDS:
        return f"{seeds} independent seed(s) show numbers but decide nothing; --seeds {FEWEST_SEEDS} gives verdicts"
    by_file = {name: comparison.asked(path) for name, path in comparison.question_files()[0].items()}
    metric = deciding(comparison.decides, chain.from_iterable(by_file.values()))
    if metric is None or not metric.startswith("accuracy"):
        return f"known for right answers only, not for {metric}"
    points = 100 * detectable_difference(comparison, len(of_deciding_column(by_file)))
    spreads = "variances measured on the demo" if comparison.is_demo else "the demo's variances, as others are unknown"
    return f"80 of 100 such comparisons detect a difference of {points:.1f} points ({spreads})"


# ------------------------------------------------------------------------------------------- questions and answers
def solved_blind(overall: ItemScores, blind: Collection[str]) -> np.ndarray:
    """Return bool [I]: True for questions that the encoders `blind` answer right in more than half of their runs."""
    runs = [overall.by_encoder[name] for name in sorted(blind)]
    return np.concatenate(runs).mean(0) > 0.5 if runs else np.zeros(len(overall.clusters), dtype=bool)


def loose_answers(answers: Lines) -> dict[str, Any]:
    """Count the answers of each encoder's runs that match the expected ones only loosely (scores.exactness).

    Return {encoder: {"answers": number of scored answers, way: {"count": number}}} with each way of LOOSE_WAYS.
    """
    loose: dict[str, Any] = {}
    for encoder in dict.fromkeys(run.encoder for run in answers):
        lines = [line for run, by_run in answers.items() if run.encoder == encoder for line in by_run]
        counts = Counter(exactness(line["text"], line["expected"]) for line in lines if "correct" in line)
        loose[encoder] = {"answers": counts.total()} | {way: {"count": counts[way]} for way in LOOSE_WAYS}
    return loose


def pick_examples(answers: Lines) -> list[dict[str, Any]]:
    """Draw, with seed 0, questions that the first run of one encoder answered correctly and that of another wrongly.

    The first two encoders in `answers` are compared. Return up to `EXAMPLES` records for the report in each direction,
    those that the first encoder got right first; so they show how the models differ, not how often.
    """
    a, b, *_ = dict.fromkeys(run.encoder for run in answers)
    first, second = (next(c for c in answers if c.encoder == encoder) for encoder in (a, b))
    examples = []
    left = {True: EXAMPLES, False: EXAMPLES}
    for i in np.random.default_rng(0).permutation(len(answers[first])):
        x, y = answers[first][i], answers[second][i]
        if "correct" in x and x["correct"] != y["correct"] and left[x["correct"]]:
            left[x["correct"]] -= 1
            example = {"image": next(iter(images_of(x)), None), "question": x["prompt"], "truth": x["expected"]}
            example |= {"kind": x["kind"], "answers": {a: x["text"], b: y["text"]}}
            examples.append(example | {"right": a if x["correct"] else b})
    return sorted(examples, key=lambda example: example["right"] != a)


# ------------------------------------------------------------------------------------------- lmms-eval's scores
def benchmark_folder(run: Path, task: str) -> Path:
    """Return the directory into which lmms-eval writes the results of `task`."""
    return run / "benchmarks" / task


def newest_results(run: Path, task: str) -> Path | None:
    """Return lmms-eval's newest results file for `task` below the run directory `run`, or None if there is none."""
    return max(benchmark_folder(run, task).glob("*/*_results.json"), default=None)  # names begin with the date


def benchmark_results(run: Path, tasks: Sequence[str]) -> dict[str, float]:
    """Return lmms-eval's scores in the run directory `run`, keyed by `TASK/METRIC`.

    A task that is a group has keys for each of its members. A metric with a filter is called `METRIC (FILTER)`;
    standard errors and values that are not finite are left out. So are tasks whose newest evaluation failed or lacks
    answers.
    """
    scores: dict[str, float] = {}
    for task in tasks:
        file, log = newest_results(run, task), benchmark_folder(run, task) / "log.txt"
        if file is None or (log.is_file() and NO_ANSWER in log.read_text(errors="replace", encoding="utf-8")):
            continue
        for name, values in read_json(file)["results"].items():
            for key, value in values.items():
                metric, _, filtered = key.partition(",")  # "exact_match,none": the metric and its filter
                if isinstance(value, (int, float)) and math.isfinite(value) and "_stderr" not in metric:
                    suffix = f" ({filtered})" if filtered not in ("", "none") else ""
                    scores[f"{name}/{metric}{suffix}"] = float(value)
    return scores
