"""One stage of a LLaVA-style model, from its flags to what it leaves in runs/NAME.

runs/NAME/config.json env.json metrics.jsonl curves.png
runs/NAME/align/      checkpoint-N/ while it runs, then mm_projector.bin and done.json
runs/NAME/instruct/   the same
runs/NAME/model/      the stock transformers model (adapters merged), mm_projector.bin beside it
runs/NAME/adapter/    with LoRA: PEFT's adapter and LLaVA's non_lora_trainables.bin
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from rich.console import Console
from torch import nn
from transformers import TrainingArguments

from clips.common.errors import Stopped
from clips.common.files import read_json, write_json
from clips.common.ranks import naming_lost_ranks
from clips.common.runtime import choose_device, environment, import_deepspeed, init_distributed, shutdown
from mllm.data.sampler import EpochSampler
from mllm.model.llava import merge_lora, save_model
from mllm.model.projector import save_projector
from mllm.model.quantize import dequantize, merge_quantized_lora
from mllm.training.arguments import TrainArguments
from mllm.training.checkpoints import newest
from mllm.training.log import MetricsLog, keep_config, peak_memory_gb, write_curves
from mllm.training.plan import print_plan
from mllm.training.prepare import (
    PROJECTOR,
    Prepared,
    _collator,
    _start_from_captions,
    check_aligned,
    deepspeed_config,
    longest,
    prepare,
    projector_of,
    zero_stage,
)
from mllm.training.stages import assert_plan, count_parameters, learning_rates
from mllm.training.trainer import Indexed, IndexedCollator, LlavaTrainer, StopCallback, TrainingModel, is_interactive


def run_stage(arguments: TrainArguments) -> None:
    """Train one stage, from its newest checkpoint if there is one; a finished stage is left as it is.

    Raises the errors of clips/common/errors.py; on every rank alike where they do not depend on the rank.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    arguments = arguments.resolve(world_size)
    stage, run_dir = arguments.description, Path(arguments.output_dir)
    device = choose_device(arguments.device)
    deepspeed = deepspeed_config(arguments, world_size)
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # read by deepspeed, which accelerate imports
    if world_size > 1 or deepspeed:
        init_distributed(device)  # before TrainingArguments: they would choose another backend
    is_main = not dist.is_initialized() or dist.get_rank() == 0
    console = Console(stderr=True, quiet=not is_main)
    begin = time.perf_counter()
    prepared = prepare(arguments, run_dir, device, deepspeed)
    print_plan(
        arguments, prepared.model, prepared.plan, prepared.facts, samples=len(prepared.dataset),
        length=longest(prepared.dataset), zero=zero_stage(deepspeed), world_size=world_size, console=console,
    )  # fmt: skip
    if not arguments.dry_run:
        record = {"trains": arguments.what_trains() | {"vision_fingerprint": prepared.vision.fingerprint}}
        record |= {"facts": prepared.facts, "freeze": prepared.plan, "projector_of": projector_of(arguments, prepared)}
        if stage.number == 2 and arguments.pretrain_mm_mlp_adapter is None:
            check_aligned(run_dir, record["projector_of"])
        keep_config(run_dir, stage.name, record, write=is_main)
        if (run_dir / stage.name / "done.json").is_file():
            console.print(f"stage {stage.number} ({stage.name}) is finished already: {run_dir / stage.name}")
        else:
            if is_main:
                write_json(run_dir / "env.json", environment(device, world_size))
            _train(arguments, prepared, deepspeed, device, console, is_main, begin)
        _print_next(stage.number, run_dir, console)
    shutdown()


