"""One stage of a LLaVA-style model, from its flags to its files in runs/NAME.

runs/NAME/config.json env.json metrics.jsonl curves.png
runs/NAME/align/      checkpoint-N/ while it runs, then mm_projector.bin and done.json
                      profile/ with --profile; skipped.jsonl with --on_bad_sample skip
runs/NAME/instruct/   the same
runs/NAME/model/      the stock transformers model (adapters merged); mm_projector.bin and clips_mllm.json beside it
runs/NAME/adapter/    with LoRA and all layers: PEFT's adapter and LLaVA's non_lora_trainables.bin
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from clips.common.errors import reporting
from clips.common.escape import for_rich
from clips.common.files import write_json
from clips.common.live import in_words
from clips.common.profile import profiled
from clips.common.ranks import naming_lost_ranks
from clips.common.runtime import bound_kernel_caches, environment, init_distributed, meet_on, shutdown
from clips.common.signals import stopped_by
from clips.common.start import Start
from mllm.data.sampler import EpochSampler
from mllm.model.flops import LlavaFlops
from mllm.training.arguments import TrainArguments
from mllm.training.checkpoints import check_content, newest, step_of
from mllm.training.finish import print_next, write_results
from mllm.training.freeze import assert_freeze, count_parameters, llava_of
from mllm.training.log import MetricsLog, Work, write_curves
from mllm.training.plan import print_plan, steps_of
from mllm.training.prepare import Prepared, collator_of, fit_to_captions, prepare, record_config
from mllm.training.trainer import LlavaTrainer, StepCallback, TrainingModel, training_arguments
from mllm.training.zero import check_engine, checkpoint_classes, deepspeed_config, fitted, whole, zero_stage


def run_stage(flags: TrainArguments) -> None:
    """Train one stage, from its newest checkpoint if there is one; a finished stage is left as it is.

    Raises the errors of clips/common/errors.py. Every rank raises the same error, unless the error is one rank's own.
    """
    begin = time.perf_counter()
    with Start() as start:
        device = meet_on(start, flags.device)
        arguments = flags.resolve(start.ranks)
        stage, run_dir = arguments.description, Path(arguments.output_dir)
        process = join(arguments, device, start.ranks)
        start.agree({"flags": dataclasses.asdict(arguments), "--deepspeed": process.deepspeed})

        start.at("the parts of the model")
        prepared = prepare(arguments, run_dir, process.device, process.deepspeed)
        hidden_size = llava_of(prepared.model).config.get_text_config().hidden_size
        process = replace(process, deepspeed=fitted(process.deepspeed, hidden_size, process.device))
        zero = zero_stage(process.deepspeed)
        if process.deepspeed:
            made = training_arguments(arguments, run_dir / stage.name, process.device, process.deepspeed)
            check_engine(made, arguments.deepspeed, steps_of(arguments, len(prepared.dataset), start.ranks))
        start.agree(facts_of_stage(prepared, run_dir / stage.name))
        print_plan(
            arguments, prepared.model, prepared.freeze, prepared.facts, samples=len(prepared.dataset),
            zero=zero, world_size=start.ranks, console=process.console,
        )  # fmt: skip
        if arguments.dry_run:
            start.close()
            shutdown()
            return

        start.at("the run directory")
        record_config(arguments, prepared, run_dir, write=process.is_main)
        if start.of_rank_0((run_dir / stage.name / "done.json").is_file()):
            process.console.print(f"stage {stage.number} is finished already: {for_rich(str(run_dir / stage.name))}")
            start.close()
        else:
            summary = train(arguments, prepared, run_dir, process, start, begin)
            with whole(prepared.model, zero):
                if process.is_main:
                    with reporting(f"stage {stage.number} is trained, and its results cannot be written to {run_dir}"):
                        write_results(arguments, prepared, run_dir, summary, cast=not process.deepspeed)
            if dist.is_initialized():
                dist.barrier()  # a rank that ends takes the group down, and rank 0 still writes
            print_summary(summary, stage.number, process.console)
    if process.is_main:
        write_curves(run_dir)  # last: a plot that fails costs nothing
    print_next(stage.number, run_dir, process.console)
    shutdown()


@dataclass(frozen=True, kw_only=True)
class Process:
    """This process among the ranks of the stage."""

    device: torch.device
    world_size: int
    is_main: bool
    deepspeed: dict[str, Any] | None
    """The engine's settings; None without DeepSpeed."""
    console: Console
    """Prints on the main process only."""


def join(arguments: TrainArguments, device: torch.device, world_size: int) -> Process:
    """With several ranks or DeepSpeed, join the process group."""
    deepspeed = deepspeed_config(arguments, world_size)
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # read by deepspeed, which accelerate imports
        bound_kernel_caches()
    if world_size > 1 or deepspeed:
        init_distributed(device)  # before TrainingArguments: they would choose another backend
    is_main = not dist.is_initialized() or dist.get_rank() == 0
    console = Console(emoji=False, stderr=True, quiet=not is_main)
    return Process(device=device, world_size=world_size, is_main=is_main, deepspeed=deepspeed, console=console)


