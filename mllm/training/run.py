"""One stage of a LLaVA-style model, from its flags to its files in runs/NAME.

runs/NAME/config.json env.json metrics.jsonl curves.png
runs/NAME/align/      checkpoint-N/ while it runs, then mm_projector.bin and done.json
                      profile/ with --profile; skipped.jsonl with --on_bad_sample skip
runs/NAME/instruct/   the same
runs/NAME/held_out/   of captions: images that were not trained on, and a question file (mllm/data/captions.py)
runs/NAME/model/      the stock transformers model (adapters merged); mm_projector.bin and clips_mllm.json beside it
runs/NAME/adapter/    with LoRA and all layers: PEFT's adapter and LLaVA's non_lora_trainables.bin
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from clips.common.escape import for_rich
from clips.common.files import write_json
from clips.common.live import in_words
from clips.common.profile import profiled
from clips.common.ranks import naming_lost_ranks
from clips.common.runtime import bound_kernel_caches, environment, init_distributed, meet_on, shutdown
from clips.common.signals import stopped_by
from clips.common.start import Start
from mllm.data.sampler import EpochSampler
from mllm.training.arguments import TrainArguments
from mllm.training.checkpoints import check_content, newest, step_of, writing
from mllm.training.finish import print_next, write_results
from mllm.training.freeze import assert_freeze, count_parameters
from mllm.training.log import MetricsLog, Work, costs_of, write_curves
from mllm.training.plan import print_plan
from mllm.training.prepare import Prepared, collator_of, fit_to_captions, prepare, record_config
from mllm.training.trainer import LlavaTrainer, StepCallback, TrainingModel, training_arguments
from mllm.training.zero import checkpoint_classes, deepspeed_config, whole


def run_stage(flags: TrainArguments) -> None:
    """Train one stage, from its newest checkpoint if there is one; a finished stage is left as it is.

    Raises the errors of clips/common/errors.py. Every rank raises the same error, unless the error is one rank's own.
    """
    begin = time.perf_counter()
    with Start() as start:
        console = Console(emoji=False, stderr=True, quiet=start.rank != 0)
        device = meet_on(start, flags.device)
        arguments = flags.resolve(start.ranks)
        deepspeed = join(arguments, device, start.ranks)
        start.agree({"flags": dataclasses.asdict(arguments), "--deepspeed": deepspeed})

        start.at("the parts of the model")
        prepared = prepare(arguments, device, deepspeed)
        lengths = hashlib.sha256(json.dumps(prepared.dataset.modality_lengths).encode()).hexdigest()[:8]
        data = f"{len(prepared.dataset):,} samples (lengths {lengths})"
        start.agree({"the training data": data, "the vision encoder": prepared.vision.fingerprint})
        print_plan(prepared, start.ranks, console)
        if arguments.dry_run:
            start.close()
            shutdown()
            return

        start.at("the run directory")
        record_config(prepared, write=start.rank == 0)
        if start.of_rank_0((prepared.stage_dir / "done.json").is_file()):
            console.print(f"stage {arguments.stage} is finished already: {for_rich(str(prepared.stage_dir))}")
            start.close()
        else:
            checkpoint = newest(prepared.stage_dir)
            start.agree({"the checkpoint to go on from": checkpoint.name if checkpoint else "none"})
            summary = train(prepared, checkpoint, start, console, begin)
            with naming_lost_ranks(lambda: summary["steps"]):
                with whole(prepared.model, prepared.zero):
                    if start.rank == 0:
                        with writing(f"the results cannot be written to {prepared.run_dir}"):
                            write_results(prepared, summary)
                if dist.is_initialized():
                    dist.barrier()  # a rank that ends takes the group down, and rank 0 still writes
            print_summary(summary, arguments.stage, console)
    if start.rank == 0:
        write_curves(prepared.run_dir)  # last: a plot that fails costs nothing
    print_next(arguments.stage, prepared.run_dir, console)
    shutdown()


def join(arguments: TrainArguments, device: torch.device, ranks: int) -> dict[str, Any] | None:
    """Return DeepSpeed's settings, None without it; with several ranks or DeepSpeed, join the process group."""
    deepspeed = deepspeed_config(arguments, ranks)
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # read by deepspeed, which accelerate imports
        bound_kernel_caches()
    if ranks > 1 or deepspeed:
        init_distributed(device)  # before TrainingArguments: they would choose another backend
    return deepspeed


