"""The flags of scripts/train_llava.sh, which have LLaVA's own names, and their defaults.

`parse_stages` resolves a command line once, where it was typed, into one `StageConfig` for each stage. A process that
trains a stage reads it as JSON; only `StageConfig.on` adds what the process alone knows, its kind of device.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from clips.common.distributed import find_ranks
from clips.common.errors import UserError
from clips.common.flags import Parser, add_options, check_fields, from_flags, option
from clips.engine.log import HELP as REPORT_TO
from clips.engine.log import loggers
from mllm import DEFAULT_LLM
from mllm.training.recipes import DEMO_LAYERS, PARTS, STAGE_FLAGS, STAGES, Stage, default_in_words

if TYPE_CHECKING:
    import torch

HELP = (
    "Train a LLaVA-style model in two stages. Any flag may be given for one stage only: --align.FLAG, --instruct.FLAG. "
    "--report-to is --report_to, and so is every other flag."
)


def flag(default: Any, text: str, *aliases: str, group: str = "", **bounds: float) -> Any:
    """Declare a flag that keeps its underscores. `bounds` are as in `clips.common.flags.bounded`.

    `group` is the heading in `--help` of this flag and those that follow.
    """
    return option(default, text, *aliases, underscores=True, bounds=bounds, group=group)


def staged(name: str, text: str, unset: str = "none", group: str = "", **bounds: float) -> Any:
    """Declare the flag `name`, whose default depends on the stage; `unset` says what None means."""
    return flag(None, f"{text} (default: {default_in_words(name, unset)})", group=group, **bounds)


@dataclass(frozen=True, kw_only=True)
class TrainFlags:
    """The flags of one stage as they were typed. None leaves a value to the stage, the data or the machine."""

    data_path: str | None = flag(
        None, "LLaVA JSON or JSONL, or captions as in pretraining (default: the demo data)", group="data"
    )
    image_folder: str | None = flag(None, "folder or uncompressed tar of the images")
    fields: tuple[str, ...] | None = flag(None, "captions: as in pretraining (default: the encoder's, or guessed)")
    karpathy: str | None = flag(None, "captions of COCO or Flickr with the splits of A. Karpathy's JSON file")
    test_data: str | None = flag(None, "captions for the final CIDEr-D evaluation (default: a share held out)")
    held_out: float | None = staged(
        "held_out", "captions: share of the images to hold out of training, at most 1,000", at_least=0, below=1
    )
    key: str | None = flag(None, "captions: hold out rows with equal values in this column together")
    on_bad_sample: Literal["error", "skip"] = flag(
        "error", "samples that cannot be trained on: refuse the set, or skip them and list them in skipped.jsonl"
    )
    version: str | None = staged(
        "version", "conversation format: plain, v1, llama_3, chatml, auto, or LLaVA's other names"
    )
    model_max_length: int | None = staged("model_max_length", "longest sample in tokens", at_least=1)

    vision_tower: str = flag(
        "clips", "encoder: clips, clip, random, blind, open_clip:…, hf:… (or owner/name alone), timm:…", "--vision",
        group="model",
    )  # fmt: skip
    mm_vision_select_layer: int | None = staged(
        "mm_vision_select_layer", "hidden state of the encoder that the projector sees"
    )
    mm_vision_select_feature: Literal["patch", "cls_patch"] = flag("patch", "without or with the CLS token")
    model_name_or_path: str = flag(
        DEFAULT_LLM, "language model: hub id or directory; with another one the demo and --small train LoRA adapters"
    )
    llm_layers: str | None = flag(
        None,
        "keep only the first N and the last M layers of the language model, such as 8,2; a shorter model stays whole "
        f"(default: all; the demo and --small: {DEMO_LAYERS}, but all with LoRA)",
    )
    llm_adapter: str | None = flag(
        None,
        "LoRA adapter merged into the language model before training: default (packaged, for the layers "
        f"{DEMO_LAYERS} of the default model), none, or a folder of PEFT (default: none; the demo and --small: default "
        "for these layers)",
    )

    mm_projector_type: Literal["mlp2x_gelu", "linear"] | None = staged(
        "mm_projector_type", "layers: two with GELU between them, or one", group="projector"
    )
    mm_projector_init: Literal["random", "ridge", "captions"] | None = staged(
        "mm_projector_init",
        "start of the projector: random; ridge: fitted to the captions' words by ridge regression; captions: ridge, "
        "then 300 steps on whole captions",
    )
    pretrain_mm_mlp_adapter: str | None = flag(None, "projector to start from (default: in stage 2 that of stage 1)")

    stage: int = flag(
        0, "1 aligns the projector, 2 tunes on instructions (default: both, one after the other)", group="what trains"
    )
    tune_mm_mlp_adapter: bool = flag(False, "train the projector only")
    freeze_mm_mlp_adapter: bool = flag(False, "keep the projector as it is")
    freeze_backbone: bool = flag(False, "keep the language model as it is")
    freeze_word_embeddings: bool | None = staged(
        "freeze_word_embeddings", "stage 2: keep word embeddings and output layer as they are"
    )
    unfreeze_mm_vision_tower: bool = flag(False, "train the encoder too")

    lora_enable: bool | None = flag(
        None,
        "LoRA on the language model's linear layers in stage 2 (default: no; yes with --bits, and for the demo and "
        "--small with another --model_name_or_path)",
        group="LoRA and quantisation",
    )
    lora_r: int | None = staged("lora_r", "rank of the adapters", at_least=1)
    lora_alpha: int | None = staged("lora_alpha", "updates are scaled by alpha / rank", at_least=1)
    lora_dropout: float | None = staged("lora_dropout", "dropout before the adapters", at_least=0, below=1)
    bits: Literal[4, 8, 16] = flag(16, "4 or 8: quantised language model (bitsandbytes) with LoRA")

    small: bool = flag(False, "the demo's small settings on your own data: minutes on a CPU", group="optimisation")
    learning_rate: float | None = staged("learning_rate", "peak learning rate", at_least=0)
    mm_projector_lr: float | None = staged(
        "mm_projector_lr", "peak learning rate of the projector", "--learning_rate", at_least=0
    )
    mm_vision_tower_lr: float | None = flag(
        None, "peak learning rate of the encoder (default: --learning_rate)", at_least=0
    )
    weight_decay: float = flag(0.0, "AdamW's weight decay", at_least=0)
    warmup_ratio: float | None = staged("warmup_ratio", "share of the steps that warm up", at_least=0, at_most=1)
    warmup_steps: int | None = flag(
        None, "steps that warm up, instead of a share (default: from --warmup_ratio)", at_least=0
    )
    lr_scheduler_type: str | None = staged("lr_scheduler_type", "schedule of transformers: linear, cosine, constant, …")
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm", at_least=0)
    num_train_epochs: float | None = staged("num_train_epochs", "passes over the data, unless --max_steps", above=0)
    max_steps: int | None = staged("max_steps", "optimizer steps, instead of epochs; -1: epochs count", at_least=-1)
    batch_size: int | None = staged("batch_size", "samples of one optimizer step over all ranks", at_least=1)
    per_device_train_batch_size: int | None = staged(
        "per_device_train_batch_size", "samples of one forward pass, at most those of a step", "16", at_least=1
    )
    gradient_accumulation_steps: int | None = flag(
        None, "forward passes of one step (default: from --batch_size)", at_least=1
    )
    group_by_modality_length: bool | None = staged(
        "group_by_modality_length", "batches of one modality and similar lengths"
    )
    seed: int = flag(0, "seed of the projector, the adapters and the order", at_least=0)

    image_aspect_ratio: Literal["square", "pad", "anyres"] | None = staged(
        "image_aspect_ratio",
        "square: the encoder's own way; pad: LLaVA's; anyres: LLaVA-NeXT's tiles beside the whole image",
        group="tiles and video",
    )
    image_grid_pinpoints: str | None = flag(
        None,
        "grid sizes of anyres: pairs (width, height) of pixels, or in tiles as (1x1),...,(2x2) (default: LLaVA-NeXT's, "
        "of 2 to 4 tiles)",
    )
    mm_patch_merge_type: Literal["flat", "spatial_unpad"] | None = flag(
        None, "order of an image's tokens (default: spatial_unpad for anyres, else flat)"
    )
    frames_upbound: int = flag(
        0,
        "frames per video, evenly spaced; needs anyres, the model is then LLaVA-OneVision's (default: no videos)",
        at_least=0,
    )

    output_dir: str | None = flag(None, "run directory (default: runs/llava-ENCODER)", group="run")
    device: Literal["auto", "cpu", "cuda"] = flag("auto", "where to train")
    bf16: bool | None = flag(None, "bf16 arithmetic (default: if the device has it)")
    gradient_checkpointing: bool | None = flag(None, "recompute activations in the backward pass (default: on GPUs)")
    deepspeed: str | None = flag(None, "DeepSpeed config, or none (default: for several ranks, ds_configs/llava_zero*)")
    feature_cache: bool = flag(True, "compute the features of a frozen encoder once")
    cache_dir: str | None = flag(None, "folder of the cached features (default: ~/.cache/clips-mllm/features)")
    feature_cache_gb: float | None = flag(
        None,
        "GB that this folder may take; the features used least recently are removed (default: half of the disk's room)",
        above=0,
    )
    dataloader_num_workers: int | None = flag(
        None, "data processes (default: 4 if images are decoded for a GPU, else 0)", at_least=0
    )
    logging_steps: int = flag(10, "steps between two lines of metrics.jsonl", at_least=1)
    save_steps: int = flag(200, "steps between two checkpoints; 0: only at the end", at_least=0)
    save_total_limit: int = flag(2, "checkpoints that are kept", at_least=0)
    report_to: str = flag("none", REPORT_TO)
    run_name: str | None = flag(None, "the run's name in these loggers (default: RUN/STAGE)")
    profile: int = flag(0, "optimizer steps that torch's profiler records into STAGE/profile", at_least=0)
    dry_run: bool = option(False, "print the command and the plan, train nothing")

    def __post_init__(self) -> None:
        check_fields(self, "--")

    @property
    def stage_info(self) -> Stage:
        """The stage that these flags describe."""
        return STAGES[self.stage]

    def resolve(self, ranks: int) -> StageConfig:
        """Return these flags with every default filled in that does not depend on the device, for so many `ranks`.

        Raises UserError for values that contradict each other, and for batch sizes that do not fit the ranks.
        """
        loggers(self.report_to)
        adapters = bool(self.lora_enable) or self.bits < 16
        defaults = self.stage_info.defaults(
            lora=adapters, demo=self.data_path is None or self.small,
            full=not adapters and self.model_name_or_path == DEFAULT_LLM,
        )  # fmt: skip
        values = vars(self) | self._batches(defaults, ranks)
        if self.num_train_epochs is not None:
            defaults["max_steps"] = -1  # epochs from the command override the demo's steps
        for name, default in defaults.items():
            if values[name] is None:
                values[name] = default

        if self.llm_adapter is None and values["llm_layers"] != DEMO_LAYERS:
            values["llm_adapter"] = "none"
        if self.data_path is None or self.test_data or not holds_captions(self.data_path):
            values["held_out"] = None
        if values["output_dir"] is None:
            values["output_dir"] = default_output_dir(self.vision_tower)
        if values["lora_enable"] is None:
            values["lora_enable"] = self.bits < 16
        if self.stage == 2:  # it starts from stage 1's projector
            values["mm_projector_init"] = None

        tiles = values["image_aspect_ratio"] == "anyres"
        if self.mm_patch_merge_type not in (None, "spatial_unpad" if tiles else "flat"):
            raise UserError("--mm_patch_merge_type: anyres is spatial_unpad, the other --image_aspect_ratio are flat")
        if self.image_grid_pinpoints is not None and not tiles:
            raise UserError("--image_grid_pinpoints are the grids of --image_aspect_ratio anyres: give that too")
        values["mm_patch_merge_type"] = None  # it follows from the aspect
        return StageConfig(**values)

    def _batches(self, defaults: dict[str, Any], ranks: int) -> dict[str, int]:
        """Return sizes with `batch_size` = ranks × `gradient_accumulation_steps` × `per_device_train_batch_size`."""
        accumulation = self.gradient_accumulation_steps
        total = self.batch_size or defaults["batch_size"]
        micro = self.per_device_train_batch_size or defaults.get("per_device_train_batch_size", 16)
        if self.batch_size is None and accumulation is not None:
            total = micro * ranks * accumulation
        if self.per_device_train_batch_size is None:
            share = total // (ranks * (accumulation or 1))
            micro = max(1, share if accumulation else min(micro, share))
        steps = total // (micro * ranks)
        if steps == 0 or steps * micro * ranks != total or steps != (accumulation or steps):
            raise UserError(
                f"--batch_size {total} is not {ranks} rank(s) × --per_device_train_batch_size {micro} × "
                f"--gradient_accumulation_steps {accumulation or 'of a whole number'}: change one of them"
            )
        return {"batch_size": total, "per_device_train_batch_size": micro, "gradient_accumulation_steps": steps}


@dataclass(frozen=True, kw_only=True)
class StageConfig(TrainFlags):
    """The configuration of one stage: its flags with every default filled in.

    `bf16`, `gradient_checkpointing` and `dataloader_num_workers` may be None until `on` sets them.
    """

    version: str
    model_max_length: int
    mm_vision_select_layer: int
    llm_adapter: str
    mm_projector_type: Literal["mlp2x_gelu", "linear"]
    lora_enable: bool
    lora_r: int
    lora_alpha: int
    lora_dropout: float
    learning_rate: float
    warmup_ratio: float
    lr_scheduler_type: str
    num_train_epochs: float
    max_steps: int
    batch_size: int
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    group_by_modality_length: bool
    image_aspect_ratio: Literal["square", "pad", "anyres"]
    output_dir: str

    def to_json(self) -> str:
        """Return the configuration as text, for the processes of the stage."""
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str) -> StageConfig:
        """Return the configuration that `to_json` wrote."""
        values = json.loads(text)
        return StageConfig(**values | {"fields": values["fields"] and tuple(values["fields"])})

    def on(self, device: torch.device) -> StageConfig:
        """Return the configuration with the values filled in that depend on the kind of `device`."""
        from clips.common.runtime import has_bf16  # not at the top: --help is answered without torch

        on_gpu = device.type == "cuda"
        workers = 4 if on_gpu and not self.caches_features else 0
        return replace(
            self,
            bf16=has_bf16(device) if self.bf16 is None else self.bf16,
            gradient_checkpointing=on_gpu if self.gradient_checkpointing is None else self.gradient_checkpointing,
            dataloader_num_workers=workers if self.dataloader_num_workers is None else self.dataloader_num_workers,
        )

    def check_ranks(self, ranks: int) -> StageConfig:
        """Return the configuration. Raises UserError if its batch sizes are those of another number of ranks."""
        if self.batch_size != ranks * self.gradient_accumulation_steps * self.per_device_train_batch_size:
            raise UserError(f"the configuration is not of {ranks} rank(s): resolve its flags for as many")
        return self

    @property
    def rates(self) -> dict[str, float]:
        """The peak learning rate of each part."""
        overrides = {"vision_tower": self.mm_vision_tower_lr, "projector": self.mm_projector_lr}
        rates = {part: overrides.get(part) for part in PARTS}
        return {part: self.learning_rate if rate is None else rate for part, rate in rates.items()}

    @property
    def caches_features(self) -> bool:
        """True if the features of the frozen encoder are computed once."""
        return self.feature_cache and not self.unfreeze_mm_vision_tower

    @property
    def takes_stage_1(self) -> bool:
        """True for a stage 2 that starts from the projector of stage 1."""
        return self.stage == 2 and self.pretrain_mm_mlp_adapter is None

    def what_trains(self) -> dict[str, Any]:
        """Return the fields that change the result; a resumed run must have the same values."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in NOT_RESULT}


