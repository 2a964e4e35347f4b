"""One stage of a LLaVA-style model, from its flags to what it leaves in runs/NAME.

runs/NAME/config.json env.json metrics.jsonl curves.png
runs/NAME/align/      checkpoint-N/ while it runs, then mm_projector.bin and done.json
runs/NAME/instruct/   the same
runs/NAME/model/      the stock transformers model (adapters merged), mm_projector.bin beside it
runs/NAME/adapter/    with LoRA: PEFT's adapter and LLaVA's non_lora_trainables.bin
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from torch import nn
from transformers import LlavaProcessor, TrainingArguments

from clips.checkpoint import write_atomically
from clips.engine import choose_device, init_distributed, shutdown
from clips.errors import Stopped, UserError
from clips.ranks import naming_lost_ranks
from mllm.arguments import TrainArguments
from mllm.checkpoints import newest
from mllm.conversation import IGNORE, ConversationEncoder
from mllm.data import Collator, EpochSampler, ImageStore, LlavaDataset, pixel_loader
from mllm.demo import ALIGN, IMAGES, INSTRUCT, ensure_llava_demo
from mllm.features import FeatureCache, image_pixels
from mllm.hub import cache_root
from mllm.llm import load_llm
from mllm.model import build_model, merge_lora, save_model
from mllm.plan import print_plan
from mllm.projector import load_projector, save_projector, start_from_captions
from mllm.quantize import dequantize, merge_quantized_lora, quantize
from mllm.run_log import MetricsLog, environment, keep_config, peak_memory_gb, read_json, write_curves
from mllm.stages import Training, apply_plan, assert_plan, count_parameters, freeze_plan, learning_rates
from mllm.trainer import Indexed, IndexedCollator, LlavaTrainer, StopCallback, TrainingModel, is_interactive
from mllm.vision import VisionEncoder, load_vision

DEMO_DIR = Path("data/llava_demo")
PROJECTOR = "mm_projector.bin"
SHORT = 512
"""Up to this many tokens torch's fused attention is slower on CPUs in bf16 than plain products: a step of SmolLM2-135M
on 32 samples of 40 tokens took 3.1 s of one core with it and 2.1 s without."""
START_IMAGES, START_TOKENS, START_BATCH = 8_192, 16, 64
"""A closed-form start takes this many images, and this many tokens of each; read in batches of START_BATCH."""
DS_CONFIGS = Path(__file__).resolve().parent.parent / "ds_configs"


@dataclass(kw_only=True)
class Prepared:
    """Everything a stage needs before its first step."""

    model: nn.Module
    """`LlavaForConditionalGeneration`, or that inside a `PeftModel`."""
    processor: LlavaProcessor
    vision: VisionEncoder
    dataset: LlavaDataset
    store: ImageStore | None
    plan: dict[str, Training]
    facts: dict[str, str]
    """For the plan and the model card."""


def run_stage(arguments: TrainArguments) -> None:
    """Train one stage, from its newest checkpoint if there is one; a finished stage is left as it is.

    Raises the errors of clips/errors.py; on every rank alike where they do not depend on the rank.
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
                write_atomically(run_dir / "env.json", json.dumps(environment(device, world_size), indent=2) + "\n")
            _train(arguments, prepared, deepspeed, device, console, is_main, begin)
        _print_next(stage.number, run_dir, console)
    shutdown()


# ---------------------------------------------------------------------------------------------- before the first step


