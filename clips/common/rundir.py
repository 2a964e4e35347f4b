"""A run directory of either half: its configuration, lock, metrics, and whether it is finished.

    runs/NAME/config.json     rebuilds the run by itself; a run with another configuration is refused here
    runs/NAME/env.json        machine and packages (clips/common/runtime.py)
    runs/NAME/data.json       number and hash of the training data; a run resumes only with the same data
    runs/NAME/init_from.json  source of the initial weights, and the parts that came from it
    runs/NAME/metrics.jsonl   a line for each log step and evaluation; a kill may cut the last line
    runs/NAME/checkpoints/    step-N, each sealed by MANIFEST.json (clips/engine/checkpoint.py)
    runs/NAME/export/, report/, evaluation*.json
                              made from the weights of one checkpoint; each records which
    runs/NAME/.lock           held by the process that trains here; names the process and its host

Imports nothing heavy: a plan or a progress bar asks about fifty runs.
"""

import contextlib
import json
import os
import platform
import shlex
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, TypeVar

from clips.common.errors import UserError
from clips.common.files import MANIFEST, differing, from_json, lock, read_json, read_regular, write_atomically
from clips.common.live import say
from clips.common.signals import launchers

T = TypeVar("T")
METRICS = "metrics.jsonl"
DATA = "data.json"
INIT_FROM = "init_from.json"
REPORT = "report/index.html"
UNSEEN = "unseen"
"""Name of the test set whose metrics decide, if a run has it: on the demo, scenes in a held-out drawing style."""
MADE_OF = "checkpoint.json"
"""File in export/ and report/ that records from which checkpoint they were made, as `weights_of` describes it."""


# ------------------------------------------------------------------------------------------- which run nobody named
def take_newest(what: str, candidates: Iterable[tuple[float, Path]]) -> Path:
    """Return the newest path of `candidates`, pairs of (time, path), and print it before it is used."""
    _, path = max(candidates)
    _say_taken(what, path)
    return path


@lru_cache
def _say_taken(what: str, path: Path) -> None:
    """Print the path once in a process, on the first of several ranks."""
    if os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0":
        say(f"the newest {what}: {path}")


def is_debug(run_dir: Path) -> bool:
    """Return True if a run's config.json says that it is a smoke test of --debug, which `newest_vision` never takes."""
    return bool(_train_settings(run_dir).get("debug"))


def _train_settings(run_dir: Path) -> dict[str, Any]:
    """Return `train` of a run's config.json, or {} if there is none."""
    train = read_json(run_dir / "config.json").get("train")
    return train if isinstance(train, dict) else {}


def newest_vision(runs: Path) -> str:
    """Return the newest exported encoder under `runs` as a value of --vision, or "clips" if there is none."""
    exports = [path for path in runs.glob("*/export/hf_vit") if not is_debug(path.parents[1])]
    return f"clips:{max(exports, key=os.path.getmtime).parents[1]}" if exports else "clips"


# ------------------------------------------------------------------------------------------- what is of which weights
def checkpoints(run_dir: Path) -> list[Path]:
    """Return the finished checkpoints of a pretraining run, newest first."""
    steps = (path for path in (run_dir / "checkpoints").glob("step-*") if path.name[5:].isdigit())
    return sorted(steps, key=lambda path: int(path.name[5:]), reverse=True)


def weights_of(checkpoint: Path) -> dict[str, Any]:
    """Return `step`, `samples` and `sha256` of a checkpoint's model.safetensors from its own files; nothing is hashed.

    `samples` and `sha256` are None if their files are damaged.
    """
    weights = {"step": int(checkpoint.name[5:]), "samples": None, "sha256": None}
    with contextlib.suppress(UserError):
        weights["samples"] = read_json(checkpoint / "state.json").get("samples")
    with contextlib.suppress(UserError):
        weights["sha256"] = read_json(checkpoint / MANIFEST).get("model.safetensors")
    return weights


