"""Configuration: frozen, keyword-only dataclasses, validated on construction.

One nested `RunConfig` describes a run completely; its JSON form, `runs/NAME/config.json`, suffices to rebuild the run.
Recipes (`clips/recipes.py`) are functions that return a `RunConfig`.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from clips.common import rundir
from clips.common.errors import UserError
from clips.common.files import from_json, read_bytes, write_json
from clips.common.flags import assign, bounded, check_fields, from_dict, require


def parse_fields(assignments: list[str], fields: Fields) -> Fields:
    """Return `fields` with the parts replaced that --fields assigns, such as `image=jpg web=json:alt long=txt`.

    Raises UserError for an unknown part or an empty field.
    """
    known = [field.name for field in dataclasses.fields(Fields)]
    for assignment in assignments:
        part, separator, field = assignment.partition("=")
        if part not in known or not separator or not field:
            raise UserError(f"--fields {assignment!r} must look like PART=FIELD with PART one of: {', '.join(known)}")
        fields = replace(fields, **{part: field})
    return fields


def parse_mix(entries: list[str]) -> tuple[MixPart, ...]:
    """Parse --mix, entries NAME=SHARE:DATA such as `recap=3:shards/*.tar`. Raises UserError for any other form."""
    parts = []
    for entry in entries:
        name, has_name, rest = entry.partition("=")
        share, has_share, data = rest.partition(":")
        try:
            parts.append(MixPart(name=name, share=float(share), data=data))
        except ValueError:
            has_share = ""
        if not (has_name and has_share and name and data):
            raise UserError(f"--mix {entry!r} must look like NAME=SHARE:DATA, as in recap=0.7:'shards/*.tar'")
    return tuple(parts)


def parse_test_data(entries: list[str]) -> tuple[str, tuple[NamedSet, ...]]:
    """Split --test-data into the first set, DATA, and further ones, NAME=DATA. Raises UserError for any other form."""
    further = []
    for entry in entries[1:]:
        name, has_name, data = entry.partition("=")
        if not (name and has_name and data):
            raise UserError(f"--test-data {entry!r}: after the first set give NAME=DATA, as in flickr=flickr.jsonl")
        further.append(NamedSet(name=name, data=data))
    return entries[0], tuple(further)


Activation = Literal["gelu", "gelu_tanh", "quick_gelu"]
PositionTable = Literal["sincos", "sincos_reference"]
ImagePool = Literal["mean", "cls"]
TokenizerKind = Literal["bert", "wordpiece", "clip"]
Schedule = Literal["cosine", "trapezoid", "linear", "constant"]
Freeze = Literal["none", "vision", "text"]


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The image tower (docs/method.md, "Architecture"). `image_size` is the export resolution in pixels."""

    width: int = bounded(at_least=1)
    layers: int = bounded(at_least=1)
    heads: int = bounded(at_least=1)
    image_size: int = bounded(224, at_least=1)
    patch_size: int = bounded(16, at_least=1)
    mlp_ratio: float = bounded(4.0, above=0)
    pre_norm: bool = False
    """LayerNorm before the blocks. Off in the paper; on, the tower maps onto CLIPVisionModel."""
    pos_embed: Literal[PositionTable, "learned"] = "sincos"
    """sincos: the fixed table of open_clip and MoCo v3. sincos_reference: that of the reference code and its published
    checkpoints, with another denominator of the frequencies. learned: see clips/model/vision.py."""
    patch_bias: bool = True
    """A bias in the patch convolution; the reference has none."""
    cls: bool = True
    """A CLS token before the patches. Without one the tower maps onto SiglipVisionModel."""
    activation: Activation = "gelu"
    pool: ImagePool = "mean"
    """The input of the final LayerNorm and the projection: the mean of the patch tokens, or the CLS token."""
    norm_eps: float = bounded(1e-6, at_least=0)
    patch_dropout: float = bounded(0.0, at_least=0, below=1)
    """Share of an image's patches that the tower does not see in training (FLIP)."""

    def __post_init__(self) -> None:
        check_fields(self, "vision.")
        require(self.width % self.heads == 0, f"vision.width {self.width} is not divisible by heads {self.heads}")
        has_fixed_table = self.pos_embed != "learned"
        require(self.width % 4 == 0 or not has_fixed_table, f"vision.width {self.width} must be divisible by 4")
        require(self.cls or self.pool == "mean", "vision.pool=cls reads a token that vision.cls=false removes")
        require(self.cls or not self.pre_norm, "vision.pre_norm=true with vision.cls=false has no transformers class")
        check_image_size(self.image_size, self.patch_size)

    @property
    def prefix_tokens(self) -> int:
        """Number of tokens before the patches: 1 with a CLS token, else 0."""
        return int(self.cls)

    @property
    def transformers_class(self) -> str:
        """The transformers class that computes this tower."""
        return "SiglipVisionModel" if not self.cls else "CLIPVisionModel" if self.pre_norm else "ViTModel"

    def tokens(self, image_size: int | None = None) -> int:
        """Return the number of patch tokens (without CLS) for images of `image_size` pixels."""
        return ((image_size or self.image_size) // self.patch_size) ** 2

    def kept_tokens(self, image_size: int) -> int:
        """Return the number of patch tokens that pass through the blocks in training."""
        return _kept(self.tokens(image_size), 1 - self.patch_dropout)


def _kept(tokens: int, share: float) -> int:
    return max(1, round(share * tokens))


def check_image_size(image_size: int, patch_size: int, name: str = "image size") -> None:
    """Raise UserError unless `image_size` is a positive multiple of `patch_size`."""
    fits = image_size > 0 and image_size % patch_size == 0
    require(fits, f"{name} {image_size} is not a multiple of the patch size {patch_size}")


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The text tower. `context_length` counts every slot, with the CLS in the last one."""

    width: int = bounded(at_least=1)
    layers: int = bounded(at_least=1)
    heads: int = bounded(at_least=1)
    context_length: int = bounded(80, at_least=5)
    vocab_size: int = bounded(32_000, at_least=1)
    mlp_ratio: float = bounded(4.0, above=0)
    pad_mask: bool = False
    """False, as in the reference: padding is attended, and every text is padded to `context_length`.
    True: padding is masked, so a batch is padded only to its longest text (see clips/model/text.py)."""
    activation: Activation = "gelu_tanh"
    causal: bool = False
    """Each slot attends to itself and the slots before it, as in CLIP."""
    pool: Literal["cls", "eos"] = "cls"
    """The slot that represents the text: a CLS in the last slot, or eos (rows are `bos … eos pad …`)."""
    norm_eps: float = bounded(1e-6, at_least=0)

    def __post_init__(self) -> None:
        check_fields(self, "text.")
        require(self.width % self.heads == 0, f"text.width {self.width} is not divisible by heads {self.heads}")

    @property
    def words(self) -> int:
        """Number of slots for the tokens of a text, without bos, eos and CLS."""
        return self.context_length - (3 if self.pool == "cls" else 2)

    @property
    def trim(self) -> bool:
        """True if padding cannot change features, so that a batch is padded only to its longest text."""
        return self.pad_mask or (self.causal and self.pool == "eos")


@dataclass(frozen=True, kw_only=True)
class CaptionerConfig:
    """The autoregressive decoder over [image tokens; web-text states; caption positions]."""

    width: int = bounded(at_least=1)
    layers: int = bounded(at_least=1)
    heads: int = bounded(at_least=1)
    length: int = bounded(128, at_least=3)
    """Caption positions; `bos … eos` of the long caption is cut to this length, which leaves at least one token."""
    inputs: Literal["queries", "tokens"] = "queries"
    mlp_ratio: float = bounded(4.0, above=0)
    head_bias: bool = True
    """A bias in the head over the vocabulary; the reference has none."""
    image_token_keep: float = bounded(1.0, above=0, at_most=1)
    """Share of the image tower's patch tokens that the captioner sees in training, drawn for each sample. The authors
    report 0.25 to 0.35 as cheaper and better."""

    def __post_init__(self) -> None:
        check_fields(self, "captioner.")
        require(self.width % self.heads == 0, f"captioner.width {self.width} is not divisible by heads {self.heads}")

    def kept_tokens(self, tokens: int) -> int:
        """Return how many of an image's `tokens` the captioner sees in training."""
        return _kept(tokens, self.image_token_keep)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shapes of both towers, and of the captioner if there is one."""

    vision: VisionConfig
    text: TextConfig
    """The text tower, and the vocabulary of the captioner."""
    captioner: CaptionerConfig | None
    embed_dim: int = bounded(at_least=1)
    """Width of the space that images and texts share."""

    def __post_init__(self) -> None:
        check_fields(self, "model.")


TRAINING_FIELDS = {"model.vision": "patch_dropout", "model.captioner": "image_token_keep"}
"""Field of each part of a model that concerns only training, so that initial weights do not set it."""


@dataclass(frozen=True, kw_only=True)
class CaptionsConfig:
    """How the two texts of a sample become token ids."""

    tokenizer: TokenizerKind = "bert"
    strategy: Literal["sentence", "truncation", "random_mask", "block_mask", "full"] = "sentence"
    sub_caption_tokens: int = bounded(32, at_least=1)
    """Tokens that truncation, random_mask and block_mask keep."""
    sentence_share: float = bounded(0.0, at_least=0, at_most=1)
    """Share of the long caption's sentences, consecutive and at least one, that the strategy `sentence` keeps."""
    token_dropout: float = bounded(0.0, at_least=0, below=1)
    """Share of a text's tokens that the text tower does not read in training, drawn again at each step."""

    def __post_init__(self) -> None:
        check_fields(self, "captions.")


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """The objective: L = L_con + caption_weight · L_cap."""

    objective: Literal["clips", "clip"] = "clips"
    caption_weight: float = bounded(2.0, at_least=0)
    synthetic_share: float = bounded(0.2, at_least=0, at_most=1)
    """With objective clip: share of the samples that train on their synthetic caption, if they have one."""
    caption_share: float = bounded(1.0, above=0, at_most=1)
    """Share of the samples whose long caption is predicted; each step draws them again."""
    caption_chunk: int = bounded(4096, at_least=1)
    """Caption positions whose logits are held at once."""

    def __post_init__(self) -> None:
        check_fields(self, "task.")

    @property
    def texts(self) -> tuple[str, ...]:
        """The texts that the text tower reads, by their names in a batch."""
        return ("web", "sub") if self.objective == "clips" else ("web",)

    @property
    def captions(self) -> bool:
        """True if training needs long captions. Objective clip reads them if they are present."""
        return self.objective == "clips"


OTHERS = "others"
"""Value of `Fields.long` that joins two of the web captions that are not drawn into the long caption of a step."""


@dataclass(frozen=True, kw_only=True)
class Fields:
    """Where the three parts of a sample are found; `;` separates alternatives.

    Tar shards: `ext` (a member's extension) or `ext:key` (a key in a JSON member). Tables: column names. `a.b` is the
    key b of an object a. A caption's field may hold a list: then a step draws one web caption, and joins the long ones.
    """

    image: str = "jpg;jpeg;png;webp"
    web: str = "json:org_caption"
    long: str = "txt"
    """`others`: in each step two of the web captions that are not drawn, joined."""


@dataclass(frozen=True, kw_only=True)
class MixPart:
    """One of several sets that training mixes."""

    name: str
    share: float = bounded(above=0)
    """Share of the samples, relative to the shares of the other sets."""
    data: str
    """Data of the set, written as `DataConfig.train`."""
    fields: Fields | None = None
    """Its fields, if they differ from `DataConfig.fields`."""
    image_root: str | None = None
    """Its folder, if that differs from `DataConfig.image_root`."""

    def __post_init__(self) -> None:
        check_fields(self, f"data.mix, {self.name}: ")


@dataclass(frozen=True, kw_only=True)
class NamedSet:
    """A further test set."""

    name: str
    data: str
    """Data of the set, written as `DataConfig.train`."""

    def __post_init__(self) -> None:
        is_name = self.name.replace("-", "_").isidentifier() and self.name not in ("train", "val", "test")
        require(is_name, f"data.further_tests: {self.name!r} is no name: take letters, digits, - and _")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The data sets of a run, and how their samples are read."""

    train: str = "demo"
    """`demo`, `mix`, a shard pattern (`dir`, `*.tar`, `{00000..00009}.tar`, fsspec URLs) or a table (.csv/.jsonl/
    .parquet)."""
    mix: tuple[MixPart, ...] = ()
    """The sets of train = "mix"; each gives its share of every few thousand samples."""
    val: str | None = None
    held_out: float = bounded(0.0, at_least=0, below=1)
    """Without `val`: share of the images of `train`, at most 1,000, that are held out for validation. The demo, a mix,
    and a set of fewer than 100 images hold none out."""
    key: str | None = None
    """A column, or a JSON key of shards: samples with equal values, such as front and back of one thing, are held out
    together."""
    test: str | None = None
    further_tests: tuple[NamedSet, ...] = ()
    """Further test sets; their metrics are called NAME/METRIC. The studies decide by a set named `unseen`."""
    fields: Fields = field(default_factory=Fields)
    image_root: str | None = None
    """Tables: the folder that image paths are relative to, by default the table's folder."""
    allow_outside: bool = False
    """Tables: take images whose path leads out of the image folder."""
    demo_dir: str = "data/demo"
    workers: int = bounded(2, at_least=0)
    cache_gb: float = bounded(50, at_least=0)
    """Remote data: GB of this machine's disk for everything that is copied; 0 makes no copies."""
    max_broken_share: float = bounded(0.01, at_least=0, at_most=1)

    def __post_init__(self) -> None:
        check_fields(self, "data.")
        mixed = self.train == "mix"
        require(mixed == bool(self.mix), 'data.mix holds the sets of data.train = "mix": give both or neither')
        tests = [part.name for part in self.further_tests]
        require(len(set(tests)) == len(tests), f"data.further_tests names a set twice: {', '.join(tests)}")


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Augmentation in training. By default every part is off, and the image is only squashed to a square."""

    min_crop_area: float = bounded(1.0, above=0, at_most=1)
    """Smallest share of the image's area that a random crop keeps (its aspect is 3/4 … 4/3); 1: no crop."""
    jitter: float = bounded(0.0, at_least=0)
    """Brightness, contrast and saturation are multiplied by factors from 1 ± jitter."""
    hue: float = bounded(0.0, at_least=0, at_most=0.5)
    """Largest turn of the hue, as a share of the colour circle."""
    jitter_probability: float = bounded(1.0, at_least=0, at_most=1)
    """Share of the samples whose colours are changed by `jitter` and `hue`."""
    grayscale: float = bounded(0.0, at_least=0, at_most=1)
    """Share of the samples that lose their colours."""
    mirror: float = bounded(0.0, at_least=0, at_most=1)
    """Share of the samples whose image is mirrored left to right; captions keep their words."""

    def __post_init__(self) -> None:
        check_fields(self, "augment.")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer and its hyperparameters; learning rates belong to the phases."""

    kind: Literal["adamw", "muon"] = "adamw"
    betas: tuple[float, float] = bounded((0.9, 0.95), at_least=0, below=1)
    eps: float = bounded(1e-8, at_least=0)
    weight_decay: float = bounded(0.2, at_least=0)
    decay_embeddings: bool = True
    """If True, token embeddings decay as matrices do. Positions, queries and CLS never decay. The reference decays
    kernels only."""
    lr_scaling: Literal["linear", "sqrt", "none"] = "sqrt"
    """How the flag `--batch-size` scales the recipe's learning rates: with the batch, with its square root, or not.
    `phases.*.lr` is the rate that training uses."""
    clip_grad: float = bounded(0.0, at_least=0)
    """Limit of the global gradient norm; 0: off. Must be 0 with Muon, see clips/training/optim.py."""
    muon_momentum: float = bounded(0.95, at_least=0, below=1)
    layer_decay: float = bounded(1.0, above=0, at_most=1)
    """Learning rate of a tower's layer as a share of that of the layer above it; below 1, lower layers stay close to
    their initial weights. Projections, logit scale and captioner have the full rate, embeddings the lowest."""

    def lr_factor(self, batch_size: int, recipes: int) -> float:
        """Return the factor for a phase's learning rates if `batch_size` replaces the recipe's batch size, `recipes`.

        It is their ratio, its square root or 1, depending on `lr_scaling`.
        """
        return (batch_size / recipes) ** {"linear": 1.0, "sqrt": 0.5, "none": 0.0}[self.lr_scaling]

    def __post_init__(self) -> None:
        check_fields(self, "optim.")
        # DeepSpeed's ZeRO 1-3 would clip the orthogonalised update, so the step would depend on the ZeRO stage.
        require(self.kind != "muon" or self.clip_grad == 0, "optim.clip_grad must be 0 with Muon")


@dataclass(frozen=True, kw_only=True)
class PhaseConfig:
    """One stretch of training at one resolution. Phases follow each other; weights always carry over."""

    name: str
    samples: int
    batch_size: int = bounded(at_least=1)
    """Samples of one optimizer step, over all ranks and accumulation steps."""
    lr: float = bounded(at_least=0)
    """Peak AdamW learning rate at this batch size."""
    muon_lr: float = bounded(0.0, at_least=0)
    """Peak learning rate of the blocks' matrices when optim.kind = "muon"."""
    image_size: int
    """Side in pixels of the square that every image is squashed to."""
    warmup_samples: int = bounded(0, at_least=0)
    schedule: Schedule = "cosine"
    """After the warm-up the rate falls to 0 along a half cosine wave (cosine), linearly (linear), or linearly over the
    phase's last third (trapezoid). With constant it stays at the peak, for a phase that another one follows."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    fresh_optimizer: bool = False
    """Begin with an empty optimizer, as the reference does, instead of the previous phase's state."""

    def __post_init__(self) -> None:
        check_fields(self, f"phase {self.name}: ")
        is_enough = self.samples >= self.batch_size
        require(is_enough, f"phase {self.name}: samples {self.samples} is below one batch of {self.batch_size}")

    @property
    def steps(self) -> int:
        """Number of optimizer steps of the phase."""
        return self.samples // self.batch_size

    @property
    def seen(self) -> int:
        """Samples that the phase trains on, in full optimizer steps."""
        return self.steps * self.batch_size


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Precision, batches, checkpoints, and what a run does on a spike."""

    seed: int = bounded(0, at_least=0, below=2**63)
    debug: bool = False
    """True for the smoke test of a recipe (--debug); no later command takes it as the newest encoder."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """bf16 is autocast over fp32 weights. auto: the precision that the run began with, or bf16 if the device has it."""
    accumulation: int = bounded(1, at_least=1)
    """Micro-batches of one optimizer step."""
    contrastive: Literal["micro", "global"] = "micro"
    """Batch of the contrastive loss if accumulation > 1. micro: each micro-batch of all ranks. global: the whole batch,
    exactly, in the memory of a micro-batch, at the cost of one more forward pass of the towers (docs/training.md)."""
    activation_checkpointing: bool = False
    compile: bool = False
    init_from: str | None = None
    """Source of the initial weights (docs/weights.md): a directory, a hub id, or timm:NAME_OR_DIR. Read once, before
    the first step."""
    freeze: Freeze = "none"
    """The tower that is not trained (LiT); its projection into the shared space trains."""
    on_spike: Literal["continue", "skip"] = "continue"
    """What to do after a step whose loss or gradient norm is far above the recent ones (clips/engine/watchdog.py):
    continue only records it, and skip also skips its update."""
    log_every: int = bounded(10, at_least=1)
    """Optimizer steps between two lines of metrics.jsonl."""
    eval_every: int = bounded(0, at_least=0)
    """Samples between two evaluations on the validation split; 0: only at the end."""
    checkpoint_every: int = bounded(0, at_least=0)
    """Samples between two checkpoints; 0: only at the end and when stopped."""
    keep_checkpoints: int = bounded(2, at_least=1)
    """Number of the newest checkpoints that are kept."""
    choose: Literal["last", "best"] = "last"
    """The checkpoint that is measured and exported: the last one, or the best one on the validation split by the sum of
    R@1, R@5 and R@10 in both directions. The best one is kept, however old it is."""

    @property
    def whole_step(self) -> bool:
        """True if the contrastive loss spans several micro-batches, so that the towers run forward twice."""
        return self.contrastive == "global" and self.accumulation > 1

    def __post_init__(self) -> None:
        check_fields(self, "train.")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """How large the batches and the sets of evaluations are."""

    batch_size: int = bounded(128, at_least=1)
    max_images: int = bounded(5000, at_least=1)
    """Images of the retrieval evaluation during training; at the end the full set is used."""

    def __post_init__(self) -> None:
        check_fields(self, "eval.")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that defines a pretraining run; config.json holds exactly this."""

    recipe: str
    model: ModelConfig
    captions: CaptionsConfig
    task: TaskConfig
    data: DataConfig
    optim: OptimConfig
    phases: tuple[PhaseConfig, ...]
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        require(len(self.phases) > 0, "a run needs at least one phase")
        for phase in self.phases:
            check_image_size(phase.image_size, self.model.vision.patch_size)
        needs_captioner = self.task.objective == "clips" and self.task.caption_weight > 0
        has_captioner = self.model.captioner is not None
        require(has_captioner or not needs_captioner, "task.caption_weight is above 0 but model.captioner is null")
        reads_eos = self.captions.tokenizer != "clip" or self.model.text.pool == "eos"
        require(reads_eos, "captions.tokenizer=clip has no CLS token: set model.text.pool=eos")
        has_rates = all(phase.muon_lr > 0 or phase.lr == 0 for phase in self.phases)
        rate = "optim.kind=muon leaves the blocks as they are at phases.*.muon_lr=0: --set 'phases.*.muon_lr=0.02'"
        require(self.optim.kind != "muon" or has_rates, rate)

    @property
    def samples(self) -> int:
        """Samples of all phases, in full optimizer steps."""
        return sum(phase.seen for phase in self.phases)

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as nested dictionaries, as config.json has them."""
        return dataclasses.asdict(self)

    def save(self, path: Path) -> None:
        """Write the configuration to `path` as JSON, atomically."""
        write_json(path, self.to_dict())

    @staticmethod
    def load(path: Path) -> RunConfig:
        """Read `config.json`. Raises UserError, with the file and the field that does not fit."""
        try:
            return from_dict(RunConfig, from_json(read_bytes(path)))
        except (OSError, ValueError, UserError) as error:
            raise UserError(f"{path} is not a readable run configuration: {error}") from None

    def override(self, assignments: list[str], values: Mapping[str, Any] | None = None) -> RunConfig:
        """Return this configuration with `values` set by their paths, and then the assignments `a.b.c=value` applied.

        The value of an assignment is JSON or text, and phases are addressed by their index or `*`. Only the result must
        be a valid run. Raises UserError for an unknown field or a value that is not valid.
        """
        tree = json.loads(json.dumps(self.to_dict()))
        for path, value in (values or {}).items():
            assign(tree, path.split("."), copy.deepcopy(value), path)
        for assignment in assignments:
            path, separator, text = assignment.partition("=")
            require(bool(separator), f"--set {assignment!r} must look like part.field=value")
            try:
                value = json.loads(text)
            except ValueError:
                value = text
            assign(tree, path.split("."), value, path)
        return from_dict(RunConfig, tree)


def changed_fields(saved: RunConfig, current: RunConfig) -> list[str]:
    """Return the fields in which two runs differ as `path: saved → current`; a current precision "auto" fits any."""
    if current.train.precision == "auto":
        current = replace(current, train=replace(current.train, precision=saved.train.precision))
    return rundir.changed(saved.to_dict(), current.to_dict())
