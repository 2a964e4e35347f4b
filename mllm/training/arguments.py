"""The flags of scripts/train_llava.sh: LLaVA's own names, and what they are when not given."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import sys
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from clips.common.errors import UserError
from mllm.model.defaults import DEFAULT_LLM
from mllm.training.stages import STAGES, Stage

HELP = (
    "Train a LLaVA-style model in two stages. Any flag may be given for one stage only: --align.FLAG, --instruct.FLAG."
)
DEFAULTS: dict[str, Any] = {
    "mm_projector_type": "mlp2x_gelu",
    "model_max_length": 2048,
    "lora_r": 128,
    "lora_alpha": 256,
    "lora_dropout": 0.05,
    "warmup_ratio": 0.03,
    "lr_scheduler_type": "cosine",
    "num_train_epochs": 1.0,
    "max_steps": -1,
}
"""What LLaVA-1.5's scripts give in both stages; what they give in one is in mllm/training/stages.py."""
LLAVA_DEFAULTS: dict[str, Any] = {
    "mm_projector_type": "linear",
    "mm_vision_select_layer": -1,
    "image_aspect_ratio": "square",
    "group_by_modality_length": False,
    "model_max_length": 512,
    "lora_r": 64,
    "lora_alpha": 16,
    "learning_rate": 5e-5,
    "mm_projector_lr": None,
    "warmup_ratio": 0.0,
    "lr_scheduler_type": "linear",
    "num_train_epochs": 3.0,
}
"""What LLaVA's train.py takes where its command leaves a flag out, and that is another value than here."""


def flag(default: Any, text: str, *aliases: str) -> Any:
    """A field whose flag is explained by `text`; a * at its end stands for "the default depends on the stage"."""
    shown = "" if "default" in text else " (default: the stage's)" if text.endswith("*") else f" (default: {default})"
    return field(default=default, metadata={"help": text.rstrip("*") + shown, "aliases": aliases})


def usual(name: str, text: str) -> Any:
    """A field that `resolve` fills in from DEFAULTS."""
    return flag(None, f"{text} (default: {DEFAULTS[name]})")


