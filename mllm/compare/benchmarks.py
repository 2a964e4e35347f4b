"""lmms-eval on a cell's model: its command for a task, and its scores.

lmms-eval exits with 0 whatever happens, and a task that fails ends the other tasks of the same call. So each task is a
call with a folder of its own, `CELL/benchmarks/TASK/`, and is done once its scores are there:

    log.txt    MODEL/DATE_results.json    MODEL/DATE_samples_TASK.jsonl
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

from clips.common.files import read_json
from clips.lab.grid import Step
from mllm.compare.comparison import Comparison

MODEL = "llava_hf"
"""What lmms-eval calls a stock LLaVA model of transformers."""
NO_ANSWER = " in generating"
"""What lmms-eval logs if `generate` raised. It scores an empty answer then."""


def benchmark_step(comparison: Comparison, cell: Path, task: str) -> Step:
    """lmms-eval on the saved model, which is a stock transformers model, in the precision of the cell's answers."""
    from clips.common.runtime import choose_device  # imports torch
    from mllm.evaluation.evaluate import answer_dtype

    device = choose_device(comparison.device)
    dtype = str(answer_dtype("auto", device)).removeprefix("torch.")
    folder = benchmark_folder(cell, task)
    command = [sys.executable, "-m", "lmms_eval", "--model", MODEL, "--batch_size", "1", "--device", str(device)]
    # lmms-eval's own default for device_map, "", is an error in transformers.
    command += ["--model_args", f"pretrained={cell / 'model'},device_map={device},dtype={dtype}", "--tasks", task]
    command += ["--include_path", str(comparison.include_path)] if comparison.include_path else []
    command += ["--output_path", str(folder), "--log_samples"]
    return Step(task, tuple(command), lambda: bool(benchmark_results(cell, [task])), folder=folder, may_fail=True)


def benchmark_folder(cell: Path, task: str) -> Path:
    return cell / "benchmarks" / task


def newest_results(cell: Path, task: str) -> Path | None:
    """The scores of the newest call for `task`; None if there are none."""
    return max(benchmark_folder(cell, task).glob("*/*_results.json"), default=None)  # named by their date


def benchmark_results(cell: Path, tasks: Sequence[str]) -> dict[str, float]:
    """`TASK/METRIC` → value of the tasks that are done; the members of a group each have a value.

    A task is not done if its newest call failed, or if answers are missing.
    """
    scores: dict[str, float] = {}
    for task in tasks:
        file, log = newest_results(cell, task), benchmark_folder(cell, task) / "log.txt"
        if file is None or (log.is_file() and NO_ANSWER in log.read_text(errors="replace", encoding="utf-8")):
            continue
        for name, values in read_json(file)["results"].items():
            for key, value in values.items():
                metric, _, filtered = key.partition(",")  # "exact_match,none": the metric and its filter
                if isinstance(value, (int, float)) and math.isfinite(value) and "_stderr" not in metric:
                    suffix = f" ({filtered})" if filtered not in ("", "none") else ""
                    scores[f"{name}/{metric}{suffix}"] = float(value)
    return scores