def holds_captions(data_path: str) -> bool:
    """Return True if `data_path` is data of pretraining, and no LLaVA file."""
    from mllm.data.captions import is_captions  # not at the top: it imports torch

    return is_captions(data_path)


def default_output_dir(vision_tower: str) -> str:
    """Return the run directory of a command without --output_dir; a bare owner/name or directory is of kind hf."""
    kind, colon, _ = vision_tower.partition(":")
    return os.path.join("runs", f"llava-{'hf' if not colon and '/' in kind else kind}")


NOT_RESULT = {
    *("output_dir", "dry_run", "device", "deepspeed", "feature_cache", "cache_dir", "feature_cache_gb"),
    "dataloader_num_workers",
    *("logging_steps", "save_steps", "save_total_limit", "report_to", "profile", "gradient_checkpointing"),
    *("on_bad_sample", "run_name", "small"),  # a run that began with either value goes on with the other
    *("per_device_train_batch_size", "gradient_accumulation_steps"),  # batch_size stays
}
AROUND_PROJECTOR = (
    *("model_name_or_path", "llm_layers", "llm_adapter"),
    *("mm_projector_type", "mm_vision_select_layer", "mm_vision_select_feature"),
)
"""Fields of the parts that a projector is trained between; they must be the same in both stages."""
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
"""Flags of LLaVA's scripts with the only value that each can have here, as another would silently train something else.
None: any value, without effect.
"""