# ---------------------------------------------------------------------------------------------- training
def _train(
    arguments: TrainArguments,
    prepared: Prepared,
    deepspeed: dict[str, Any] | None,
    device: torch.device,
    console: Console,
    is_main: bool,
    begin: float,
) -> None:
    stage, run_dir = arguments.description, Path(arguments.output_dir)
    stage_dir = run_dir / stage.name
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    collator = _collator(arguments, prepared, device)
    assert_plan(prepared.model, prepared.plan)
    log = MetricsLog(run_dir, stage.name, arguments.batch_size, active=is_main)
    stop = StopCallback()
    trainer = LlavaTrainer(
        TrainingModel(prepared.model, features=arguments.caches_features),
        training_arguments(arguments, stage_dir, device, deepspeed),
        rates=learning_rates(arguments.learning_rate, arguments.mm_projector_lr, arguments.mm_vision_tower_lr),
        sampler=EpochSampler(
            prepared.dataset.modality_lengths,
            batch_size=arguments.per_device_train_batch_size,
            chunks=world_size * arguments.gradient_accumulation_steps,
            seed=arguments.seed,
            group_by_modality_length=bool(arguments.group_by_modality_length),
        ),
        data_collator=IndexedCollator(collator),
        train_dataset=Indexed(prepared.dataset),
        keep=arguments.save_total_limit,
        callbacks=[log, stop],
    )
    checkpoint = newest(stage_dir)
    if checkpoint is not None:
        console.print(f"goes on from {checkpoint}")
    elif arguments.mm_projector_init == "captions" and arguments.pretrain_mm_mlp_adapter is None:
        r2 = _start_from_captions(arguments, prepared, collator, device)
        console.print(f"projector started from the captions (R² {r2:.2f})", highlight=False)
    prepared_s, start = time.perf_counter() - begin, time.perf_counter()
    first_step = int(checkpoint.name.partition("-")[2]) if checkpoint else 0
    with naming_lost_ranks(lambda: trainer.state.global_step + 1):
        result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds = time.perf_counter() - start
    if stop.stopped:
        raise Stopped(f"stopped by signal {stop.stopped}; a checkpoint was saved", exit_code=128 + stop.stopped)
    if world_size > 1:
        dist.all_reduce(trainer.tokens_seen)
    samples = (result.global_step - first_step) * arguments.batch_size
    summary = {
        "stage": stage.name,
        "steps": result.global_step,
        "samples": result.global_step * arguments.batch_size,
        "train_seconds": round(seconds, 1),
        "prepare_seconds": round(prepared_s, 1),
        "samples_per_s": round(samples / seconds, 2),
        "tokens_per_s": round(int(trainer.tokens_seen) / seconds, 1),
        "peak_memory_gb": round(peak_memory_gb(device), 2),
        "truncated_samples": prepared.dataset.truncated,
        "trained_parameters": {part: trained for part, (_, trained) in count_parameters(prepared.model).items()},
    }
    with whole(prepared.model, zero_stage(deepspeed)):
        if is_main:
            _write_results(arguments, prepared, stage_dir, summary, cast=not deepspeed)
    if dist.is_initialized():
        dist.barrier()
    console.print(
        f"stage {stage.number} ({stage.name}): {summary['samples_per_s']:.1f} samples/s, "
        f"{summary['tokens_per_s']:,.0f} tokens/s, peak memory {summary['peak_memory_gb']:.2f} GB, "
        f"{seconds:.0f} s of training after {prepared_s:.0f} s of preparation"
    )


def training_arguments(
    arguments: TrainArguments, stage_dir: Path, device: torch.device, deepspeed: dict[str, Any] | None
) -> TrainingArguments:
    """The Trainer's own arguments; all that this project decides itself is switched off in them."""
    made = TrainingArguments(
        output_dir=str(stage_dir),
        per_device_train_batch_size=arguments.per_device_train_batch_size,
        gradient_accumulation_steps=arguments.gradient_accumulation_steps,
        learning_rate=arguments.learning_rate,
        weight_decay=arguments.weight_decay,
        warmup_steps=arguments.warmup_ratio,  # below one: a share of the steps
        lr_scheduler_type=arguments.lr_scheduler_type,
        max_grad_norm=arguments.max_grad_norm,
        num_train_epochs=arguments.num_train_epochs,
        max_steps=arguments.max_steps,
        seed=arguments.seed,
        bf16=bool(arguments.bf16),
        deepspeed=deepspeed,
        use_cpu=device.type == "cpu",
        logging_steps=arguments.logging_steps,
        logging_nan_inf_filter=False,
        log_level="error",
        save_strategy="steps",
        save_steps=arguments.save_steps,
        report_to=arguments.report_to,
        disable_tqdm=not is_interactive(),
        dataloader_num_workers=arguments.dataloader_num_workers,
        dataloader_pin_memory=device.type == "cuda",
        remove_unused_columns=False,
        ddp_backend=dist.get_backend() if dist.is_initialized() else None,
        # The encoder's layers behind the chosen one get no gradient.
        ddp_find_unused_parameters=arguments.unfreeze_mm_vision_tower,
    )
    if device.type == "cuda" and not dist.is_initialized():
        made._n_gpu = 1  # one process is one GPU; the Trainer would take all it sees, with DataParallel
    return made


