"""What a LLaVA run leaves beside its weights: config.json, env.json, metrics.jsonl, curves.png."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from clips.common import rundir
from clips.common.errors import never_in_the_way
from clips.common.files import read_json, write_json
from clips.common.page import save_plot
from clips.common.peaks import peak_flops
from clips.common.plots import LIGHT, Panel, curves_plot
from clips.common.runtime import peak_memory_gb
from clips.common.signals import outlive_readers
from mllm.data.conversation import IGNORE
from mllm.model.flops import LlavaFlops
from mllm.model.packing import pairs_of, shared_length


def keep_config(run_dir: Path, stage: str, record: dict[str, Any], *, write: bool) -> None:
    """Put this stage's `record` into config.json; UserError where the run has another one, or trains elsewhere now.

    Compared are the entries of `record["trains"]`; the rest is for people.
    """
    path = run_dir / "config.json"
    config = read_json(path)
    if stage in config:
        rundir.refuse(
            rundir.difference(config[stage]["trains"], record["trains"]),
            f"{run_dir} holds a run whose stage {stage} is another one",
            "Give the new run another --output_dir, or remove that directory",
        )
    if write:
        run_dir.mkdir(parents=True, exist_ok=True)
        rundir.hold(run_dir)
        write_json(path, config | {stage: record})


def began_packed(run_dir: Path, stage: str) -> bool:
    """False for a stage that began before batches were packed: its dropout goes on in the order it began with."""
    began = read_json(run_dir / "config.json").get(stage)
    return began is None or bool(began["trains"].get("packed"))


class Work:
    """What this rank has computed since the stage began or went on, and what that is per second and of its peak.

    `image_token_id` is given where batches are packed (mllm/model/packing.py): padding is not computed then.
    """

    def __init__(
        self,
        flops: LlavaFlops,
        device: torch.device,
        dtype: torch.dtype,
        world_size: int,
        image_token_id: int | None = None,
    ) -> None:
        self.flops, self.device, self.world_size, self.image_token_id = flops, device, world_size, image_token_id
        self.peak, _ = peak_flops(device, dtype)
        self.pictures = 0
        # Summed where they are: a GPU is not waited for.
        self.tokens, self.positions, self.pairs, self.predicted = torch.zeros(4, dtype=torch.long, device=device)

    def add(self, inputs: dict[str, Any]) -> None:
        """One batch in the layout of mllm/data/dataset.py."""
        samples, length = inputs["input_ids"].shape
        self.pictures += sum(len(inputs[name]) for name in ("image_features", "pixel_values") if name in inputs)
        tokens = inputs["attention_mask"].sum().to(self.device)
        self.tokens += tokens
        self.predicted += (inputs["labels"][:, 1:] != IGNORE).sum().to(self.device)
        if self.image_token_id is None:
            self.positions += samples * length
            self.pairs += samples * length**2
        else:
            ids, mask, labels = (inputs[name].to(self.device) for name in ("input_ids", "attention_mask", "labels"))
            shared = shared_length(ids, mask, labels, self.image_token_id)
            self.positions += tokens - (samples - 1) * shared
            self.pairs += pairs_of(samples, length, shared)

    def total(self) -> int:
        """FLOPs so far."""
        parts = self.flops.parts(
            pictures=self.pictures,
            positions=int(self.positions),
            pairs=int(self.pairs),
            predicted=int(self.predicted),
        )
        return sum(parts.values())

    def over_all_ranks(self) -> tuple[int, int]:
        """(FLOPs, tokens) so far. Collective."""
        totals = torch.tensor([self.total(), int(self.tokens)], dtype=torch.float64, device=self.device)
        if self.world_size > 1:
            dist.all_reduce(totals)
        flops, tokens = totals.tolist()
        return int(flops), int(tokens)

    def rates(self, *, samples: float, flops: float, seconds: float) -> dict[str, float]:
        """`samples` of all ranks and `flops` of one, as a line of the log names them."""
        speed = samples / seconds
        rates = {
            "samples_per_s": speed,
            "samples_per_s_per_gpu": speed / self.world_size,
            "tflops": flops / seconds / 1e12,
            "mfu": flops / seconds / self.peak,
            "peak_memory_gb": peak_memory_gb(self.device),
        }
        return {name: float(f"{value:.4g}") for name, value in rates.items()}


class MetricsLog(TrainerCallback):
    """Writes a line of metrics.jsonl and of the terminal for each of the Trainer's log calls; main process only.

    FLOPs and memory are those of this rank; ranks differ by the lengths of their samples.
    """

    def __init__(self, run_dir: Path, stage: str, batch_size: int, work: Work, *, active: bool) -> None:
        self.path, self.stage, self.batch_size, self.active = run_dir / rundir.METRICS, stage, batch_size, active
        self.work = work

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.begin = self.last = (time.monotonic(), state.global_step, self.work.total())
        if self.active:  # a stage that begins anew drops all of its own, the other stage's stay
            step = state.global_step
            rundir.keep_lines(self.path, lambda line: line.get("stage") != self.stage or rundir.is_at_most(line, step))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not self.active or logs is None or "loss" not in logs:
            return
        now = (time.monotonic(), state.global_step, self.work.total())
        seconds, steps, flops = (new - old for new, old in zip(now, self.last, strict=True))
        rates = self.work.rates(samples=steps * self.batch_size, flops=flops, seconds=max(seconds, 1e-9))
        self.last = now
        left = (state.max_steps - now[1]) * (now[0] - self.begin[0]) / max(now[1] - self.begin[1], 1) / 60
        line = {"kind": "train", "stage": self.stage, "step": now[1], "samples": now[1] * self.batch_size}
        line |= {"time": round(time.time(), 3), **rates}
        line |= {key: float(logs[key]) for key in ("loss", "grad_norm", "learning_rate", "epoch") if key in logs}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        outlive_readers()
        print(
            f"[{self.stage} {now[1]:>6,}/{state.max_steps:,}]  loss {line['loss']:.4f}  "
            f"lr {line.get('learning_rate', 0):.2e}  {rates['samples_per_s']:.1f} samples/s  "
            f"MFU {rates['mfu']:.1%}  left {left:.1f} min",
            file=sys.stderr,
            flush=True,
        )


def write_curves(run_dir: Path) -> None:
    """curves.png: the loss and the MFU of each stage against samples seen. Where it cannot be drawn, stderr says so."""
    with never_in_the_way(f"{run_dir / 'curves.png'} is not written; nothing else is missing"):
        lines = rundir.read_metrics(run_dir) if (run_dir / rundir.METRICS).is_file() else []
        by_stage: dict[str, list[dict[str, Any]]] = {}
        for line in lines:
            by_stage.setdefault(str(line.get("stage")), []).append(line)
        if by_stage:
            panels = [
                Panel(f"{stage}: {name}", found, [name])
                for stage, found in by_stage.items()
                for name in ("loss", "mfu")
                if any(name in line for line in found)  # older runs have no MFU
            ]
            save_plot(curves_plot(panels, LIGHT), run_dir / "curves.png")
