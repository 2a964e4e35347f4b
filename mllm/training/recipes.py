"""What a stage of LLaVA is, as data: the parts that it trains (the freeze table), and the defaults of its flags.

Every run prints the freeze table and asserts it before the first step (mllm/training/build.py). This module imports
nothing heavy: the command builds its flags from it.
"""

from dataclasses import dataclass
from typing import Any, Literal

from clips.common.errors import UserError

TrainMode = Literal["frozen", "full", "lora"]
PARTS = ("vision_tower", "projector", "word_embeddings", "language_model")
"""Every parameter is in exactly one part. The output layer belongs to the word embeddings, with which many language
models share it, and everything else of the language model to the last part."""
FREEZE: dict[str, dict[str, TrainMode]] = {
    "align": {"vision_tower": "frozen", "projector": "full", "word_embeddings": "frozen", "language_model": "frozen"},
    "instruct": {"vision_tower": "frozen", "projector": "full", "word_embeddings": "full", "language_model": "full"},
    "instruct, lora": {
        "vision_tower": "frozen",
        "projector": "full",
        "word_embeddings": "frozen",
        "language_model": "lora",
    },
}
"""How each part trains in each stage. Flags change single entries: see `freeze_table`."""

DEMO_LAYERS = "6,2"
"""The layers that the adapter was taught on (mllm/model/adapter). In the few minutes of the demo, a few layers that
train fully learn more than all layers with adapters."""
DEFAULTS: dict[str, dict[str, Any]] = {
    "both": {
        "held_out": 0.05,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "model_max_length": 2048,
        "llm_adapter": "none",
        "lora_r": 128,
        "lora_alpha": 256,
        "lora_dropout": 0.05,
        "warmup_ratio": 0.03,
        "lr_scheduler_type": "cosine",
        "num_train_epochs": 1.0,
        "max_steps": -1,
    },
    "align": {
        "version": "plain",
        "learning_rate": 1e-3,
        "batch_size": 256,
        "image_aspect_ratio": "square",
        "mm_projector_init": "random",
        "group_by_modality_length": False,
    },
    "instruct": {
        "version": "auto",
        "learning_rate": 2e-5,
        "batch_size": 128,
        "image_aspect_ratio": "pad",
        "group_by_modality_length": True,
        "freeze_word_embeddings": False,
    },
    "instruct, lora": {"learning_rate": 2e-4, "mm_projector_lr": 2e-5},
    "align, demo": {
        "learning_rate": 1e-4,
        "batch_size": 32,
        "per_device_train_batch_size": 32,
        "max_steps": 20,
        "mm_vision_select_layer": -1,
        "mm_projector_init": "captions",
    },
    "instruct, demo": {
        "learning_rate": 1e-3,
        "mm_projector_lr": 1e-4,  # at 1e-3 the projector loses its start before the adapters can use it
        "batch_size": 8,
        "per_device_train_batch_size": 8,
        "max_steps": 240,
        "lora_enable": True,
        "lora_r": 32,
        "lora_alpha": 64,
        "lora_dropout": 0.0,
        "image_aspect_ratio": "square",
        "mm_vision_select_layer": -1,
    },
    "align, demo, full": {"llm_layers": DEMO_LAYERS, "llm_adapter": "default"},
    "instruct, demo, full": {
        "llm_layers": DEMO_LAYERS,
        "llm_adapter": "default",
        "lora_enable": False,
        "learning_rate": 5e-4,
        "mm_projector_lr": 3e-4,
        "freeze_word_embeddings": True,
        "max_steps": 480,
    },
}
"""Defaults of the flags: LLaVA-1.5's recipe, its changes for LoRA, the demo's changes (small scenes, a few CPU
minutes), and those for the demo without adapters, where a few layers of the default language model train fully."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One of the two stages in which a LLaVA model is trained, with the defaults of its flags."""

    number: int
    name: str
    zero: int
    """ZeRO stage for several ranks: ds_configs/llava_zero{zero}.json."""

    def defaults(self, *, lora: bool, demo: bool, full: bool) -> dict[str, Any]:
        """Return the defaults of the stage's flags; later entries of DEFAULTS override earlier ones.

        `lora` is for training with adapters, `demo` for the demo's data or --small, and `full`, which counts only with
        `demo`, for the default language model without adapters.
        """
        names = {
            "both": True,
            self.name: True,
            f"{self.name}, lora": lora,
            f"{self.name}, demo": demo,
            f"{self.name}, demo, full": demo and full,
        }
        table: dict[str, Any] = {}
        for name, counts in names.items():
            if counts:
                table.update(DEFAULTS.get(name, {}))
        return table