@dataclass(frozen=True, kw_only=True)
class TrainArguments:
    """One stage. None: the stage's default (`resolve` fills it in)."""

    stage: int = flag(0, "1 aligns the projector, 2 tunes on instructions (train_llava.sh's default: both)")
    vision_tower: str = flag(
        "clips",
        "encoder: clips, clip, caption, random, blind, open_clip:…, hf:… (or owner/name alone), timm:…",
        "--vision",
    )
    model_name_or_path: str = flag(DEFAULT_LLM, "language model: hub id or directory")
    output_dir: str | None = flag(None, "run directory (default: runs/llava-ENCODER)")
    data_path: str | None = flag(None, "LLaVA JSON or JSONL (default: the demo data)")
    image_folder: str | None = flag(None, "folder or uncompressed tar of the pictures")
    on_bad_sample: Literal["error", "skip"] = flag(
        "error", "samples that cannot be trained on: refuse the set, or leave them out and list them in skipped.jsonl"
    )
    version: str | None = flag(None, "conversation format: plain, v1, llama_3, chatml, auto, or LLaVA's other names*")
    pretrain_mm_mlp_adapter: str | None = flag(None, "projector to start from (stage 2 default: that of stage 1)")
    mm_projector_type: Literal["mlp2x_gelu", "linear"] | None = usual("mm_projector_type", "projector")
    mm_projector_init: Literal["random", "captions"] | None = flag(
        None, "start of stage 1: random, or captions: closed form, image tokens regressed on the words of the captions*"
    )
    mm_vision_select_layer: int | None = flag(None, "hidden state of the encoder that the projector sees*")
    mm_vision_select_feature: Literal["patch", "cls_patch"] = flag("patch", "without or with the CLS token")
    image_aspect_ratio: Literal["square", "pad"] | None = flag(None, "square: the encoder's own way; pad: LLaVA's*")
    group_by_modality_length: bool | None = flag(None, "batches of one modality and similar lengths (default: stage 2)")
    model_max_length: int | None = usual("model_max_length", "longest sample in tokens")

    unfreeze_mm_vision_tower: bool = flag(False, "train the encoder too")
    tune_mm_mlp_adapter: bool = flag(False, "train the projector only")
    freeze_mm_mlp_adapter: bool = flag(False, "keep the projector as it is")
    freeze_backbone: bool = flag(False, "keep the language model as it is")
    lora_enable: bool | None = flag(None, "LoRA on the language model's linear layers in stage 2*")
    lora_r: int | None = usual("lora_r", "rank")
    lora_alpha: int | None = usual("lora_alpha", "scale × rank")
    lora_dropout: float | None = usual("lora_dropout", "dropout before the adapters")
    bits: Literal[4, 8, 16] = flag(16, "4 or 8: quantised language model (bitsandbytes) with LoRA")
    quant_type: Literal["nf4", "fp4"] | None = flag(None, "the numbers of --bits 4 (default: nf4)")
    double_quant: bool | None = flag(None, "quantise the scales of --bits 4 too (default: True)")

    learning_rate: float | None = flag(None, "peak learning rate*")
    mm_projector_lr: float | None = flag(None, "that of the projector, where it is another")
    mm_vision_tower_lr: float | None = flag(None, "that of the encoder, where it is another")
    weight_decay: float = flag(0.0, "AdamW's weight decay")
    warmup_ratio: float | None = usual("warmup_ratio", "share of the steps that warm up")
    warmup_steps: int | None = flag(None, "steps that warm up, instead of a share (default: from --warmup_ratio)")
    lr_scheduler_type: str | None = usual("lr_scheduler_type", "schedule of transformers.Trainer")
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm")
    num_train_epochs: float | None = flag(None, "passes over the data (default: 1)")
    max_steps: int | None = flag(None, "optimizer steps, instead of epochs (default: -1, epochs count)")
    batch_size: int | None = flag(None, "samples of one optimizer step over all ranks*")
    per_device_train_batch_size: int | None = flag(None, "samples of one forward pass (default: 16)")
    gradient_accumulation_steps: int | None = flag(None, "forward passes of one step (default: from --batch_size)")
    seed: int = flag(0, "seed of the projector, the adapters and the order")

    bf16: bool | None = flag(None, "bf16 arithmetic (default: where the device has it)")
    gradient_checkpointing: bool | None = flag(None, "recompute activations in the backward pass (default: on GPUs)")
    deepspeed: str | None = flag(None, "DeepSpeed config, or none (default: for several ranks, ds_configs/llava_zero*)")
    device: Literal["auto", "cpu", "cuda"] = flag("auto", "where to train")
    feature_cache: bool = flag(True, "compute the features of a frozen encoder once")
    cache_dir: str | None = flag(None, "where they are kept (default: ~/.cache/clips-mllm/features)")
    dataloader_num_workers: int | None = flag(None, "data processes (default: 4 where pictures are decoded for a GPU)")
    logging_steps: int = flag(10, "steps between two lines of metrics.jsonl")
    save_steps: int = flag(200, "steps between two checkpoints")
    save_total_limit: int = flag(2, "checkpoints that are kept")
    report_to: Literal["none", "tensorboard", "wandb"] = flag("none", "where losses go besides metrics.jsonl")
    run_name: str | None = flag(None, "the run's name there (default: the stage's directory)")
    profile: int = flag(0, "optimizer steps that torch's profiler records into STAGE/profile (default: 0, none)")
    dry_run: bool = flag(False, "print the command and the plan, train nothing")

    def resolve(self, world_size: int) -> ResolvedArguments:
        """The same with every default filled in; raises UserError for values that do not fit each other."""
        import torch  # not at the top: --help is answered without it

        from clips.common.runtime import has_bf16

        stage = self.description
        is_demo = self.data_path is None
        defaults: dict[str, Any] = DEFAULTS | {"lora_enable": self.bits < 16}
        defaults |= stage.llava | {"group_by_modality_length": stage.number == 2}
        if self.lora_enable or self.bits < 16:
            defaults |= stage.lora
        if is_demo:
            defaults |= stage.demo
        if self.report_to != "none" and importlib.util.find_spec(self.report_to) is None:
            raise UserError(f"--report_to {self.report_to} needs a package: pip install {self.report_to}")
        if self.bits != 4 and (self.quant_type is not None or self.double_quant is not None):
            raise UserError("--quant_type and --double_quant say how --bits 4 quantises: give that, or leave them out")
        on_gpu = self.device != "cpu" and torch.cuda.is_available()
        defaults |= {
            "output_dir": os.path.join("runs", f"llava-{self.vision_kind}"),
            "bf16": has_bf16(torch.device("cuda" if on_gpu else "cpu")),
            "gradient_checkpointing": on_gpu,
            "dataloader_num_workers": 4 if on_gpu and not self.caches_features else 0,
        }
        filled = dataclasses.asdict(self)
        filled |= {name: value for name, value in defaults.items() if filled[name] is None}
        if stage.number == 2:  # it starts from stage 1's projector
            filled["mm_projector_init"] = None
        if self.bits < 16 and not filled["lora_enable"] and stage.number == 2:
            raise UserError(f"--bits {self.bits} cannot train the language model's own weights: add --lora_enable")
        batches = self._batches(world_size, filled["batch_size"], filled["per_device_train_batch_size"])
        return ResolvedArguments(**filled | batches)

    def _batches(self, world_size: int, total: int, micro: int | None) -> dict[str, int]:
        """`batch_size` = ranks × `gradient_accumulation_steps` × `per_device_train_batch_size`.

        `total` and `micro` are the sizes of step and forward pass, given or else the stage's.
        """
        accumulation = self.gradient_accumulation_steps
        if self.batch_size is None and accumulation is not None:
            total = (micro or 16) * world_size * accumulation
        if micro is None or self.per_device_train_batch_size is None:
            share = total // (world_size * (accumulation or 1))
            micro = max(1, share if accumulation else min(micro or 16, share))
        steps = total // (micro * world_size)
        wanted = accumulation or steps
        if steps == 0 or steps * micro * world_size != total or wanted != steps:
            raise UserError(
                f"--batch_size {total} is not {world_size} rank(s) × --per_device_train_batch_size {micro} × "
                f"{'--gradient_accumulation_steps ' + str(wanted) if wanted != steps else 'a whole number'}: "
                "change one of them"
            )
        return {
            "batch_size": total,
            "per_device_train_batch_size": micro,
            "gradient_accumulation_steps": steps,
        }

    @property
    def description(self) -> Stage:
        if self.stage not in STAGES:
            raise UserError(f"--stage {self.stage} is not known; choose 1 (align) or 2 (instruct)")
        return STAGES[self.stage]

    @property
    def vision_kind(self) -> str:
        """What stands before the colon of the encoder's name; a bare owner/name or directory is of kind hf."""
        kind, colon, _ = self.vision_tower.partition(":")
        return "hf" if not colon and "/" in kind else kind

    @property
    def caches_features(self) -> bool:
        return self.feature_cache and not self.unfreeze_mm_vision_tower

    def what_trains(self) -> dict[str, Any]:
        """The fields that change the result: what a resumed run must have in common with its beginning."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in NOT_RESULT}


@dataclass(frozen=True, kw_only=True)
class ResolvedArguments(TrainArguments):
    """One stage with its defaults filled in, by `TrainArguments.resolve`: these fields have a value."""

    output_dir: str
    version: str
    mm_projector_type: Literal["mlp2x_gelu", "linear"]
    model_max_length: int
    warmup_ratio: float
    lr_scheduler_type: str
    mm_vision_select_layer: int
    image_aspect_ratio: Literal["square", "pad"]
    group_by_modality_length: bool
    lora_enable: bool
    lora_r: int
    lora_alpha: int
    lora_dropout: float
    learning_rate: float
    num_train_epochs: float
    max_steps: int
    batch_size: int
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    bf16: bool
    gradient_checkpointing: bool
    dataloader_num_workers: int


NOT_RESULT = {
    *("output_dir", "dry_run", "device", "deepspeed", "feature_cache", "cache_dir", "dataloader_num_workers"),
    *("logging_steps", "save_steps", "save_total_limit", "report_to", "profile", "gradient_checkpointing"),
    *("on_bad_sample", "run_name"),  # what is left out is no part of a run that began with either
    *("per_device_train_batch_size", "gradient_accumulation_steps"),  # batch_size stays
}


@dataclass(frozen=True)
class OneValue:
    """A flag of LLaVA's scripts that has one value here (None: any, since it has no effect)."""

    value: str | None
    instead: str = ""
    """What to use for another value."""