def chosen_checkpoint(run_dir: Path) -> Path | None:
    """Return the checkpoint of a run that is exported and evaluated, or None if the run has none.

    It is the newest one, or the best of those that were validated if the run chooses (`train.choose`).
    """
    present = checkpoints(run_dir)
    takes_last = _train_settings(run_dir).get("choose") == "last"  # its metrics may be of a time when it chose
    if not present or takes_last or not (run_dir / METRICS).is_file():
        return next(iter(present), None)
    values = {line["step"]: line["choosing"] for line in read_metrics(run_dir, "eval") if "choosing" in line}
    validated = [path for path in present if int(path.name[5:]) in values]
    return max(validated, key=lambda path: values[int(path.name[5:])], default=present[0])


def chosen_weights(run_dir: Path) -> dict[str, Any] | None:
    """Return `weights_of` the chosen checkpoint, or None if there is none."""
    chosen = chosen_checkpoint(run_dir)
    return None if chosen is None else weights_of(chosen)


def is_current(directory: Path) -> bool:
    """Return True if export/ or report/ was made from the run's chosen checkpoint, or if no checkpoints are left."""
    return _is_of({"checkpoint": read_json(directory / MADE_OF)}, chosen_weights(directory.parent))


def check_current(export: Path) -> Path:
    """Return `export`, the export/ of a run. Raises UserError if the run has trained further since it was made."""
    if not is_current(export):
        command = f"python scripts/export_clips.py --model {shlex.quote(str(export.parent))}"
        raise UserError(f"{export} was made from a checkpoint that its run no longer selects: run `{command}` again")
    return export


def is_finished(run_dir: Path) -> bool:
    """Return True if the chosen weights of a pretraining run are exported, and measured if the run has test data."""
    export = run_dir / "export"
    chosen = chosen_weights(run_dir)
    evaluation = read_evaluation(run_dir / "evaluation.json")
    is_measured = not evaluation or _is_of(evaluation, chosen)
    return export.is_dir() and _is_of({"checkpoint": read_json(export / MADE_OF)}, chosen) and is_measured


def _is_of(evaluation: Mapping[str, Any], chosen: Mapping[str, Any] | None) -> bool:
    """Return True if this evaluation was made from the checkpoint `chosen`, or if the run has no checkpoints left."""
    return chosen is None or (evaluation.get("checkpoint") or {}).get("sha256") == chosen["sha256"]


def read_evaluation(path: Path) -> dict[str, Any]:
    """Return the content of an evaluation.json, or {} if it is missing. Before version 0.1 `metrics` were `figures`."""
    evaluation = read_json(path)
    return {"metrics" if name == "figures" else name: value for name, value in evaluation.items()}


def read_evaluations(directory: Path) -> dict[str, dict[str, Any]]:
    """Return the contents of evaluation*.json by file stem ("evaluation": the run's own test set).

    Evaluations of other weights than the run's chosen ones are skipped.
    """
    chosen = chosen_weights(directory)
    evaluations = {path.stem: read_evaluation(path) for path in sorted(directory.glob("evaluation*.json"))}
    return {name: evaluation for name, evaluation in evaluations.items() if _is_of(evaluation, chosen)}


def by_test_set(metrics: Mapping[str, T], first: str) -> dict[str, dict[str, T]]:
    """Group metrics by test set; names without a slash belong to the set `first`.

    >>> by_test_set({"r1": 4.3, "flickr/r1": 2.5}, "test")
    {'test': {'r1': 4.3}, 'flickr': {'r1': 2.5}}
    """
    sets: dict[str, dict[str, T]] = {}
    for name, metric in metrics.items():
        test_set, _, plain = name.rpartition("/")
        sets.setdefault(test_set or first, {})[plain] = metric
    return sets


def deciding_name(metric: str, metrics: Iterable[str]) -> str:
    """Return `metric` with the prefix of the held-out test set `UNSEEN` if `metrics` has it, else `metric` unchanged.

    The metric on that set is the one that decides.
    """
    return f"{UNSEEN}/{metric}" if f"{UNSEEN}/{metric}" in metrics else metric


def has_report(run_dir: Path) -> bool:
    """Return True if there is a report of the chosen weights."""
    return (run_dir / REPORT).is_file() and is_current((run_dir / REPORT).parent)