@contextmanager
def whole(model: nn.Module, zero: int) -> Iterator[None]:
    """Inside, every parameter is whole on every rank (ZeRO-3 gathers them). Collective."""
    if zero < 3:
        yield
        return
    with import_deepspeed().zero.GatheredParameters(list(model.parameters())):
        yield


def _write_results(
    arguments: TrainArguments, prepared: Prepared, stage_dir: Path, summary: dict[str, Any], *, cast: bool
) -> None:
    """The projector always; after stage 2 adapter and model; at last done.json, which makes the stage count."""
    model, run_dir = prepared.model, stage_dir.parent
    llava = model.get_base_model() if isinstance(model, PeftModel) else model
    save_projector(llava.model.multi_modal_projector, stage_dir / PROJECTOR)
    write_curves(run_dir)
    if arguments.stage == 2:
        dtype = llava.lm_head.weight.dtype
        quantized = arguments.bits < 16
        if isinstance(model, PeftModel):
            model.save_pretrained(run_dir / "adapter")
            save_projector(llava.model.multi_modal_projector, run_dir / "adapter" / "non_lora_trainables.bin")
            model = merge_quantized_lora(model, dtype) if quantized else merge_lora(model)
        elif quantized:
            model = dequantize(model, dtype)
        # Parts may differ in precision while they train; a stock model has one.
        save_model(
            model.to(dtype) if cast else model, prepared.processor, run_dir / "model", card=card(run_dir, summary)
        )
    write_json(stage_dir / "done.json", summary)
    for checkpoint in stage_dir.glob("checkpoint-*"):
        shutil.rmtree(checkpoint, ignore_errors=True)


def card(run_dir: Path, summary: dict[str, Any]) -> dict[str, str]:
    """What the model card says: what was trained on what, in both stages."""
    config, rows = read_json(run_dir / "config.json"), {}
    for stage in ("align", "instruct"):
        record = config.get(stage)
        if record is None:
            continue
        trains = record["trains"]
        rows |= {name.capitalize(): record["facts"][name] for name in ("vision encoder", "language model")}
        rows[f"Stage {stage}: data"] = record["facts"]["data"]
        rows[f"Stage {stage}: trains"] = ", ".join(f"{part} {how}" for part, how in record["freeze"].items())
        done = summary if stage == summary["stage"] else read_json(run_dir / stage / "done.json")
        projector_rate = trains["mm_projector_lr"] or trains["learning_rate"]
        rows[f"Stage {stage}: rates"] = (
            f"learning rate {trains['learning_rate']:g}, projector {projector_rate:g}, "
            f"batch {trains['batch_size']}, {done.get('samples', '?')} samples, seed {trains['seed']}"
        )
    return rows


def _print_next(stage: int, run_dir: Path, console: Console) -> None:
    if stage == 1:
        console.print(f"{run_dir}/align/{PROJECTOR} holds the projector. Next: stage 2 (--stage 2)", highlight=False)
    else:
        console.print(
            f"{run_dir}/model is the finished model, {run_dir}/curves.png its losses. "
            f"Next:\n  python scripts/evaluate_llava.py --model-path {run_dir}/model\n  python scripts/chat.py",
            highlight=False,
        )
