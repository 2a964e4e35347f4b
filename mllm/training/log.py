"""What a LLaVA run leaves beside its weights: config.json, env.json, metrics.jsonl, curves.png."""

from __future__ import annotations

import json
import platform
import resource
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from clips.common.errors import UserError, never_in_the_way
from clips.common.files import write_atomically
from clips.common.page import save_plot
from clips.common.plots import LIGHT, Panel, curves_plot

PACKAGES = ("torch", "transformers", "peft", "accelerate", "deepspeed", "bitsandbytes", "tokenizers", "numpy")


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`; empty where there is no file."""
    return json.loads(path.read_text()) if path.is_file() else {}


def keep_config(run_dir: Path, stage: str, record: dict[str, Any], *, write: bool) -> None:
    """Put this stage's `record` into config.json; UserError where the run already has another one.

    Compared are the entries of `record["trains"]`; the rest is for people.
    """
    path = run_dir / "config.json"
    config = read_json(path)
    before = config.get(stage, {}).get("trains")
    now = json.loads(json.dumps(record["trains"]))
    if before is not None and before != now:
        names = sorted(name for name in before | now if before.get(name) != now.get(name))
        changes = "\n  ".join(f"{name}: {before.get(name)} there, {now.get(name)} here" for name in names)
        raise UserError(
            f"{run_dir} holds a run whose stage {stage} is another one:\n  {changes}\n"
            "Give the new run another --output_dir, or remove that directory"
        )
    if write:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(config | {stage: record}, indent=2) + "\n")


def environment(device: torch.device, world_size: int) -> dict[str, Any]:
    """What else would explain a difference between two runs."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu × {torch.get_num_threads()}",
        "world_size": world_size,
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def peak_memory_gb(device: torch.device) -> float:
    """Most memory used so far: of the GPU, or of this process where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


class MetricsLog(TrainerCallback):
    """Writes a line of metrics.jsonl and of the terminal for each of the Trainer's log calls; main process only."""

    def __init__(self, run_dir: Path, stage: str, batch_size: int, *, active: bool) -> None:
        self.path, self.stage, self.batch_size, self.active = run_dir / "metrics.jsonl", stage, batch_size, active

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.begin = self.last = (time.monotonic(), state.global_step)
        if self.active and self.path.exists():  # what a killed run wrote after the checkpoint that is resumed
            lines = [line for line in read_metrics(self.path) if self._stays(line, state.global_step)]
            self.path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def _stays(self, line: dict[str, Any], step: int) -> bool:
        return line["stage"] != self.stage or line["step"] <= step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not self.active or "loss" not in (logs or {}):
            return
        now = (time.monotonic(), state.global_step)
        speed = (now[1] - self.last[1]) * self.batch_size / max(now[0] - self.last[0], 1e-9)
        self.last = now
        left = (state.max_steps - now[1]) * (now[0] - self.begin[0]) / max(now[1] - self.begin[1], 1) / 60
        line = {"kind": "train", "stage": self.stage, "step": now[1], "samples": now[1] * self.batch_size}
        line |= {"time": round(time.time(), 3), "samples_per_s": round(speed, 3)}
        line |= {key: float(logs[key]) for key in ("loss", "grad_norm", "learning_rate", "epoch") if key in logs}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(
            f"[{self.stage} {now[1]:>6,}/{state.max_steps:,}]  loss {line['loss']:.4f}  "
            f"lr {line.get('learning_rate', 0):.2e}  {speed:.1f} samples/s  left {left:.1f} min",
            file=sys.stderr,
            flush=True,
        )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; one that was cut by a crash is left out."""
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


def write_curves(run_dir: Path) -> None:
    """curves.png: the loss of each stage against samples seen. Where it cannot be drawn, stderr says so."""
    with never_in_the_way(f"{run_dir / 'curves.png'} is not written; nothing else is missing"):
        lines = read_metrics(run_dir / "metrics.jsonl") if (run_dir / "metrics.jsonl").is_file() else []
        by_stage: dict[str, list[dict[str, Any]]] = {}
        for line in lines:
            by_stage.setdefault(line["stage"], []).append(line)
        if by_stage:
            panels = [Panel(f"{stage}: loss", found, ["loss"]) for stage, found in by_stage.items()]
            save_plot(curves_plot(panels, LIGHT), run_dir / "curves.png")