LLAVA_FLAGS = {
    "mm_use_im_start_end": OneValue("False"),
    "mm_use_im_patch_token": OneValue("False"),
    "mm_patch_merge_type": OneValue("flat", "pictures are one tile each; choose an encoder with a larger image"),
    "lazy_preprocess": OneValue("True"),
    "is_multimodal": OneValue("True", "samples without a picture are trained on in any case"),
    "remove_unused_columns": OneValue("False"),
    "evaluation_strategy": OneValue("no", "run scripts/evaluate_llava.py on the finished model"),
    "eval_strategy": OneValue("no", "run scripts/evaluate_llava.py on the finished model"),
    "save_strategy": OneValue("steps", "give --save_steps"),
    "fp16": OneValue("False", "use --bf16, which needs no scaling of the loss, or leave both out for fp32"),
    "optim": OneValue("adamw_torch", "to save memory use --bits 4, or DeepSpeed's offload"),
    "lora_bias": OneValue("none"),
    "lora_weight_path": OneValue("", "merge the adapter, and give the result as --model_name_or_path"),
    "mpt_attn_impl": OneValue(None),
    "tf32": OneValue(None),
    "per_device_eval_batch_size": OneValue(None),
    "model_type": OneValue(None),
}
STAGE_FLAGS = {
    1: ("mm_projector_init",),
    2: ("lora_enable", "lora_r", "lora_alpha", "lora_dropout", "freeze_mm_mlp_adapter", "mm_vision_tower_lr"),
}
"""Stage → the flags that only it has."""