# ------------------------------------------------------------------------------------------------------ configuration
def changed(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Return the fields in which two configurations differ as `path: saved → current`; a missing field is null."""
    before = json.loads(json.dumps(saved))  # a tuple is a list then
    after = json.loads(json.dumps(current))
    return [f"{path}: {json.dumps(a)} → {json.dumps(b)}" for path, a, b in differing(before, after)]


def refuse(changes: Sequence[str], what: str, mend: str) -> None:
    """Raise UserError if there are `changes`; `what` introduces them, `mend` says what to do."""
    if changes:
        raise UserError(f"{what}:\n  " + "\n  ".join(changes) + f"\n{mend}")


def began_with(run_dir: Path) -> dict[str, Any] | None:
    """Return init_from.json (`Beginning`) of a run, or None if it has not started or started from random weights."""
    return (read_json(run_dir / INIT_FROM) or None) if (run_dir / "config.json").is_file() else None


# --------------------------------------------------------------------------------------------------------------- lock
_held: dict[Path, IO[str]] = {}


def hold(run_dir: Path) -> None:
    """Keep other processes from training in `run_dir` until this one ends. Raises UserError if one does already.

    The lock file identifies the process, because it may be on another host or have outlived its launcher.
    """
    place = run_dir.resolve()
    if place in _held:
        return
    try:
        file = lock(run_dir / ".lock", wait=False)
    except BlockingIOError:
        raise UserError(f"another process trains in {run_dir}{_holder(run_dir)}: wait, or give another name") from None
    except OSError as error:
        raise UserError(f"{run_dir / '.lock'} cannot be locked: {error.strerror}") from None
    file.truncate(0)
    json.dump({"host": platform.node(), "pid": os.getpid(), "launchers": launchers()}, file)
    file.flush()
    # A data worker outlives a killed rank by some seconds; it must not block the restarted rank.
    os.register_at_fork(after_in_child=file.close)
    _held[place] = file


def _holder(run_dir: Path) -> str:
    """Return the lock's holder as a part of a sentence; empty if it is not written yet."""
    holder = parse_line(read_regular(run_dir / ".lock", 10_000))
    if holder is None:
        return ""
    pid = holder["pid"]
    under = f" under launcher {', '.join(map(str, holder['launchers']))}" if holder["launchers"] else ""
    return f", process {pid}{under} on host {holder['host']} (`kill {pid}` there saves a checkpoint)"


# ------------------------------------------------------------------------------------------------------------ metrics
def read_metrics(run_dir: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Return the records of metrics.jsonl, or only those of one `kind`, "train" or "eval".

    A line that a kill cut is skipped. Raises UserError if the file is missing.
    """
    path = run_dir / METRICS
    if not path.is_file():
        raise UserError(f"{run_dir} is not a run: it has no {METRICS}")
    texts = path.read_bytes().splitlines()
    if kind is not None:  # most lines are of training steps, so parse only those of this kind
        texts = [text for text in texts if f'"{kind}"'.encode() in text]
    lines = filter(None, map(parse_line, texts))
    return [line for line in lines if kind is None or line.get("kind") == kind]


def keep_lines(path: Path, step: int, **fields: Any) -> None:
    """Keep only those lines of a .jsonl file that are not after `step`, or in which one of `fields` has another value.

    Lines after the checkpoint from which a killed run resumes are removed, so that no step is recorded twice, and so
    are lines that a kill cut.
    """
    if not path.exists():
        return
    lines = []
    for text in path.read_bytes().splitlines():
        record = parse_line(text)
        if record is None:
            continue
        is_early = isinstance(record.get("step"), int) and record["step"] <= step
        if is_early or any(record.get(name) != value for name, value in fields.items()):
            lines.append(f"{text.decode()}\n")
    write_atomically(path, "".join(lines))


def parse_line(text: str | bytes) -> dict[str, Any] | None:
    """Return the record in a line of a .jsonl file, or None if it was cut by a crash or is half written."""
    try:
        line = from_json(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) else None
