"""One stage of a LLaVA-style model, from its flags to its files in runs/NAME.

runs/NAME/config.json env.json metrics.jsonl curves.png
runs/NAME/align/      data.json, checkpoints/step-N while it runs, then mm_projector.bin and done.json
                      profile/ with --profile; skipped.jsonl with --on_bad_sample skip
runs/NAME/instruct/   the same
runs/NAME/held_out/   of captions: images that were not trained on, and a question file (mllm/data/captions.py)
runs/NAME/model/      the stock transformers model (adapters merged); mm_projector.bin and clips_mllm.json beside it
runs/NAME/adapter/    with LoRA and all layers: PEFT's adapter and LLaVA's non_lora_trainables.bin
"""

import contextlib
import dataclasses
import shlex
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import nn

from clips.common.distributed import Start, init_distributed, meet_on, naming_lost_ranks, once_per_machine, shutdown
from clips.common.errors import CommandError, UserError, first_line
from clips.common.files import write_json
from clips.common.launch import launcher
from clips.common.live import expected_time, remember_speed, say
from clips.common.page import table_of
from clips.common.profile import profiled
from clips.common.runtime import environment
from clips.engine import checkpoint
from clips.engine.checkpoint import Checkpoint, TrainState, Writer
from clips.engine.engine import Engine
from clips.engine.log import RunLog, loggers
from clips.engine.loop import train as train_loop
from clips.engine.zero_state import full_on_rank_0
from mllm.data.captions import CaptionStore
from mllm.encoders.encoder import keep_statistics
from mllm.model.projector_start import START_IMAGES
from mllm.training.build import (
    BuiltStage,
    assert_freeze,
    build_stage,
    collator_of,
    count_parameters,
    deepspeed_config,
    fit_to_captions,
    make_optimizer,
)
from mllm.training.config import StageConfig, TrainFlags
from mllm.training.finish import print_next, write_curves, write_results
from mllm.training.recipes import PARTS, STAGE_FLAGS
from mllm.training.record import record_stage
from mllm.training.trainer import LlavaTrainer, TrainingModel, costs_of, samples_after, steps_of

FEW, MANY_EPOCHS = 20, 20
"""Optimizer steps below which the plan says that a stage learns next to nothing, and epochs above which it warns."""


def run_stage(config: StageConfig) -> None:
    """Train one stage, from its newest checkpoint if there is one; a finished stage is left as it is.

    Raises the errors of clips/common/errors.py. Every rank raises the same error, unless the error is one rank's own.
    """
    begin = time.perf_counter()
    with Start() as start:
        device = meet_on(start, config.device)
        config = config.on(device).check_ranks(start.ranks)
        deepspeed = deepspeed_config(config, start.ranks)
        init_distributed(device)
        start.agree({"flags": dataclasses.asdict(config), "--deepspeed": deepspeed})

        start.at("the parts of the model")
        built = build_stage(config, device, deepspeed)
        data = f"{len(built.dataset):,} samples ({built.data['sha256'][:8]})"
        start.agree({"the training data": data, "the vision encoder": built.vision.fingerprint})
        if start.rank == 0:
            print_plan(built, start.ranks)
        if config.dry_run:
            start.close()
            shutdown()
            return

        start.at("the run directory")
        record_stage(built, write=start.rank == 0)
        if start.rank == 0:
            checkpoint.remove_leftovers(built.stage_dir)
        if start.of_rank_0((built.stage_dir / "done.json").is_file()):
            _say(start, f"stage {config.stage} is finished already: {built.stage_dir}")
            start.close()
        else:
            before = once_per_machine(lambda: checkpoint.latest(built.stage_dir))
            start.agree({"the checkpoint to go on from": before.path.name if before else "none"})
            summary = train(built, before, start, begin)
            if start.rank == 0 and summary["samples_per_s"]:
                remember_speed(speed_name(built, start.ranks), summary["samples_per_s"])
            with (
                naming_lost_ranks(lambda: summary["steps"]),
                writing(f"the results cannot be written to {built.run_dir}"),
            ):
                with full_on_rank_0(built.model, built.run_dir, built.zero):
                    if start.rank == 0:
                        write_results(built, summary)
                dist.barrier()  # a rank that ends takes the group down, and rank 0 still writes
    if start.rank == 0:
        write_curves(built.run_dir)  # last: a plot that fails costs nothing
        print_next(config.stage, built.run_dir)
    shutdown()


