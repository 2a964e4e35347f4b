"""Load a trained encoder from whatever holds one: a run, an export, a checkpoint."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clips.common.errors import UserError
from clips.common.files import from_json, read_bytes, read_json
from clips.common.hub import OPEN_CLIP_WEIGHTS, resolve
from clips.common.opening import check_layers, opening
from clips.common.rundir import (
    MADE_OF,
    check_current,
    checkpoints,
    chosen_checkpoint,
    is_current,
    is_debug,
    take_newest,
    weights_of,
)
from clips.common.tensors import build_for, read_weights
from clips.config import CaptionsConfig, DataConfig, ModelConfig, OptimConfig, PhaseConfig, RunConfig, TaskConfig
from clips.data.tokenizer import CaptionTokenizer
from clips.engine import checkpoint
from clips.model.clips import CLIPSModel
from clips.weights.foreign import kind_of, read_timm, read_transformers
from clips.weights.open_clip import read_open_clip

NATIVE_WEIGHTS = "model.safetensors"
READERS = {"open_clip": read_open_clip, "transformers": read_transformers, "timm": read_timm}
"""Reader for each kind of directory (`kind_of`)."""


def load_native(directory: Path) -> tuple[CLIPSModel, RunConfig, CaptionTokenizer]:
    """Load the model (eval mode, fp32, CPU), its run configuration and tokenizer. Raises UserError if they disagree."""
    directory = Path(directory)
    run = RunConfig.load(directory / "config.json")
    check_layers(run.to_dict(), directory)
    tokenizer = CaptionTokenizer.load(directory / "tokenizer")
    tensors = read_weights(directory / NATIVE_WEIGHTS)
    model = build_for(lambda: CLIPSModel(run.model, tokenizer.pad_id), tensors, directory)
    return model.eval(), run, tokenizer


@dataclass
class LoadedModel:
    """A trained model, in eval mode, fp32, on the CPU."""

    model: CLIPSModel
    run: RunConfig
    tokenizer: CaptionTokenizer
    path: Path
    """The directory that was given or found, or the one in the hub's cache."""
    home: Path
    """The directory for results: `path`; the run of a checkpoint; runs/OWNER--NAME for a model of the hub."""
    checkpoint: dict[str, Any] | None = None
    """The checkpoint of a run that the weights come from (`clips.common.rundir.weights_of`), if known."""
    is_checkpoint: bool = False
    """True if `path` is a checkpoint rather than a run, an export or another model."""


def load_model(path: str | Path | None = None, runs: str | Path = "runs") -> LoadedModel:
    """Load a run directory, a native or open_clip export, or a model of the hub; None: the newest run under `runs`.

    Official checkpoints of CLIPS and OpenVision have open_clip's format. A full CLIP of transformers is read too. Of a
    run, the export is loaded, or the chosen checkpoint (`train.choose`) if the export is not of that one;
    checkpoints/step-N names one checkpoint.
    """
    if path is None:
        path = _newest_run(Path(runs))
    directory = resolve(str(path), "model", (*OPEN_CLIP_WEIGHTS, NATIVE_WEIGHTS))
    is_here = directory == Path(path).expanduser()
    home = directory if is_here else Path(runs) / str(path).replace("/", "--")
    is_checkpoint = checkpoint.is_one(directory)
    with opening("model", directory):
        if is_checkpoint:
            home = checkpoint.run_of(directory)
            model, run, tokenizer, of = _load_checkpoint(checkpoint.load(directory, "checkpoint"), home)
        else:
            model, run, tokenizer, of = _load(directory)
    return LoadedModel(model, run, tokenizer, directory, home, checkpoint=of, is_checkpoint=is_checkpoint)


Loaded = tuple[CLIPSModel, RunConfig, CaptionTokenizer, dict[str, Any] | None]
"""Model, configuration, tokenizer, and the checkpoint that the weights come from, if known."""