def parse_train_arguments(argv: list[str]) -> TrainArguments:
    """The flags of one stage; `--align.FLAG` and `--instruct.FLAG` count in that stage only.

    With `--both_stages` (of train_llava.sh and compare_encoders.py, which give both stages one command line) flags of
    the other stage are passed over; so is a `--version` of the other one: plain is stage 1's, every other stage 2's.
    Raises UserError for a flag of the other stage else, and for a LLaVA flag whose value is not supported.
    """
    argv = [part for word in argv for part in (word.split("=", 1) if word.startswith("--") else [word])]
    if {"-h", "--help"} & set(argv):
        parser().parse_args(["--help"])
    stage = _stage_of(argv)
    flags = vars(parser().parse_args(flags_of_stage(argv, stage.name)))
    _check_llava_flags({name: flags.pop(name) for name in LLAVA_FLAGS})
    del flags["local_rank"]
    both = flags.pop("both_stages")
    arguments = TrainArguments(**flags)
    own = {word.partition(".")[2].replace("-", "_") for word in argv if word.startswith(f"--{stage.name}.")}
    other = 3 - stage.number
    for name in STAGE_FLAGS[other]:
        if getattr(arguments, name) not in (None, False) and (not both or name in own):
            raise UserError(
                f"--{name} is a flag of stage {other} ({STAGES[other].name}), and this is stage {stage.number} "
                f"({stage.name}): leave it out, or give --stage {other}"
            )
    if arguments.version is not None and (arguments.version == "plain") != (stage.name == "align"):
        if not both or "version" in own:
            raise UserError(
                f"--version {arguments.version} in stage {stage.number} ({stage.name}): plain is the format of stage "
                "1, only of it; leave the flag out, or give the other --stage"
            )
        arguments = replace(arguments, version=None)
    return arguments