def train(built: BuiltStage, before: Checkpoint | None, start: Start, begin: float) -> dict[str, Any]:
    """Take the stage's steps from the checkpoint `before` on and return its summary (done.json).

    `begin` is the time when the preparation began. `start` is closed once the engine is made. Raises Stopped after a
    signal, once a checkpoint is written.
    """
    config, device, stage_dir = built.config, built.device, built.stage_dir
    start.at("the image features")
    collator = collator_of(built, start)  # encodes the images that the feature cache lacks

    start.at("the projector's start and the engine")
    assert_freeze(built.model, built.freeze)
    state = TrainState(seed=config.seed) if before is None else before.state
    if before is not None:
        _say(start, f"goes on from {before.path}")
    elif config.mm_projector_init not in (None, "random") and config.pretrain_mm_mlp_adapter is None:
        _say(start, f"projector's start: up to {START_IMAGES:,} samples are read, then fitted: up to minutes on a CPU")
        r2 = fit_to_captions(built, collator, start)
        _say(start, f"projector started from the captions (R² {r2:.2f})")
    has_masters = bool(config.bf16) and built.zero > 0
    model = TrainingModel(
        built.model, features=config.caches_features, bf16=bool(config.bf16) and not has_masters
    ).train()
    trained = model.trained()
    costs = costs_of(model.llava, 0 if model.features else built.vision.image_size)
    if before is not None:
        put_back(before, trained)
    engine = Engine(
        model, make_optimizer(model, config.rates, config.weight_decay), device, built.deepspeed,
        micro_batch=config.per_device_train_batch_size, accumulation=config.gradient_accumulation_steps,
        clip_grad=config.max_grad_norm, bf16_weights=has_masters, checkpointed=trained,
    )  # fmt: skip
    if has_masters:
        keep_statistics(model.llava.model.vision_tower, torch.bfloat16)
    if before is not None:
        if has_masters:
            engine.zero_state.restore_masters(before.weights())
        engine.zero_state.restore_optimizer(before.optimizer(), state.step)
    trainer = LlavaTrainer(config, engine, built.dataset, collator, state, costs)
    if start.rank == 0:
        write_json(built.run_dir / "env.json", environment(device, start.ranks) | engine.facts)
    log = RunLog(
        built.run_dir, trainer.samples, config.what_trains(), start_step=state.step, active=start.rank == 0,
        report_to=loggers(config.report_to), run_name=config.run_name, stage=config.stage_info.name,
    )  # fmt: skip
    start.finish()

    prepare_seconds = time.perf_counter() - begin
    with (
        contextlib.closing(log),
        naming_lost_ranks(lambda: state.step + 1),
        profiled(stage_dir / "profile", config.profile, device) as profiler,
        Writer(stage_dir, config.save_total_limit) as writer,
    ):
        speeds = train_loop(trainer, log, writer, profiler)
    return {
        "stage": config.stage_info.name,
        "steps": state.step,
        "samples": state.samples,
        "prepare_seconds": round(prepare_seconds, 1),
        **speeds,
        "truncated_samples": _count_truncated(built.dataset.truncated, device),
        "trained_parameters": {part: trained for part, (_, trained) in count_parameters(built.model).items()},
    }


def _count_truncated(truncated: torch.Tensor, device: torch.device) -> int:
    """Return how many samples any rank has truncated. Every rank must call it; each marks those that it has read."""
    marked = truncated.to(device, torch.uint8)
    dist.all_reduce(marked, dist.ReduceOp.MAX)
    return int(marked.sum())


def _say(start: Start, text: str) -> None:
    if start.rank == 0:
        say(text)


def put_back(checkpoint: Checkpoint, trained: Mapping[str, nn.Parameter]) -> None:
    """Give the trained parameters the values of a checkpoint. Raises UserError if it holds other parameters."""
    saved = checkpoint.weights()
    if {name: t.shape for name, t in saved.items()} != {name: p.shape for name, p in trained.items()}:
        raise UserError(
            f"cannot go on from {checkpoint.path}: it holds other parameters than those that train. Restore it from a "
            "copy, or give another --output_dir"
        )
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(saved[name])


