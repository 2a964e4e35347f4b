"""The log of a LLaVA run: metrics.jsonl, curves.png, and the work that its figures count."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import TrainerCallback, TrainerState

from clips.common import rundir
from clips.common.errors import never_in_the_way
from clips.common.flops import forward_flops, training_flops
from clips.common.live import LiveLine, progress_line
from clips.common.page import save_plot
from clips.common.peaks import peak_flops
from clips.common.plots import Panel, curves_plot
from clips.common.runtime import peak_memory_gb
from clips.common.trackers import Trackers, loggers
from mllm.encoders.encoder import KINDS
from mllm.model.packing import pairs_of
from mllm.model.tiles import Layout, Llava
from mllm.training.arguments import TrainArguments


def costs_of(model: Llava, image_size: int) -> dict[str, int]:
    """Return the FLOPs of forward and backward pass of each unit of work, whose parts train as they are set now.

    What a step runs and does not use is not counted: an encoder's pooler, and the zero image that a batch without
    images sends through the encoder (mllm/model/forward.py). Of a mixture of experts every expert is counted.

    Args:
        image_size: Side of a square that the encoder sees, in pixels; 0 if its features are cached.
    """
    inner: Any = model.model
    tower, projector, language_model = inner.vision_tower, inner.multi_modal_projector, inner.language_model
    sees = _trains(tower)
    into = sees or _trains(projector) or _trains(language_model.get_input_embeddings())
    learns = into or _trains(language_model)
    text = model.config.get_text_config()
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    square = Layout.of(model.config).square * training_flops(projector, sees)
    return {
        "pictures": square + (_tower(tower, model.config.vision_feature_layer, image_size) if image_size else 0),
        "positions": training_flops(_blocks(language_model), into),
        "pairs": (3 if learns else 1) * 4 * text.num_hidden_layers * text.num_attention_heads * head,
        "predicted": training_flops(model.lm_head, learns),
    }


def _trains(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def _blocks(model: nn.Module) -> nn.ModuleList:
    """Return the blocks of a transformer: its longest list of modules."""
    return max((module for module in model.modules() if isinstance(module, nn.ModuleList)), key=len)


def _tower(tower: Any, feature_layer: int | list[int], image_size: int) -> int:
    """Return the FLOPs of one square through all blocks of an encoder, and back through those whose output is used."""
    (patches,) = (module for module in tower.modules() if isinstance(module, nn.Conv2d))
    blocks = _blocks(tower)
    count = (image_size // patches.kernel_size[0]) ** 2
    tokens = count + KINDS[tower.config.model_type].prefix_tokens(tower.config)
    layers = [feature_layer] if isinstance(feature_layer, int) else feature_layer
    used = max(layer if layer >= 0 else len(blocks) + 1 + layer for layer in layers)
    total = count * training_flops(patches, False)
    for index, block in enumerate(blocks):
        passes = 3 if patches.weight.requires_grad and index < used else 1
        total += passes * tokens * (forward_flops(block) + 4 * tokens * tower.config.hidden_size)
    return total


class Work:
    """Counts the work of this rank since its process began, and gives it per second.

    If batches are `packed` (mllm/model/packing.py), padding costs nothing.
    """

    def __init__(self, costs: Mapping[str, int], device: torch.device, world_size: int, packed: bool) -> None:
        self.costs, self.device, self.world_size, self.packed = costs, device, world_size, packed
        self.peak = peak_flops(device)
        self.tokens = 0
        self.counts = dict.fromkeys(costs, 0)
        """Squares of images; positions of sequences; pairs of query and key, causal or not; tokens that are learned."""

    def add(self, inputs: dict[str, Any]) -> None:
        """Count one batch in the layout of `Collator` (mllm/training/trainer.py)."""
        samples, length = inputs["input_ids"].shape
        counts = inputs["counts"]
        self.tokens += counts.real
        pictures = (len(inputs[name]) for name in ("image_features", "pixel_values") if name in inputs)
        self.counts["pictures"] += sum(pictures)
        self.counts["positions"] += counts.row if self.packed else samples * length
        self.counts["pairs"] += pairs_of(samples, length, counts.shared if self.packed else 0)
        self.counts["predicted"] += counts.learned

    def total(self) -> int:
        """FLOPs so far."""
        return sum(count * self.costs[unit] for unit, count in self.counts.items())

    def over_all_ranks(self) -> tuple[int, int]:
        """(FLOPs, tokens) so far. Collective."""
        totals = torch.tensor([self.total(), self.tokens], dtype=torch.float64, device=self.device)
        if self.world_size > 1:
            dist.all_reduce(totals)
        flops, tokens = totals.tolist()
        return int(flops), int(tokens)

    def rates(self, *, samples: float, flops: float, seconds: float) -> dict[str, float]:
        """The speeds of a log line, from the `samples` of all ranks and the `flops` of one rank.

        With `mfu`, the share of a GPU's stated peak, where that is known.
        """
        speed = samples / seconds
        rates = {
            "samples_per_s": speed,
            "samples_per_s_per_gpu": speed / self.world_size,
            "tflops": flops / seconds / 1e12,
            "peak_memory_gb": peak_memory_gb(self.device),
        }
        if self.peak is not None:
            rates["mfu"] = flops / seconds / self.peak
        return {name: float(f"{value:.4g}") for name, value in rates.items()}


class MetricsLog(TrainerCallback):
    """Writes a line of metrics.jsonl for each log call of the Trainer, and keeps the progress line, on rank 0 only.

    FLOPs and memory are rank 0's; ranks differ by the lengths of their samples.
    """

    def __init__(self, run_dir: Path, arguments: TrainArguments, work: Work, *, active: bool) -> None:
        self.path, self.work, self.active, self.line = run_dir / rundir.METRICS, work, active, LiveLine()
        self.arguments, self.stage, self.batch_size = arguments, arguments.description.name, arguments.batch_size
        self.passes = 0
        """Forward passes of the step that is being made."""
        self.newest: dict[str, Any] = {}
        """The newest line of metrics.jsonl."""

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.begin = self.last = (time.monotonic(), state.global_step, self.work.total())
        if self.active:  # a stage that begins anew drops its own lines; the other stage's lines stay
            step = state.global_step
            rundir.keep_lines(self.path, step, stage=self.stage)
            flags, folder = self.arguments, self.path.parent / self.stage
            name = flags.run_name or f"{self.path.parent.name}/{self.stage}"
            self.trackers = Trackers(loggers(flags.report_to), folder, name, flags.what_trains(), step)

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self.active:
            self.line.close()
            self.trackers.close()

    def on_substep_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.passes += 1
        self.show(args, state)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.passes = 0
        control.should_log |= state.global_step >= state.max_steps  # the Trainer leaves out an odd last step
        self.show(args, state)

    def show(self, args: Any, state: TrainerState, *, final: bool = False) -> None:
        """The progress line; a step may take minutes, so that forward passes count too."""
        if not self.active:
            return
        steps = state.global_step + self.passes / args.gradient_accumulation_steps
        elapsed, made = time.monotonic() - self.begin[0], steps - self.begin[1]
        left = (state.max_steps - steps) * elapsed / made if made else None
        values = self.newest | {"samples": int(steps * self.batch_size)}
        words = progress_line(values, state.max_steps * self.batch_size, left)
        self.line.show(f"{self.stage}: {words}", final=final)

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not self.active or logs is None or "loss" not in logs:
            return
        step = state.global_step
        now = (time.monotonic(), step, self.work.total())
        seconds, steps, flops = (new - old for new, old in zip(now, self.last, strict=True))
        self.last = now
        self.newest = {
            "kind": "train",
            "stage": self.stage,
            "step": step,
            "samples": step * self.batch_size,
            "steps": steps,  # fewer after a resume
            "time": round(time.time(), 3),
            **self.work.rates(samples=steps * self.batch_size, flops=flops, seconds=max(seconds, 1e-9)),
            **{key: float(logs[key]) for key in ("loss", "grad_norm", "learning_rate", "epoch") if key in logs},
        }
        with self.path.open("a") as file:
            file.write(json.dumps(self.newest) + "\n")
        figures = {name: value for name, value in self.newest.items() if isinstance(value, float) and name != "time"}
        self.trackers.log({f"train/{name}": value for name, value in figures.items()}, step)
        self.show(args, state, final=step >= state.max_steps)


def write_curves(run_dir: Path) -> None:
    """Draw curves.png: each stage's loss and TFLOP/s of a device over its samples. A failure is one line on stderr."""
    with never_in_the_way(f"{run_dir / 'curves.png'} is not written; nothing else is missing"):
        by_stage: dict[str, list[dict[str, Any]]] = {}
        for line in rundir.read_metrics(run_dir) if (run_dir / rundir.METRICS).is_file() else []:
            by_stage.setdefault(line["stage"], []).append(line)
        panels = [
            Panel(f"{stage}: {name}", of_stage, [name])
            for stage, of_stage in by_stage.items()
            for name in ("loss", "tflops")
        ]
        if panels:
            save_plot(curves_plot(panels), run_dir / "curves.png")