def train(prepared: Prepared, checkpoint: Path | None, start: Start, console: Console, begin: float) -> dict[str, Any]:
    """Take the stage's steps after `checkpoint` and return its summary (done.json).

    `begin` is the time when the preparation began. `start` is closed once the engine is made. Raises Stopped after a
    signal, once a checkpoint is written.
    """
    arguments = prepared.arguments
    device = prepared.device
    deepspeed = prepared.deepspeed
    if start.rank == 0:
        write_json(prepared.run_dir / "env.json", environment(device, start.ranks))

    start.at("the image features")
    collator = collator_of(prepared, start)  # encodes the images that the feature cache lacks

    start.at("the projector's start and the engine")
    assert_freeze(prepared.model, prepared.freeze)
    model = TrainingModel(prepared.model, features=arguments.caches_features)
    costs = costs_of(model.llava, 0 if arguments.caches_features else prepared.vision.image_size)
    work = Work(costs, device, start.ranks, model.packed)
    steps = StepCallback(start)
    sampler = EpochSampler(
        prepared.dataset.modality_lengths,
        batch_size=arguments.per_device_train_batch_size,
        chunks=start.ranks * arguments.gradient_accumulation_steps,
        seed=arguments.seed,
        group_by_modality_length=arguments.group_by_modality_length,
    )
    trainer = LlavaTrainer(
        arguments,
        model=model,
        args=training_arguments(arguments, prepared.stage_dir, device, deepspeed),
        sampler=sampler,
        data_collator=collator,
        train_dataset=prepared.dataset,
        work=work,
        callbacks=[MetricsLog(prepared.run_dir, arguments, work, active=start.rank == 0), steps],
    )
    if checkpoint is not None:
        check_content(checkpoint, deepspeed=checkpoint_classes() if deepspeed else None, world_size=start.ranks)
        console.print(f"goes on from {for_rich(str(checkpoint))}")
    elif arguments.mm_projector_init == "captions" and arguments.pretrain_mm_mlp_adapter is None:
        console.print("projector's start: up to 8,192 samples are read, then fitted: up to minutes on a CPU")
        r2 = fit_to_captions(prepared, collator)
        console.print(f"projector started from the captions (R² {r2:.2f})", highlight=False)

    train_begin = time.perf_counter()
    with (
        naming_lost_ranks(lambda: trainer.state.global_step + 1),
        profiled(prepared.stage_dir / "profile", arguments.profile, device) as steps.profiler,
    ):
        result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds = time.perf_counter() - train_begin
    if steps.stopped:
        if dist.is_initialized():
            dist.barrier()  # a rank that ends has its launcher end the others, and rank 0 may still be writing
        raise stopped_by(steps.stopped)

    done, tokens = work.over_all_ranks()
    first_step = step_of(checkpoint) if checkpoint else 0
    samples = (result.global_step - first_step) * arguments.batch_size
    return {
        "stage": arguments.description.name,
        "steps": result.global_step,
        "samples": result.global_step * arguments.batch_size,
        "train_seconds": round(seconds, 1),
        "prepare_seconds": round(train_begin - begin, 1),
        **work.rates(samples=samples, flops=done / start.ranks, seconds=seconds),
        "tokens_per_s": round(tokens / seconds, 1),
        "truncated_samples": prepared.dataset.truncated,
        "trained_parameters": {part: trained for part, (_, trained) in count_parameters(prepared.model).items()},
    }


def print_summary(summary: dict[str, Any], number: int, console: Console) -> None:
    peak = f"{summary['mfu']:.0%} of the GPU's peak, " if "mfu" in summary else ""
    console.print(
        f"stage {number} ({summary['stage']}): trained for {in_words(summary['train_seconds'])}, after "
        f"{in_words(summary['prepare_seconds'])} of preparation: {summary['samples_per_s']:.1f} samples/s, "
        f"{summary['tokens_per_s']:,.0f} tokens/s, {peak}{summary['peak_memory_gb']:.1f} GB",
        highlight=False,
        soft_wrap=True,
    )
