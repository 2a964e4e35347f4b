"""Load a trained encoder from whatever holds one: a run, an export, a checkpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from clips.common.errors import UserError
from clips.common.tensors import assign_weights, read_weights
from clips.config import CaptionsConfig, DataConfig, ModelConfig, OptimConfig, PhaseConfig, RunConfig, TaskConfig
from clips.data.tokenizer import CaptionTokenizer
from clips.model.clips import CLIPSModel
from clips.weights import checkpoint
from clips.weights.formats import import_open_clip


def load_native(directory: Path) -> tuple[CLIPSModel, RunConfig, CaptionTokenizer]:
    """The model (eval mode, fp32, CPU), its run configuration and its tokenizer; UserError when they do not fit."""
    directory = Path(directory)
    run = RunConfig.load(directory / "config.json")
    tokenizer = CaptionTokenizer.load(directory / "tokenizer")
    model = CLIPSModel(run.model, tokenizer.pad_id)
    assign_weights(model, read_weights(directory / "model.safetensors"), directory)
    return model.eval(), run, tokenizer


@dataclass
class LoadedModel:
    """A trained model, in eval mode, fp32, on the CPU."""

    model: CLIPSModel
    run: RunConfig
    tokenizer: CaptionTokenizer
    path: Path
    """The directory that was asked for, or found."""
    samples: int | None = None
    """How many training samples the weights have seen, where that is known."""


def load_model(path: str | Path | None = None, runs: str | Path = "runs") -> LoadedModel:
    """Load a run directory, an export directory, or a native or open_clip export; None: the newest run under `runs`.

    Official checkpoints of CLIPS and OpenVision are of open_clip's kind.
    Of a run, its export, or its newest checkpoint when that is newer or there is no export yet.
    """
    path = Path(path) if path is not None else _newest_run(Path(runs))
    for directory in (path, path / "native", path / "export" / "native"):
        if (directory / "model.safetensors").is_file() and (directory / "config.json").is_file():
            if directory == path / "export" / "native" and _time(path / "LATEST") > _time(directory):
                break
            return LoadedModel(*load_native(directory), path)
    if (path / "open_clip_config.json").is_file():
        model, tokenizer = import_open_clip(path)
        return LoadedModel(model, _imported_run(model.config), tokenizer, path)
    if (path / "checkpoints").is_dir() and (found := checkpoint.latest(path)) is not None:
        run = RunConfig.load(path / "config.json")
        tokenizer = CaptionTokenizer.load(path / "tokenizer")
        model = CLIPSModel(run.model, tokenizer.pad_id)
        assign_weights(model, found.weights(), found.path)
        model.visual.set_image_size(run.phases[min(found.state.phase, len(run.phases) - 1)].image_size)
        return LoadedModel(model.eval(), run, tokenizer, path, found.state.samples)
    raise UserError(
        f"{path} holds no trained model: expected a run directory (with export/ or checkpoints/), a native export "
        "(config.json, model.safetensors) or an open_clip one (open_clip_config.json)"
    )


def _newest_run(runs: Path) -> Path:
    found = {run: max(_time(run / "LATEST"), _time(run / "export" / "native")) for run in runs.glob("*")}
    found = {run: time for run, time in found.items() if time}
    if not found:
        raise UserError(f"no trained run under {runs}: train one (scripts/pretrain_clips.py) or give --model")
    return max(found, key=found.__getitem__)


def _time(path: Path) -> float:
    return path.stat().st_mtime if path.exists() else 0.0


def _imported_run(model: ModelConfig) -> RunConfig:
    """What a model that was trained elsewhere lets us say of its run."""
    return RunConfig(
        recipe="imported",
        model=model,
        captions=CaptionsConfig(),
        task=TaskConfig(caption_weight=0.0),
        data=DataConfig(),
        optim=OptimConfig(),
        phases=(PhaseConfig(name="imported", samples=1, batch_size=1, lr=0.0, image_size=model.vision.image_size),),
    )


def newest_export(runs: Path, objective: str, recipe: str = "demo") -> Path:
    """The export directory written last under `runs` by a run whose `task.objective` is `objective`."""
    found = []
    for config in runs.glob("*/export/hf_vit/config.json"):
        run_config = config.parents[2] / "config.json"
        try:
            task = json.loads(run_config.read_text()).get("task", {})
        except (OSError, ValueError):
            continue  # not a finished run of this project; the error below says what is looked for
        if task.get("objective") == objective:
            found.append((config.stat().st_mtime, config.parents[1]))
    if not found:
        raise UserError(
            f"no finished run with task.objective {objective!r} and an export under {runs}/: train one with "
            f"`deepspeed scripts/pretrain_clips.py --recipe {recipe}`, or name a directory as {objective}:DIR"
        )
    return max(found)[1]