def _check_llava_flags(given: dict[str, str | None]) -> None:
    """UserError for a value that is not the one there is here; a note for flags without effect."""
    idle = [f"--{name}" for name, value in given.items() if value is not None and LLAVA_FLAGS[name].value is None]
    for name, value in given.items():
        only = LLAVA_FLAGS[name]
        if value is not None and only.value is not None and value.lower() != only.value.lower():
            always = f"here it is always {only.value or 'empty'}"
            raise UserError(f"--{name} {value} is not supported; {always}{only.instead and f': {only.instead}'}")
    if idle and os.environ.get("RANK", "0") == "0":
        print(f"note: without effect here: {', '.join(idle)}", file=sys.stderr)


def left_out(flags: TrainArguments, resolved: ResolvedArguments) -> str:
    """The values that count although the command does not give them, where LLaVA's train.py takes others (in brackets).

    Empty for the demo, which is no run of LLaVA's.
    """
    if flags.data_path is None:
        return ""
    counts = {
        **dict.fromkeys(("lora_r", "lora_alpha"), resolved.lora_enable and resolved.stage == 2),
        "warmup_ratio": flags.warmup_steps is None,
        "num_train_epochs": resolved.max_steps < 0,
    }
    found = []
    for name, theirs in LLAVA_DEFAULTS.items():
        given, value = getattr(flags, name), getattr(resolved, name)
        if given is None and value != theirs and counts.get(name, True):
            found.append(f"{name} {value} ({'as learning_rate' if theirs is None else theirs})")
    return ", ".join(found)


def parser() -> argparse.ArgumentParser:
    """One flag per field of `TrainArguments`, with its default, and LLaVA's that have one value here."""
    # Not transformers.HfArgumentParser: importing it takes a second that --help and a mistyped flag would wait.
    p = argparse.ArgumentParser(
        prog="train_llava.sh",
        usage="%(prog)s [--vision NAME] [--stage 1|2] [flags]",
        description=HELP,
        allow_abbrev=False,
    )
    hints = get_type_hints(TrainArguments)
    for f in dataclasses.fields(TrainArguments):
        kinds = [kind for kind in get_args(hints[f.name]) if kind is not type(None)]
        kind = hints[f.name] if get_origin(hints[f.name]) is Literal or not kinds else kinds[0]
        options: dict[str, Any] = {"type": kind}
        if kind is bool:
            options = {"type": _boolean, "nargs": "?", "const": True}
        elif get_origin(kind) is Literal:
            options = {"type": type(get_args(kind)[0]), "choices": get_args(kind)}
        names = [f"--{f.name}", *(alias for alias in f.metadata["aliases"]), f"--{f.name.replace('_', '-')}"]
        p.add_argument(*dict.fromkeys(names), default=f.default, dest=f.name, help=f.metadata["help"], **options)
        if f.default is True:
            p.add_argument(f"--no-{f.name.replace('_', '-')}", dest=f.name, action="store_false", help="switch it off")
    p.add_argument("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    p.add_argument("--both_stages", action="store_true", help=argparse.SUPPRESS)  # train_llava.sh adds it
    for name, only in LLAVA_FLAGS.items():
        shown = "without effect" if only.value is None else only.value or "empty"
        p.add_argument(f"--{name}", help=f"accepted as LLaVA's scripts give it ({shown})")
    return p


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text.lower() in ("true", "1", "yes")


def _stage_of(argv: list[str]) -> Stage:
    given = [argv[i + 1 : i + 2] for i, word in enumerate(argv) if word == "--stage"]
    number = "".join(given[-1]) if given else ""
    if number not in ("1", "2"):
        what = f"--stage {number} is not known" if given else "--stage is missing"
        raise UserError(
            f"{what}: give --stage 1 (align: captions, trains the projector) or --stage 2 (instruct: conversations); "
            "scripts/train_llava.sh runs both"
        )
    return STAGES[int(number)]


def flags_of_stage(argv: list[str], stage: str) -> list[str]:
    """`argv` without the other stage's own flags, and with this stage's own flags last, without their prefix."""
    common: list[str] = []
    own: list[str] = []
    target: list[str] = common
    for word in argv:
        if word.startswith("--"):
            prefix, dot, rest = word[2:].partition(".")
            is_own = bool(dot) and prefix in {s.name for s in STAGES.values()}
            target = common if not is_own else own if prefix == stage else []
            word = f"--{rest}" if is_own else word
        target.append(word)
    return common + own