def prepare(
    arguments: TrainArguments, run_dir: Path, device: torch.device, deepspeed: dict[str, Any] | None
) -> Prepared:
    """Load and assemble encoder, language model, data and the freeze plan; the same on every rank.

    The model is whole on every rank here, on the CPU; ZeRO-3 takes it apart when the engine is made.
    """
    stage = arguments.description
    plan = freeze_plan(
        stage, lora=bool(arguments.lora_enable), bits=arguments.bits,
        unfreeze_mm_vision_tower=arguments.unfreeze_mm_vision_tower, tune_mm_mlp_adapter=arguments.tune_mm_mlp_adapter,
        freeze_mm_mlp_adapter=arguments.freeze_mm_mlp_adapter, freeze_backbone=arguments.freeze_backbone,
    )  # fmt: skip
    data_path, image_folder = data_of(arguments)
    store = ImageStore(image_folder) if image_folder else None
    vision = encoder_of(arguments)
    # fp32 wherever a weight trains outside of DeepSpeed: an update of 2e-5 is lost in bf16.
    half = arguments.bf16 and device.type == "cuda" and (bool(deepspeed) or plan["language_model"] != "full")
    llm = load_llm(
        arguments.model_name_or_path,
        version=arguments.version,
        dtype=torch.bfloat16 if half else torch.float32,
    )
    model, processor = build_model(vision, llm, projector=arguments.mm_projector_type, seed=arguments.seed)
    max_length = min(arguments.model_max_length, llm.context_length or arguments.model_max_length)
    if vision.num_tokens >= max_length:
        raise UserError(
            f"one image takes {vision.num_tokens} tokens ({vision.name}), but --model_max_length is {max_length}: "
            "raise it, or choose an encoder with a smaller image or larger patches"
        )
    encoder = ConversationEncoder(llm.tokenizer, arguments.version, vision.num_tokens, max_length)
    dataset = LlavaDataset(data_path, encoder, store)
    projector = model.model.multi_modal_projector
    start = _projector_start(arguments, run_dir)
    if start is not None:
        load_projector(projector, start)
        started = f"from {start}"
    elif arguments.stage == 2:  # a dry run
        started = "from stage 1"
    else:
        fitted = f"fitted in closed form to the captions of {min(len(dataset), START_IMAGES):,} samples"
        started = fitted if arguments.mm_projector_init == "captions" else "random"
        started += f", seed {arguments.seed}"
    projector.float() if not deepspeed else projector.to(llm.model.dtype)
    if arguments.bits < 16:
        compute_dtype = torch.bfloat16 if arguments.bf16 else torch.float32
        quantize(model.model.language_model, arguments.bits, compute_dtype, device)
    if device.type == "cpu" and arguments.bf16 and longest(dataset) <= SHORT:
        model.model.language_model.set_attn_implementation("eager")
    if arguments.gradient_checkpointing:
        model.model.language_model.activation_checkpointing_enable({"use_reentrant": False})
    if plan["language_model"] == "lora":
        torch.manual_seed(arguments.seed)
        model = get_peft_model(model, lora_config(model, arguments))
    apply_plan(model, plan)
    facts = {
        "vision encoder": vision.describe(),
        "language model": llm.source,
        "projector": f"{arguments.mm_projector_type}, {started}",
        "data": f"{data_path}: {len(dataset):,} samples, format {arguments.version}",
        "features": "computed once and cached" if arguments.caches_features else "computed in every step",
    }
    return Prepared(
        model=model, processor=processor, vision=vision, dataset=dataset, store=store, plan=plan, facts=facts
    )


def encoder_of(arguments: TrainArguments) -> VisionEncoder:
    """The vision encoder that resolved flags ask for."""
    return load_vision(
        arguments.vision_tower,
        select_layer=arguments.mm_vision_select_layer,
        select_feature="default" if arguments.mm_vision_select_feature == "patch" else "full",
        image_aspect_ratio=arguments.image_aspect_ratio,
        seed=arguments.seed,
    )


def data_of(arguments: TrainArguments) -> tuple[Path, Path | None]:
    """Data file and image folder: the user's, or the demo's for this stage (built where it is missing)."""
    if arguments.data_path is not None:
        return Path(arguments.data_path), Path(arguments.image_folder) if arguments.image_folder else None
    if arguments.image_folder is not None:
        raise UserError("--image_folder is given without --data_path")
    demo = ensure_llava_demo(DEMO_DIR)
    return demo / (ALIGN if arguments.stage == 1 else INSTRUCT), demo / IMAGES


def _projector_start(arguments: TrainArguments, run_dir: Path) -> Path | None:
    """The file that the projector starts from; None for a random start."""
    if arguments.pretrain_mm_mlp_adapter is not None:
        return Path(arguments.pretrain_mm_mlp_adapter)
    if arguments.stage == 1:
        return None
    aligned = run_dir / "align" / PROJECTOR
    if aligned.is_file():
        return aligned
    if arguments.dry_run:
        return None
    raise UserError(
        f"stage 2 starts from the projector of stage 1, but there is no {aligned}: run stage 1 first, or give "
        "--pretrain_mm_mlp_adapter"
    )


def projector_of(arguments: TrainArguments, prepared: Prepared) -> dict[str, Any]:
    """What a projector stands between: it is of no use between others."""
    fields = ("model_name_or_path", "mm_projector_type", "mm_vision_select_layer", "mm_vision_select_feature")
    found = {name: getattr(arguments, name) for name in fields}
    return found | {"vision tower's weights": prepared.vision.weights_fingerprint}


def check_aligned(run_dir: Path, wanted: dict[str, Any]) -> None:
    """UserError unless stage 1 of this run trained its projector between the same encoder and language model."""
    there = read_json(run_dir / "config.json").get("align", {}).get("projector_of", wanted)
    differ = [name for name in wanted if there.get(name) != wanted[name]]
    changes = [f"{name}: {there.get(name)} there, {wanted[name]} here" for name in differ]
    if changes:
        raise UserError(
            f"stage 1 in {run_dir} trained its projector between other parts:\n  " + "\n  ".join(changes) + "\nRun "
            "stage 1 again under another --output_dir, or name a projector with --pretrain_mm_mlp_adapter"
        )


