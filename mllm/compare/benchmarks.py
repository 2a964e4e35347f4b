"""lmms-eval on a cell's model: whether it can run at all, its command for a task, and what it left.

It exits with 0 whatever happens, and one task that fails takes those of the same call with it. So each task is a call
and a folder of its own, `CELL/benchmarks/TASK/`, and is done once its scores are there:

    lmms_eval.log    MODEL/DATE_results.json    MODEL/DATE_samples_TASK.jsonl
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from clips.common.errors import UserError
from mllm.compare.comparison import Comparison

MODEL = "llava_hf"
"""What lmms-eval calls a stock LLaVA model of transformers."""
NO_ANSWER = " in generating"
"""What it logs where `generate` raised: it takes an empty answer for it and scores that."""
PROBE = f"""
import sys
from lmms_eval.models import get_model
from lmms_eval.tasks import TaskManager
_, folder, *tasks = sys.argv
get_model({MODEL!r})
manager = TaskManager("ERROR", include_path=folder or None, model_name={MODEL!r})
unknown = [task for task in tasks if not manager.match_tasks([task])]
if unknown:
    sys.exit("it has no task " + ", ".join(unknown))
"""
"""Everything that a run of it needs before the model and the data are there; the last line says what is wrong."""


def check_benchmarks(comparison: Comparison) -> None:
    """Raise UserError where lmms-eval cannot be imported with all that its model needs, or does not know a task."""
    probe = [sys.executable, "-c", PROBE, str(comparison.include_path or ""), *comparison.benchmarks]
    found = subprocess.run(probe, capture_output=True, text=True)
    if found.returncode != 0:
        *_, reason = found.stderr.strip().splitlines() or [f"exit code {found.returncode}"]
        raise UserError(
            f"--benchmarks: lmms-eval cannot run here: {reason}. It needs the packages of this project's extra bench "
            "(pip install -e '.[bench]') in the Python that runs this command; `python -m lmms_eval --tasks list` "
            "lists its tasks, --include-path adds a folder of your own"
        )


def benchmark_command(comparison: Comparison, cell: Path, task: str) -> list[str]:
    """lmms-eval on the saved model, which is a stock transformers one, in the precision of the cell's own answers."""
    from clips.common.runtime import choose_device  # with them comes torch, see mllm/compare/comparison.py
    from mllm.evaluation.evaluate import answer_dtype

    device = choose_device(comparison.device)
    dtype = str(answer_dtype("auto", device)).removeprefix("torch.")
    command = [sys.executable, "-m", "lmms_eval", "--model", MODEL, "--batch_size", "1", "--device", str(device)]
    # Its own default for device_map, "", is an error in transformers.
    command += ["--model_args", f"pretrained={cell / 'model'},device_map={device},dtype={dtype}", "--tasks", task]
    command += ["--include_path", str(comparison.include_path)] if comparison.include_path else []
    return [*command, "--output_path", str(benchmark_folder(cell, task)), "--log_samples"]


def benchmark_folder(cell: Path, task: str) -> Path:
    return cell / "benchmarks" / task


def benchmark_log(cell: Path, task: str) -> Path:
    return benchmark_folder(cell, task) / "lmms_eval.log"


def benchmark_results(cell: Path, tasks: Sequence[str]) -> dict[str, float]:
    """`TASK/METRIC` → value of the tasks asked for that are done; a group's members each stand for themselves."""
    return {name: value for task in tasks for name, value in _scores(cell, task).items()}


def newest_results(cell: Path, task: str) -> Path | None:
    """The file of scores of the newest call for `task`; None where there is none."""
    return max(benchmark_folder(cell, task).glob("*/*_results.json"), default=None)  # named by their date


def missing_benchmarks(comparison: Comparison, cell: Path) -> list[str]:
    """The tasks asked for that have no scores yet."""
    return [task for task in comparison.benchmarks if not _scores(cell, task)]


def _scores(cell: Path, task: str) -> dict[str, float]:
    """What the newest call for `task` measured; empty where there was none, it failed, or answers are missing."""
    file, log = newest_results(cell, task), benchmark_log(cell, task)
    if file is None or (log.is_file() and NO_ANSWER in log.read_text(errors="replace")):
        return {}
    scores = {}
    for name, values in json.loads(file.read_text())["results"].items():
        for key, value in values.items():
            metric, _, filtered = key.partition(",")  # "exact_match,none": the metric and its filter
            if isinstance(value, (int, float)) and math.isfinite(value) and "_stderr" not in metric:
                scores[f"{name}/{metric}" + (f" ({filtered})" if filtered not in ("", "none") else "")] = float(value)
    return scores
