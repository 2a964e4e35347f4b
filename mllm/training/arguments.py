"""The flags of scripts/train_llava.sh, which have LLaVA's own names, and their defaults."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
from dataclasses import dataclass
from typing import Any, Literal

from clips.common.errors import UserError
from clips.common.flags import Parser, add_options, check_fields, from_flags, option
from clips.common.trackers import HELP as REPORT_TO
from clips.common.trackers import loggers
from mllm import DEFAULT_LLM
from mllm.training.stages import DEFAULTS, DEMO_LAYERS, STAGES, Stage

HELP = (
    "Train a LLaVA-style model in two stages. Any flag may be given for one stage only: --align.FLAG, --instruct.FLAG."
)


def flag(default: Any, text: str, *aliases: str, **bounds: float) -> Any:
    """Declare a flag that keeps its underscores; a * at the end of `text` means "the default depends on the stage".

    `bounds` are as in `clips.common.flags.bounded`.
    """
    shown = text.removesuffix("*") + (" (default: the stage's)" if text.endswith("*") else "")
    return option(default, shown, *aliases, underscores=True, bounds=bounds)


def usual(name: str, text: str, **bounds: float) -> Any:
    """Declare a flag with one default for both stages, which `resolve` fills in."""
    return flag(None, f"{text} (default: {DEFAULTS['both'][name]})", **bounds)


@dataclass(frozen=True, kw_only=True)
class TrainArguments:
    """One stage's flags. A field whose default depends on stage, data or machine is None until `resolve`."""

    stage: int = flag(0, "1 aligns the projector, 2 tunes on instructions (default: both, one after the other)")
    vision_tower: str = flag(
        "clips",
        "encoder: clips, clip, random, blind, open_clip:…, hf:… (or owner/name alone), timm:…",
        "--vision",
    )
    model_name_or_path: str = flag(DEFAULT_LLM, "language model: hub id or directory")
    llm_layers: str | None = flag(
        None,
        "first and last layers that are kept, such as 8,2; a shorter model stays whole (default: all; the demo: 6,2)",
    )
    reader: str = flag(
        None,
        "adapter that has taught these layers to find words again: default, none, or a folder (default: default for "
        "the demo and --small, else none)",
    )
    output_dir: str = flag(None, "run directory (default: runs/llava-ENCODER)")
    data_path: str | None = flag(None, "LLaVA JSON or JSONL, or captions as in pretraining (default: the demo data)")
    image_folder: str | None = flag(None, "folder or uncompressed tar of the images")
    fields: tuple[str, ...] | None = flag(None, "captions: as in pretraining (default: the encoder's, or guessed)")
    karpathy: str | None = flag(None, "captions of COCO or Flickr with the splits of A. Karpathy's JSON file")
    test_data: str | None = flag(None, "captions to measure a model of captions on (default: a share held out)")
    held_out: float = flag(
        0.05, "captions: share of the images to hold out of training, at most 1,000", at_least=0, below=1
    )
    small: bool = flag(False, "the demo's rates, batches, steps and layers for other data: minutes on a CPU")
    on_bad_sample: Literal["error", "skip"] = flag(
        "error", "samples that cannot be trained on: refuse the set, or skip them and list them in skipped.jsonl"
    )
    version: str = flag(None, "conversation format: plain, v1, llama_3, chatml, auto, or LLaVA's other names*")
    pretrain_mm_mlp_adapter: str | None = flag(None, "projector to start from (default: in stage 2 that of stage 1)")
    mm_projector_type: Literal["mlp2x_gelu", "linear"] = usual("mm_projector_type", "projector")
    mm_projector_init: Literal["random", "captions"] | None = flag(
        None, "start of stage 1: random, or captions: closed form, image tokens regressed on the words of the captions*"
    )
    mm_vision_select_layer: int = usual("mm_vision_select_layer", "hidden state of the encoder that the projector sees")
    mm_vision_select_feature: Literal["patch", "cls_patch"] = flag("patch", "without or with the CLS token")
    image_aspect_ratio: Literal["square", "pad", "anyres"] = flag(
        None, "square: the encoder's own way; pad: LLaVA's; anyres: LLaVA-NeXT's tiles beside the whole image*"
    )
    image_grid_pinpoints: str | None = flag(
        None,
        "canvases of anyres: pairs (width, height) of pixels, or squares as (1x1),...,(2x2) (default: LLaVA-NeXT's, of "
        "2 to 4 squares)",
    )
    mm_patch_merge_type: Literal["flat", "spatial_unpad"] | None = flag(
        None, "order of an image's tokens (default: spatial_unpad for anyres, else flat)"
    )
    frames_upbound: int = flag(
        0,
        "frames per video, evenly spaced; needs anyres, the model is then LLaVA-OneVision's (default: no videos)",
        at_least=0,
    )
    group_by_modality_length: bool = flag(None, "batches of one modality and similar lengths (default: in stage 2)")
    model_max_length: int = usual("model_max_length", "longest sample in tokens", at_least=1)

    unfreeze_mm_vision_tower: bool = flag(False, "train the encoder too")
    tune_mm_mlp_adapter: bool = flag(False, "train the projector only")
    freeze_mm_mlp_adapter: bool = flag(False, "keep the projector as it is")
    freeze_backbone: bool = flag(False, "keep the language model as it is")
    lora_enable: bool = flag(None, "LoRA on the language model's linear layers in stage 2*")
    lora_r: int = usual("lora_r", "rank of the adapters", at_least=1)
    lora_alpha: int = usual("lora_alpha", "scale × rank", at_least=1)
    lora_dropout: float = usual("lora_dropout", "dropout before the adapters", at_least=0, below=1)
    bits: Literal[4, 8, 16] = flag(16, "4 or 8: quantised language model (bitsandbytes) with LoRA")

    learning_rate: float = flag(None, "peak learning rate*", at_least=0)
    mm_projector_lr: float | None = flag(
        None, "peak learning rate of the projector (default: --learning_rate)", at_least=0
    )
    mm_vision_tower_lr: float | None = flag(
        None, "peak learning rate of the encoder (default: --learning_rate)", at_least=0
    )
    weight_decay: float = flag(0.0, "AdamW's weight decay", at_least=0)
    warmup_ratio: float = usual("warmup_ratio", "share of the steps that warm up", at_least=0, at_most=1)
    warmup_steps: int | None = flag(
        None, "steps that warm up, instead of a share (default: from --warmup_ratio)", at_least=0
    )
    lr_scheduler_type: str = usual("lr_scheduler_type", "schedule of transformers: linear, cosine, constant, …")
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm", at_least=0)
    num_train_epochs: float = usual("num_train_epochs", "passes over the data", above=0)
    max_steps: int = flag(None, "optimizer steps, instead of epochs (default: -1, epochs count)", at_least=-1)
    batch_size: int = flag(None, "samples of one optimizer step over all ranks*", at_least=1)
    per_device_train_batch_size: int = flag(None, "samples of one forward pass (default: 16)", at_least=1)
    gradient_accumulation_steps: int = flag(None, "forward passes of one step (default: from --batch_size)", at_least=1)
    seed: int = flag(0, "seed of the projector, the adapters and the order", at_least=0)

    bf16: bool = flag(None, "bf16 arithmetic (default: if the device has it)")
    gradient_checkpointing: bool = flag(None, "recompute activations in the backward pass (default: on GPUs)")
    deepspeed: str | None = flag(None, "DeepSpeed config, or none (default: for several ranks, ds_configs/llava_zero*)")
    device: Literal["auto", "cpu", "cuda"] = flag("auto", "where to train")
    feature_cache: bool = flag(True, "compute the features of a frozen encoder once")
    cache_dir: str | None = flag(None, "folder of the cached features (default: ~/.cache/clips-mllm/features)")
    dataloader_num_workers: int = flag(
        None, "data processes (default: 4 if images are decoded for a GPU, else 0)", at_least=0
    )
    logging_steps: int = flag(10, "steps between two lines of metrics.jsonl", at_least=1)
    save_steps: int = flag(200, "steps between two checkpoints", at_least=0)
    save_total_limit: int = flag(2, "checkpoints that are kept", at_least=0)
    report_to: str = flag("none", REPORT_TO)
    run_name: str | None = flag(None, "the run's name in these loggers (default: RUN/STAGE)")
    profile: int = flag(0, "optimizer steps that torch's profiler records into STAGE/profile", at_least=0)
    dry_run: bool = option(False, "print the command and the plan, train nothing")

    def __post_init__(self) -> None:
        check_fields(self, "--")

    def resolve(self, world_size: int) -> TrainArguments:
        """Return the flags with every default filled in. Raises UserError for values that contradict each other."""
        import torch  # not at the top: --help is answered without it

        from clips.common.runtime import has_bf16
        from mllm.data.captions import is_captions

        loggers(self.report_to)
        adapters = self.lora_enable or self.bits < 16
        values = dict(vars(self))
        defaults = self.description.defaults(
            lora=adapters, demo=self.data_path is None or self.small,
            full=not adapters and self.model_name_or_path == DEFAULT_LLM,
        )  # fmt: skip
        if self.num_train_epochs is not None:
            defaults["max_steps"] = -1  # epochs from the command override the demo's steps
        for name, default in defaults.items():
            if values[name] is None:
                values[name] = default

        if self.reader is None and values["llm_layers"] != DEMO_LAYERS:
            values["reader"] = "none"
        if self.data_path is None or self.test_data or not is_captions(self.data_path):
            values["held_out"] = None
        if values["output_dir"] is None:
            values["output_dir"] = default_output_dir(self.vision_tower)
        if values["lora_enable"] is None:
            values["lora_enable"] = self.bits < 16
        if self.stage == 2:  # it starts from stage 1's projector
            values["mm_projector_init"] = None

        on_gpu = self.device != "cpu" and torch.cuda.is_available()
        if values["bf16"] is None:
            values["bf16"] = has_bf16(torch.device("cuda" if on_gpu else "cpu"))
        if values["gradient_checkpointing"] is None:
            values["gradient_checkpointing"] = on_gpu
        if values["dataloader_num_workers"] is None:
            values["dataloader_num_workers"] = 4 if on_gpu and not self.caches_features else 0

        tiles = values["image_aspect_ratio"] == "anyres"
        if self.mm_patch_merge_type not in (None, "spatial_unpad" if tiles else "flat"):
            raise UserError("--mm_patch_merge_type: anyres is spatial_unpad, the other --image_aspect_ratio are flat")
        if self.image_grid_pinpoints is not None and not tiles:
            raise UserError("--image_grid_pinpoints are the canvases of --image_aspect_ratio anyres: give that too")
        values["mm_patch_merge_type"] = None  # it follows from the aspect
        values.update(self._batches(world_size, values["batch_size"], values["per_device_train_batch_size"]))
        return TrainArguments(**values)

    def _batches(self, world_size: int, total: int, micro: int | None) -> dict[str, int]:
        """Return sizes with `batch_size` = ranks × `gradient_accumulation_steps` × `per_device_train_batch_size`.

        `total` and `micro` are the sizes of a step and of a forward pass: those of the command, else the stage's.
        """
        accumulation = self.gradient_accumulation_steps
        if self.batch_size is None and accumulation is not None:
            total = (micro or 16) * world_size * accumulation
        if self.per_device_train_batch_size is None:
            share = total // (world_size * (accumulation or 1))
            micro = max(1, share if accumulation else min(micro or 16, share))
        assert micro is not None
        steps = total // (micro * world_size)
        if steps == 0 or steps * micro * world_size != total or steps != (accumulation or steps):
            raise UserError(
                f"--batch_size {total} is not {world_size} rank(s) × --per_device_train_batch_size {micro} × "
                f"--gradient_accumulation_steps {accumulation or 'of a whole number'}: change one of them"
            )
        return {"batch_size": total, "per_device_train_batch_size": micro, "gradient_accumulation_steps": steps}

    @property
    def description(self) -> Stage:
        """The stage that these flags describe."""
        return STAGES[self.stage]

    @property
    def rates(self) -> dict[str, float]:
        """The peak learning rate of each part."""
        overrides = {"vision_tower": self.mm_vision_tower_lr, "projector": self.mm_projector_lr, "language_model": None}
        return {part: self.learning_rate if rate is None else rate for part, rate in overrides.items()}

    @property
    def caches_features(self) -> bool:
        """True if the features of the frozen encoder are computed once."""
        return self.feature_cache and not self.unfreeze_mm_vision_tower

    def what_trains(self) -> dict[str, Any]:
        """Return the fields that change the result; a resumed run must have the same values."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in NOT_RESULT}


def default_output_dir(vision_tower: str) -> str:
    """Return the run directory of a command without --output_dir; a bare owner/name or directory is of kind hf."""
    kind, colon, _ = vision_tower.partition(":")
    return os.path.join("runs", f"llava-{'hf' if not colon and '/' in kind else kind}")


NOT_RESULT = {
    *("output_dir", "dry_run", "device", "deepspeed", "feature_cache", "cache_dir", "dataloader_num_workers"),
    *("logging_steps", "save_steps", "save_total_limit", "report_to", "profile", "gradient_checkpointing"),
    *("on_bad_sample", "run_name", "small"),  # a run that began with either value goes on with the other
    *("per_device_train_batch_size", "gradient_accumulation_steps"),  # batch_size stays
}
ACCEPTED: dict[str, str | None] = {
    **dict.fromkeys(("mpt_attn_impl", "tf32", "per_device_eval_batch_size", "model_type")),
    "mm_use_im_start_end": "False",
    "mm_use_im_patch_token": "False",
    "remove_unused_columns": "False",
    "lazy_preprocess": "True",
    "is_multimodal": "True",
    "evaluation_strategy": "no",
    "eval_strategy": "no",
    "save_strategy": "steps",
    "fp16": "False",
    "optim": "adamw_torch",
    "lora_bias": "none",
    "lora_weight_path": "",
    "quant_type": "nf4",
    "double_quant": "True",
}
"""Flags of LLaVA's scripts → the only value that they can have here, as another would silently train something else.
None: any value, without effect."""
STAGE_FLAGS = {
    1: ("mm_projector_init",),
    2: ("lora_enable", "lora_r", "lora_alpha", "lora_dropout", "freeze_mm_mlp_adapter", "mm_vision_tower_lr"),
}
"""Stage → the flags that only this stage has."""


def parser() -> argparse.ArgumentParser:
    """Return a parser with one flag per field of `TrainArguments`, and LLaVA's flags that have only one value here."""
    # Not transformers.HfArgumentParser: importing it takes a second that --help and a mistyped flag would wait.
    p = Parser(HELP, prog="train_llava.sh", usage="%(prog)s [--vision NAME] [--stage 1|2] [flags]")
    add_options(p, TrainArguments)
    p.add_argument("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    p.add_argument("--both_stages", action="store_true", help=argparse.SUPPRESS)  # train_llava.sh adds it
    for name in ACCEPTED:
        p.add_argument(f"--{name}", help=argparse.SUPPRESS)
    return p


def parse_train_arguments(argv: list[str]) -> TrainArguments:
    """Parse the flags of one stage; `--align.FLAG` and `--instruct.FLAG` count in that stage only.

    train_llava.sh and compare_encoders.py give both stages one command line, with `--both_stages`. Each stage then
    ignores the other's flags, and the other's `--version` (plain is stage 1's, every other format is stage 2's).
    Raises UserError for a flag of the other stage otherwise, and for a LLaVA flag whose value is not supported.
    """
    argv = [part for word in argv for part in (word.split("=", 1) if word.startswith("--") else [word])]
    stage = _stage_of(argv)
    flags = parser().parse_args(flags_of_stage(argv, stage.name))
    for name, only in ACCEPTED.items():
        value = getattr(flags, name)
        if value is not None and only is not None and value.lower() != only.lower():
            raise UserError(f"--{name} {value} is not supported; here it is always {only or 'empty'}")
    if flags.karpathy:
        if flags.data_path or flags.test_data:
            raise UserError("--karpathy names training and test data: leave out --data_path and --test_data")
        file, flags.karpathy = flags.karpathy, None
        flags.data_path, flags.test_data = f"{file}#train+restval", f"{file}#test"
    prefixed = {word.partition(".")[2].replace("-", "_") for word in argv if word.startswith(f"--{stage.name}.")}
    other = 3 - stage.number
    if flags.both_stages and flags.data_path and "data_path" not in prefixed:
        from mllm.data.captions import is_captions  # not at the top: it imports torch

        if not is_captions(flags.data_path):
            raise UserError(
                "both stages on one --data_path of conversations would be wrong (captions, then conversations): name "
                "the stage with --stage 1 or 2, or give --align.data_path and --instruct.data_path"
            )
    for name in STAGE_FLAGS[other]:
        if getattr(flags, name) not in (None, False) and (not flags.both_stages or name in prefixed):
            raise UserError(
                f"--{name} is a flag of stage {other} ({STAGES[other].name}), and this is stage {stage.number} "
                f"({stage.name}): leave it out, or give --stage {other}"
            )
    if flags.version is not None and (flags.version == "plain") != (stage.name == "align"):
        if not flags.both_stages or "version" in prefixed:
            raise UserError(
                f"--version {flags.version} in stage {stage.number} ({stage.name}): plain is the format of stage 1 "
                "and only of stage 1; leave the flag out, or give the other --stage"
            )
        flags.version = None
    return from_flags(TrainArguments, flags)


def _stage_of(argv: list[str]) -> Stage:
    if {"-h", "--help"} & set(argv):
        parser().parse_args(["--help"])
    numbers = [number for word, number in itertools.pairwise(argv) if word == "--stage"]
    if numbers[-1:] not in (["1"], ["2"]):
        raise UserError(
            "give --stage 1 (align: captions, trains the projector) or --stage 2 (instruct: conversations); "
            "scripts/train_llava.sh runs both"
        )
    return STAGES[int(numbers[-1])]


def flags_of_stage(argv: list[str], stage: str) -> list[str]:
    """Return `argv` without the flags of the other stage, and with those of this stage last, without their prefix."""
    parts: dict[str, list[str]] = {name: [] for name in ("", *(s.name for s in STAGES.values()))}
    part = ""  # the flags without a prefix
    for word in argv:
        if word.startswith("--"):
            prefix, dot, rest = word[2:].partition(".")
            part = prefix if dot and prefix in parts else ""
            word = f"--{rest}" if part else word
        parts[part].append(word)
    return parts[""] + parts[stage]