def lora_config(model: nn.Module, arguments: TrainArguments) -> LoraConfig:
    """Adapters on every linear layer inside the language model (not on its output layer), as LLaVA."""
    layers = model.model.language_model.named_modules()
    kinds = sorted({name.rpartition(".")[2] for name, module in layers if isinstance(module, nn.Linear)})
    return LoraConfig(
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules=rf".*language_model\..*\.({'|'.join(kinds)})",
        task_type="CAUSAL_LM",
    )


def deepspeed_config(arguments: TrainArguments, world_size: int) -> dict[str, Any] | None:
    """The engine's settings: the file that was named, or this stage's own where there are several ranks.

    Raises UserError for an unreadable file, and for quantised weights under ZeRO-3, which cannot take them apart.
    """
    name = arguments.deepspeed
    if name == "none" or (name is None and world_size == 1):
        return None
    quantized = arguments.bits < 16
    path = Path(name) if name else DS_CONFIGS / f"llava_zero{2 if quantized else arguments.description.zero}.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--deepspeed {path} is not a readable JSON file: {error}") from None
    if quantized and zero_stage(config) == 3:
        raise UserError(
            f"--bits {arguments.bits} does not go with ZeRO-3: give --deepspeed ds_configs/llava_zero2.json"
        )
    return config


def zero_stage(config: dict[str, Any] | None) -> int:
    return (config or {}).get("zero_optimization", {}).get("stage", 0)


def longest(dataset: LlavaDataset) -> int:
    """Roughly the longest sample in tokens (1.4 per word), for the memory estimate."""
    length = int(1.4 * max(abs(n) for n in dataset.modality_lengths))
    return min(length, dataset.encoder.max_length or length)


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


def _collator(arguments: TrainArguments, prepared: Prepared, device: torch.device) -> Collator:
    pad_id = prepared.processor.tokenizer.pad_token_id
    if not arguments.caches_features:
        load = pixel_loader(prepared.store, partial(image_pixels, prepared.processor.image_processor))
        return Collator(pad_id, load)
    if prepared.store is None:
        return Collator(pad_id, lambda names: torch.empty(0), "image_features")
    root = Path(arguments.cache_dir) if arguments.cache_dir else cache_root() / "features"
    cache = FeatureCache(prepared.vision, prepared.store, root)
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    names = list(dict.fromkeys(name for record in prepared.dataset.records for name in record.images))
    cache.fill(names, device=device, rank=rank, world_size=world_size)
    if world_size > 1:
        dist.barrier()
        cache.refresh()
    return Collator(pad_id, cache.get, "image_features")


def _start_from_captions(
    arguments: TrainArguments, prepared: Prepared, collator: Collator, device: torch.device
) -> float:
    """`start_from_captions` on up to `START_IMAGES` samples that have one picture; the same on every rank."""
    single = [i for i, record in enumerate(prepared.dataset.records) if len(record.images) == 1]
    generator = torch.Generator().manual_seed(arguments.seed)
    chosen = [single[i] for i in torch.randperm(len(single), generator=generator)[:START_IMAGES].tolist()]
    if not chosen:
        raise UserError("--mm_projector_init captions needs samples with one picture, and the data has none")
    captions, parts, encoder = [], [], prepared.vision
    encoder.model.to(device)
    for begin in range(0, len(chosen), START_BATCH):
        samples = [prepared.dataset[i] for i in chosen[begin : begin + START_BATCH]]
        captions += [[label for label in sample["labels"] if label != IGNORE] for sample in samples]
        features = collator.load_images([sample["images"][0] for sample in samples])
        if not arguments.caches_features:  # then these are pixels
            with torch.no_grad():
                features = encoder.features(features.to(device)).cpu()
        kept = torch.randperm(features.shape[1], generator=generator)[:START_TOKENS]
        parts.append(features[:, kept])
    model = prepared.model
    projector = model.model.multi_modal_projector  # on a GPU already, or not yet: with DeepSpeed
    fitted = copy.deepcopy(projector).float().cpu()
    words = model.get_input_embeddings().weight.cpu()
    r2 = start_from_captions(fitted, torch.cat(parts), captions, words, seed=arguments.seed)
    for parameter, value in zip(projector.parameters(), fitted.parameters(), strict=True):
        value = value.data.to(device)  # NCCL takes no other
        if dist.is_initialized():
            dist.broadcast(value, src=0)
        parameter.data.copy_(value)
    return r2


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
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(model.parameters())):
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
    write_atomically(stage_dir / "done.json", json.dumps(summary, indent=2) + "\n")
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