def facts_of_stage(prepared: Prepared, stage_dir: Path) -> dict[str, Any]:
    """What every rank must have found alike before they train together."""
    lengths = hashlib.sha256(json.dumps(prepared.dataset.modality_lengths).encode()).hexdigest()[:8]
    checkpoint = newest(stage_dir)
    return {
        "the training data": f"{len(prepared.dataset):,} samples (lengths {lengths})",
        "the vision encoder": prepared.vision.fingerprint,
        "the checkpoint to go on from": checkpoint.name if checkpoint else "none",
    }


def train(
    arguments: TrainArguments, prepared: Prepared, run_dir: Path, process: Process, start: Start, begin: float
) -> dict[str, Any]:
    """Take the stage's steps and return its summary (done.json); `begin` is the time when the preparation began.

    `start` is closed once the engine is made. Raises Stopped after a signal, once a checkpoint is written.
    """
    stage, stage_dir = arguments.description, run_dir / arguments.description.name
    if process.is_main:
        write_json(run_dir / "env.json", environment(process.device, process.world_size))
    start.at("the image features")
    collator = collator_of(arguments, prepared, process.device)  # encodes the images that the feature cache lacks
    start.at("the projector's start and the engine")
    assert_freeze(prepared.model, prepared.freeze)
    model = TrainingModel(prepared.model, features=arguments.caches_features)
    flops = LlavaFlops(
        model.llava,
        image_size=prepared.vision.image_size,
        image_tokens=prepared.vision.num_tokens,
        features=arguments.caches_features,
    )
    work = Work(flops, process.device, process.world_size, model.packed)
    steps = StepCallback(start)
    trainer = LlavaTrainer(
        arguments,
        model=model,
        args=training_arguments(arguments, stage_dir, process.device, process.deepspeed),
        sampler=EpochSampler(
            prepared.dataset.modality_lengths,
            batch_size=arguments.per_device_train_batch_size,
            chunks=process.world_size * arguments.gradient_accumulation_steps,
            seed=arguments.seed,
            group_by_modality_length=arguments.group_by_modality_length,
        ),
        data_collator=collator,
        train_dataset=prepared.dataset,
        work=work,
        callbacks=[MetricsLog(run_dir, arguments, work, active=process.is_main), steps],
    )
    checkpoint = newest(stage_dir)
    if checkpoint is not None:
        classes = checkpoint_classes() if process.deepspeed else None
        check_content(checkpoint, deepspeed=classes, world_size=process.world_size)
        process.console.print(f"goes on from {for_rich(str(checkpoint))}")
    elif arguments.mm_projector_init == "captions" and arguments.pretrain_mm_mlp_adapter is None:
        r2 = fit_to_captions(arguments, prepared, collator, process.device)
        process.console.print(f"projector started from the captions (R² {r2:.2f})", highlight=False)
    prepared_s, train_begin = time.perf_counter() - begin, time.perf_counter()
    first_step = step_of(checkpoint) if checkpoint else 0
    with (
        naming_lost_ranks(lambda: trainer.state.global_step + 1),
        profiled(stage_dir / "profile", arguments.profile, process.device) as steps.profiler,
    ):
        result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds = time.perf_counter() - train_begin
    if steps.stopped:
        if dist.is_initialized():
            dist.barrier()  # a rank that ends has its launcher end the others, and rank 0 may still be writing
        raise stopped_by(steps.stopped)
    done, tokens = work.over_all_ranks()
    samples = (result.global_step - first_step) * arguments.batch_size
    return {
        "stage": stage.name,
        "steps": result.global_step,
        "samples": result.global_step * arguments.batch_size,
        "train_seconds": round(seconds, 1),
        "prepare_seconds": round(prepared_s, 1),
        **work.rates(samples=samples, flops=done / process.world_size, seconds=seconds),
        "tokens_per_s": round(tokens / seconds, 1),
        "truncated_samples": prepared.dataset.truncated,
        "trained_parameters": {part: trained for part, (_, trained) in count_parameters(prepared.model).items()},
    }


def print_summary(summary: dict[str, Any], number: int, console: Console) -> None:
    peak = f"{summary['mfu']:.0%} of the GPU's peak, " if "mfu" in summary else ""
    console.print(
        f"stage {number} ({summary['stage']}): trained for {in_words(summary['train_seconds'])}, after "
        f"{in_words(summary['prepare_seconds'])} of preparation: {summary['samples_per_s']:.1f} samples/s, "
        f"{summary['tokens_per_s']:,.0f} tokens/s, {peak}"
        f"{summary['peak_memory_gb']:.1f} GB",
        highlight=False,
        soft_wrap=True,
    )