@contextlib.contextmanager
def writing(failed: str) -> Iterator[None]:
    """Turn any error of a full disk inside into a CommandError that begins with `failed`."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # each library has its own
        if isinstance(error, dist.DistError) or "gloo" in str(error):  # of a rank that is lost
            raise
        raise CommandError(
            f"{failed}: {first_line(error)}. The older checkpoints are intact: make room, then the same command goes "
            "on from the last one"
        ) from error


# ------------------------------------------------------------------------------------------- the plan
def command_line(config: StageConfig, world_size: int) -> str:
    """Return the command of this stage, with every flag that differs from the parser's default."""
    words = ["python", *launcher(world_size), "scripts/train_llava.py", "--stage", str(config.stage)]
    for field in dataclasses.fields(TrainFlags):
        value = getattr(config, field.name)
        others = STAGE_FLAGS[3 - config.stage]
        if value is None or value == field.default or field.name in ("stage", "dry_run", *others):
            continue
        words += [f"--{field.name}", *map(str, value if isinstance(value, tuple) else [value])]
    return shlex.join(words)


def speed_name(built: BuiltStage, ranks: int) -> str:
    """Return a description that stages of equal speed have in common, the key for `expected_time`."""
    config = built.config
    parts = ", ".join(f"{total:,}" for total, _ in count_parameters(built.model).values())
    how = f"batch {config.batch_size}, {'cached' if config.caches_features else 'live'} features"
    on = f"{ranks} × {built.device.type}, {torch.get_num_threads()} threads"
    return f"{config.stage_info.name}: {parts} parameters, {how} on {on}"


def print_plan(built: BuiltStage, ranks: int) -> None:
    """Print the freeze table with counts and rates, then what else matters."""
    config = built.config
    freeze = built.freeze
    samples = len(built.dataset)
    stage = config.stage_info
    counts = count_parameters(built.model)
    table = []
    for part in PARTS:
        total, trained = counts[part]
        rate = "–" if freeze[part] == "frozen" else f"{config.rates[part]:g}"
        how = freeze[part] + (f", {config.bits} bits" if part == "language_model" and config.bits < 16 else "")
        table.append((part, how, f"{total / 1e6:.2f} M", f"{trained / 1e6:.3f} M" if trained else "0", rate))
    head = ("part", "trains", "parameters", "trained", "learning rate")
    say(table_of(f"stage {stage.number}: {stage.name}", head, table, names=2))
    steps = steps_of(config, samples)
    seen = samples_after(steps, samples, config.batch_size)
    batch = f"{ranks} × {config.gradient_accumulation_steps} × {config.per_device_train_batch_size}"
    facts = dict(built.facts)
    facts["steps"] = (
        f"{steps:,} of {config.batch_size} samples ({batch}: ranks, accumulation, micro-batch) = "
        f"{seen:,} samples, {seen / samples:.1f} epochs"
    )
    if seen > MANY_EPOCHS * samples:
        facts["many epochs"] = f"it may learn the {samples:,} samples by heart: give fewer --max_steps, or more data"
    if duration := expected_time(speed_name(built, ranks), seen):
        facts["time"] = duration
    if steps < FEW:
        more = "more --max_steps" if config.max_steps > 0 else "a smaller --batch_size, or more --num_train_epochs"
        facts["few steps"] = f"the model hardly changes: take {more}"
    if stage.number == 2 and config.small and isinstance(built.store, CaptionStore):
        facts["to expect"] = (
            "short sentences in the words of these captions. It mentions what many captions do, and invents the rest. "
            "For more take published encoders and models, --vision hf:… --model_name_or_path …, without --small"
        )
    if stage.number == 1 and config.llm_adapter == "none" and "layers" in facts.get("language model", ""):
        facts["loss"] = "begins at 17 to 20, not at 5 to 8: the cut language model is wrong until stage 2 trains it"
    facts["arithmetic"] = f"{'bf16' if config.bf16 else 'fp32'}, " + (f"ZeRO {built.zero}" if built.zero else "no ZeRO")
    facts["writes to"] = str(Path(config.output_dir))
    facts["command"] = command_line(config, ranks)
    for name, value in facts.items():
        say(f"  {name:<16} {value}")