STAGES = {
    1: Stage(number=1, name="align", zero=2),
    2: Stage(number=2, name="instruct", zero=3),
}
STAGE_FLAGS = {
    1: ("mm_projector_init",),
    2: (
        *("lora_enable", "lora_r", "lora_alpha", "lora_dropout"),
        *("freeze_mm_mlp_adapter", "freeze_word_embeddings", "mm_vision_tower_lr"),
    ),
}
"""The flags that only one of the stages has, by its number."""


def default_in_words(name: str, unset: str) -> str:
    """Return the defaults of the flag `name` in every stage that has it; `unset` stands for None."""

    def shown(demo: bool) -> str:
        of_stage = {}
        for stage in STAGES.values():
            if name not in STAGE_FLAGS[3 - stage.number]:
                for words, lora in ((stage.name, False), (f"{stage.name} with LoRA", True)):
                    of_stage[words] = stage.defaults(lora=lora, demo=demo, full=not lora).get(name, unset)
                if of_stage[words] == of_stage[stage.name]:
                    del of_stage[words]
        texts = [_in_words(value) for value in of_stage.values()]
        if len(set(texts)) == 1:
            return texts[0]
        return ", ".join(f"{text} for {words}" for text, words in zip(texts, of_stage, strict=True))

    own, demo = shown(False), shown(True)
    return own if own == demo else f"{own}; the demo and --small: {demo}"


def _in_words(value: Any) -> str:
    """Return a default as one would type it."""
    if isinstance(value, float) and 0 < value < 0.01:
        mantissa, exponent = f"{value:e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)


def freeze_table(
    stage: Stage,
    *,
    lora: bool = False,
    bits: int = 16,
    unfreeze_mm_vision_tower: bool = False,
    tune_mm_mlp_adapter: bool = False,
    freeze_mm_mlp_adapter: bool = False,
    freeze_backbone: bool = False,
    freeze_word_embeddings: bool = False,
) -> dict[str, TrainMode]:
    """Return how each part trains, from the table and LLaVA's flags.

    Raises UserError if the flags contradict each other or leave nothing to train.
    """
    freeze = dict(FREEZE[f"{stage.name}, lora" if lora and stage.name == "instruct" else stage.name])
    if unfreeze_mm_vision_tower:
        if stage.name == "align":
            raise UserError(
                "--unfreeze_mm_vision_tower in stage 1 would train an encoder that stage 2 does not see, because stage "
                "1 only saves the projector: give it for stage 2 (--instruct.unfreeze_mm_vision_tower)"
            )
        freeze["vision_tower"] = "full"
    if tune_mm_mlp_adapter or freeze_backbone:
        freeze["language_model"] = freeze["word_embeddings"] = "frozen"
    if freeze_word_embeddings:
        freeze["word_embeddings"] = "frozen"
    if freeze_mm_mlp_adapter:
        freeze["projector"] = "frozen"
    if bits < 16 and freeze["language_model"] == "full":
        raise UserError(f"--bits {bits} cannot train the language model's own weights: add --lora_enable")
    if all(how == "frozen" for how in freeze.values()):
        raise UserError(f"these flags leave nothing to train in stage {stage.number} ({stage.name})")
    return freeze