def parser() -> argparse.ArgumentParser:
    """Return a parser with a flag for each field of `TrainFlags`, and hidden ones for LLaVA's flags in `ACCEPTED`.

    It does not check the values of the latter; `parse_stages` does.
    """
    # Not transformers.HfArgumentParser: importing it takes a second that --help and a mistyped flag would wait.
    p = Parser(HELP, prog="train_llava.sh", usage="%(prog)s [--vision NAME] [--stage 1|2] [flags]")
    add_options(p, TrainFlags)
    p.add_argument("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    for name in ACCEPTED:
        p.add_argument(f"--{name}", help=argparse.SUPPRESS)
    return p


GIVE_STAGE = "give --stage 1 (align: captions, trains the projector) or --stage 2 (instruct: conversations)"


def launched_ranks(device: str) -> int:
    """Return the number of ranks that a launcher has started for this process, or 1 without a launcher."""
    return find_ranks()[1]


def parse_stage(argv: Sequence[str], ranks_on: Callable[[str], int] = launched_ranks) -> StageConfig:
    """Return the configuration of the one stage that a command line names, for processes started by any launcher.

    Raises UserError if it names none, and like `parse_stages`.
    """
    stages = parse_stages(argv, ranks_on)
    if len(stages) > 1:
        raise UserError(f"{GIVE_STAGE}; scripts/train_llava.sh runs both")
    return stages[0]


def parse_stages(argv: Sequence[str], ranks_on: Callable[[str], int] = launched_ranks) -> list[StageConfig]:
    """Return the configuration of --stage, or of both stages; `--align.FLAG` and `--instruct.FLAG` count in one only.

    If a command line is for both stages, each one ignores the other's flags, and the other's `--version` (plain is
    stage 1's, every other format is stage 2's). `ranks_on` returns the number of ranks for a --device. Raises UserError
    for a flag of the other stage otherwise, for a LLaVA flag whose value is not supported, and before stage 1 for what
    stage 2 would refuse after it.
    """
    argv = [part for word in argv for part in (word.split("=", 1) if word.startswith("--") else [word])]
    if {"-h", "--help"} & set(argv):
        parser().parse_args(["--help"])
    numbers = [number for word, number in itertools.pairwise([*argv, ""]) if word == "--stage"][-1:]
    if numbers and numbers[0] not in ("1", "2"):
        raise UserError(f"{GIVE_STAGE}; scripts/train_llava.sh runs both without it")
    stages = [STAGES[int(number)] for number in numbers] or [*STAGES.values()]
    parsed = [_parse(argv, stage, both=not numbers) for stage in stages]
    ranks = ranks_on(parsed[-1].device)
    configs = [flags.resolve(ranks) for flags in parsed]
    if not numbers:
        _check_same_parts(*configs)
    return configs


def _check_same_parts(align: StageConfig, instruct: StageConfig) -> None:
    """Raise UserError before stage 1 for what stage 2 would refuse after it (mllm/training/record.py)."""
    if not instruct.takes_stage_1:
        return
    is_drawn = align.vision_tower.partition(":")[0] in ("random", "blind")  # with the seed
    for name in ("vision_tower", "output_dir", *(["seed"] if is_drawn else []), *AROUND_PROJECTOR):
        one, two = getattr(align, name), getattr(instruct, name)
        if one != two:
            raise UserError(
                f"--{name} would be {one} in stage 1 and {two} in stage 2, which starts from the projector of stage 1: "
                "give it, or the flag that changes it (such as --lora_enable), for both stages, without a prefix"
            )
    if align.data_path == instruct.data_path and (align.held_out or 0.0) < (instruct.held_out or 0.0):
        raise UserError(
            f"--held_out {align.held_out or 0:g} in stage 1 and {instruct.held_out or 0:g} in stage 2: stage 1 would "
            "train on images that stage 2 holds out; give --held_out for both stages, without a prefix"
        )


def _parse(argv: list[str], stage: Stage, *, both: bool) -> TrainFlags:
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
    if both and flags.data_path and "data_path" not in prefixed and not holds_captions(flags.data_path):
        raise UserError(
            "both stages on one --data_path of conversations would be wrong (captions, then conversations): name the "
            "stage with --stage 1 or 2, or give --align.data_path and --instruct.data_path"
        )
    if both and flags.pretrain_mm_mlp_adapter and "pretrain_mm_mlp_adapter" not in prefixed:
        raise UserError(
            "--pretrain_mm_mlp_adapter for both stages would drop what stage 1 learns: give it for stage 1 alone as "
            "--align.pretrain_mm_mlp_adapter, or train only stage 2 with --stage 2"
        )
    others = [] if not both else flags_of_stage(argv, STAGES[other].name)
    _check_test_flags(flags, others, prefixed)
    if both and stage.name == "instruct" and flags.test_data and "test_data" in prefixed:
        align = parser().parse_args(others)
        if align.data_path and holds_captions(align.data_path) and align.test_data != flags.test_data:
            raise UserError(
                f"--instruct.test_data {flags.test_data} does not keep its images out of stage 1: give --test_data for "
                "both stages, without a prefix"
            )
    for name in STAGE_FLAGS[other]:
        if getattr(flags, name) not in (None, False) and (not both or name in prefixed):
            raise UserError(
                f"--{name} is a flag of stage {other} ({STAGES[other].name}), and this is stage {stage.number} "
                f"({stage.name}): leave it out, or give --stage {other}"
            )
    if flags.version is not None and (flags.version == "plain") != (stage.name == "align"):
        if not both or "version" in prefixed:
            raise UserError(
                f"--version {flags.version} in stage {stage.number} ({stage.name}): plain is the format of stage 1 "
                "and only of stage 1; leave the flag out, or give the other --stage"
            )
        flags.version = None
    return from_flags(TrainFlags, flags, stage=stage.number)


def _check_test_flags(flags: argparse.Namespace, others: list[str], prefixed: set[str]) -> None:
    """Refuse --test_data and --held_out together, and either or --key without captions.

    `others` is the other stage's command line. A flag without a prefix that only its captions need is unset.
    """
    if flags.test_data and flags.held_out:
        raise UserError("--test_data and --held_out are two ways to hold out a test: give one of them")
    for name in ("test_data", "held_out", "key"):
        if getattr(flags, name) is not None and not (flags.data_path and holds_captions(flags.data_path)):
            other = None if name in prefixed else parser().parse_args(others).data_path
            if other is None or not holds_captions(other):
                data = flags.data_path or "the demo's data"
                raise UserError(f"--{name} is for captions, and {data} holds 'conversations': leave the flag out")
            setattr(flags, name, None)


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