def _load(path: Path) -> Loaded:
    if (kind := kind_of(path)) is not None:
        return *_load_foreign(path, kind), None
    for directory in (path, path / "native", path / "export" / "native"):
        if (directory / NATIVE_WEIGHTS).is_file() and (directory / "config.json").is_file():
            if directory == path / "export" / "native" and not is_current(path / "export"):
                break
            return *load_native(directory), read_json(directory.parent / MADE_OF) or None
    chosen = chosen_checkpoint(path)
    if chosen is not None and chosen != checkpoints(path)[0]:
        return _load_checkpoint(checkpoint.load(chosen, "checkpoint"), path)
    if (latest := checkpoint.latest(path)) is not None:
        return _load_checkpoint(latest, path)
    raise UserError(f"{path} holds no trained model: expected a run, an export, or a CLIP of open_clip or transformers")


def _load_checkpoint(saved: checkpoint.Checkpoint, run_dir: Path) -> Loaded:
    run = RunConfig.load(run_dir / "config.json")
    check_layers(run.to_dict(), run_dir)
    tokenizer = CaptionTokenizer.load(run_dir / "tokenizer")
    tensors = saved.weights()
    model = build_for(lambda: CLIPSModel(run.model, tokenizer.pad_id), tensors, saved.path)
    model.visual.set_image_size(run.phases[min(saved.state.phase, len(run.phases) - 1)].image_size)
    return model.eval(), run, tokenizer, weights_of(saved.path)


def _load_foreign(directory: Path, kind: str) -> tuple[CLIPSModel, RunConfig, CaptionTokenizer]:
    """Load a full CLIP of another library. Raises UserError if it has no text tower."""
    foreign = READERS[kind](directory)
    if foreign.text is None or foreign.tokenizer is None or foreign.embed_dim is None:
        train = f"python scripts/pretrain_clips.py --init-from {shlex.quote(str(directory))}"
        raise UserError(f"{directory} has only an image tower: train a text tower for it with `{train}`")
    tokenizer = foreign.tokenizer
    config = ModelConfig(vision=foreign.vision, text=foreign.text, captioner=None, embed_dim=foreign.embed_dim)
    model = build_for(lambda: CLIPSModel(config, tokenizer.pad_id), foreign.tensors, directory)
    return model.eval(), _imported_run(config, tokenizer), tokenizer


def _newest_run(runs: Path) -> Path:
    dated = [(max(_time(run / "LATEST"), _time(run / "export" / "native")), run) for run in runs.glob("*")]
    dated = [(time, run) for time, run in dated if time and not is_debug(run)]
    if not dated:
        raise UserError(f"no trained run under {runs}: train one (scripts/pretrain_clips.py) or give --model")
    return take_newest("encoder", dated)


def _time(path: Path) -> float:
    return path.stat().st_mtime if path.exists() else 0.0


def _imported_run(model: ModelConfig, tokenizer: CaptionTokenizer) -> RunConfig:
    """A run configuration for a model that was trained elsewhere."""
    return RunConfig(
        recipe="imported",
        model=model,
        captions=CaptionsConfig(tokenizer="clip" if tokenizer.is_clip else "bert"),
        task=TaskConfig(caption_weight=0.0),
        data=DataConfig(),
        optim=OptimConfig(),
        phases=(PhaseConfig(name="imported", samples=1, batch_size=1, lr=0.0, image_size=model.vision.image_size),),
    )


def newest_export(runs: Path, objective: str, recipe: str = "demo") -> Path:
    """Return the newest export directory under `runs` of a run whose `task.objective` is `objective`.

    Raises UserError, which names `recipe` as the one to train, if there is none, and if its run has trained further.
    """
    dated = []
    for config in runs.glob("*/export/hf_vit/config.json"):
        run_config = config.parents[2] / "config.json"
        try:
            trained = from_json(read_bytes(run_config))["task"]["objective"]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # not a finished run of this project; the error below says what is needed
        if trained == objective and not is_debug(run_config.parent):
            dated.append((config.stat().st_mtime, config.parents[1]))
    if not dated:
        mend = f"train one with --recipe {recipe}, or name a directory as {objective}:DIR"
        raise UserError(f"no finished run with task.objective {objective!r} and an export under {runs}/: {mend}")
    return check_current(take_newest(f"{objective} encoder", dated))
