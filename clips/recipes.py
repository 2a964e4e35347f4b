"""Every recipe by name. A recipe is a function that returns a complete RunConfig.

deepspeed scripts/pretrain_clips.py                    # demo
deepspeed scripts/pretrain_clips.py --recipe b16 --data '/data/recap/{00000..09999}.tar' --name b16
deepspeed scripts/pretrain_clips.py --recipe b16 --debug   # the same code in three tiny steps
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from clips.config import (
    AugmentConfig,
    CaptionerConfig,
    CaptionsConfig,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    PhaseConfig,
    RunConfig,
    TaskConfig,
    TextConfig,
    TrainConfig,
    VisionConfig,
)

MILLION = 1_000_000


def _preset(patch_size: int, vision: tuple[int, int, int], text: tuple[int, int, int], embed_dim: int) -> ModelConfig:
    width, layers, heads = text
    return ModelConfig(
        vision=VisionConfig(width=vision[0], layers=vision[1], heads=vision[2], patch_size=patch_size),
        text=TextConfig(width=width, layers=layers, heads=heads),
        captioner=CaptionerConfig(width=width, layers=layers, heads=heads),
        embed_dim=embed_dim,
    )


PRESETS: dict[str, ModelConfig] = {
    "S/16": _preset(16, (384, 12, 6), (384, 12, 6), 384),
    "B/16": _preset(16, (768, 12, 12), (512, 12, 8), 512),
    "L/14": _preset(14, (1024, 24, 16), (768, 12, 12), 768),
    "H/14": _preset(14, (1280, 32, 16), (1024, 24, 16), 1024),
    "demo": ModelConfig(
        vision=VisionConfig(width=128, layers=4, heads=4, image_size=60, patch_size=10),
        text=TextConfig(width=128, layers=2, heads=4, context_length=56, vocab_size=640, pad_mask=True),
        captioner=CaptionerConfig(width=128, layers=1, heads=4, length=48),
        embed_dim=128,
    ),
}
"""Sizes of towers and captioner by name: as published (docs/method.md, "Architecture"), and the demo's."""


def demo() -> RunConfig:
    """CLIPS on the embedded demo scenes: minutes on two CPU cores.

    python scripts/pretrain_clips.py
    """
    return RunConfig(
        recipe="demo",
        model=PRESETS["demo"],
        captions=CaptionsConfig(tokenizer="wordpiece"),
        # A third keeps the retrieval and loses some names, and a step takes 0.8 times as long.
        task=TaskConfig(caption_share=0.33),
        data=DataConfig(workers=1),
        # AdamW does not leave the plateau in this budget; Muon on the blocks' matrices does.
        optim=OptimConfig(kind="muon", weight_decay=0.05, muon_momentum=0.9),
        phases=(
            PhaseConfig(
                name="60px",
                samples=128_000,
                batch_size=128,
                lr=1.06e-3,
                muon_lr=1.41e-2,
                image_size=60,
                warmup_samples=2_560,
                schedule="linear",
            ),
        ),
        train=TrainConfig(eval_every=25_600, checkpoint_every=25_600),
        eval=EvalConfig(batch_size=256),
    )


def clip_baseline() -> RunConfig:
    """The CLIP baseline of the paper on the demo: one text per image (80 % web, 20 % synthetic), no captioner.

    On data without synthetic captions it trains only on web captions.

    python scripts/pretrain_clips.py --recipe clip_baseline
    """
    return _as_clip(demo(), "clip_baseline")


def small() -> RunConfig:
    """CLIPS without its captioner on some thousands to a few hundred thousand photographs.

    At equal time it retrieves better than with the captioner (docs/claims.md).

    python scripts/pretrain_clips.py --name mine --data 'shards/*.tar'
    """
    run = small_captioner()
    model = replace(run.model, captioner=None)
    return replace(run, recipe="small", model=model, task=TaskConfig(caption_weight=0.0))


def small_captioner() -> RunConfig:
    """`small` with the captioner on a third of the samples: a step takes 1.15 to 1.24 times as long.

    python scripts/pretrain_clips.py --recipe small_captioner --data 'shards/*.tar'
    """
    run = demo()
    vision = replace(run.model.vision, layers=6, image_size=80, patch_dropout=0.5)
    return replace(
        run,
        recipe="small_captioner",
        model=replace(
            run.model,
            vision=vision,
            text=replace(run.model.text, vocab_size=2048),
            captioner=CaptionerConfig(width=128, layers=1, heads=4, length=64),
        ),
        captions=replace(run.captions, token_dropout=0.2),
        task=replace(run.task, caption_chunk=16_384),
        data=DataConfig(train="", workers=1, held_out=0.05),
        optim=replace(run.optim, weight_decay=0.1),
        phases=(
            replace(
                run.phases[0],
                name="80px",
                samples=160_000,
                batch_size=128,
                lr=1.5e-3,
                muon_lr=2e-2,
                image_size=80,
                augment=AugmentConfig(min_crop_area=0.5, mirror=0.5),
            ),
        ),
        train=TrainConfig(eval_every=16_000, checkpoint_every=16_000, choose="best"),
    )


def small_clip() -> RunConfig:
    """The CLIP baseline of `small`: one caption of each image per step, no captioner, rates of its own.

    python scripts/pretrain_clips.py --recipe small_clip --data 'shards/*.tar'
    """
    return _as_clip(small(), "small_clip")


def _as_clip(run: RunConfig, name: str) -> RunConfig:
    """Return the CLIP baseline of a recipe. Its best learning rates are half of the recipe's."""
    return replace(
        run,
        recipe=name,
        model=replace(run.model, captioner=None),
        task=TaskConfig(objective="clip"),
        phases=tuple(replace(p, lr=p.lr / 2, muon_lr=p.muon_lr / 2) for p in run.phases),
    )


def _paper(name: str, preset: str, low: int, high: int) -> RunConfig:
    """Return the paper's three phases (docs/method.md, "Recipe"): `low` px, 224, `high`.

    deepspeed scripts/pretrain_clips.py --recipe b16 --data '/data/recap/*.tar'

    Learning rates are the published rates per 256 samples times the batch. Augmentation, decay and the fresh optimizer
    of each phase are the reference code's. Other than in the reference, text padding is masked: a text gives the same
    features at any length, so padding is not computed (a quarter of the FLOPs of L/14 at 84 px). With
    `--set model.text.pad_mask=false` it is. For Muon: `--set optim.kind=muon --set 'phases.*.muon_lr=0.02'`.
    """
    model = PRESETS[preset]
    augment = AugmentConfig(min_crop_area=0.4, jitter=0.32, hue=0.08, jitter_probability=0.8, grayscale=0.2)

    def phase(size: int, samples: int, batch: int, lr_per_256: float, warmup: int) -> PhaseConfig:
        return PhaseConfig(
            name=f"{size}px",
            samples=samples,
            batch_size=batch,
            lr=lr_per_256 * batch / 256,
            image_size=size,
            warmup_samples=warmup,
            augment=augment,
            fresh_optimizer=True,
        )

    return RunConfig(
        recipe=name,
        model=replace(model, text=replace(model.text, pad_mask=True), vision=replace(model.vision, image_size=high)),
        captions=CaptionsConfig(tokenizer="bert"),
        task=TaskConfig(),
        data=DataConfig(train="", workers=12),
        optim=OptimConfig(decay_embeddings=False, lr_scaling="linear"),
        phases=(
            # 12.8 B samples as in the script of the reference; its config says 2.56 B.
            phase(low, 12_800 * MILLION, 32_768, 8e-6, 51 * MILLION),
            phase(224, 512 * MILLION, 16_384, 4e-7, 26 * MILLION),
            phase(high, 128 * MILLION, 8_192, 1e-7, 0),
        ),
        train=TrainConfig(checkpoint_every=10 * MILLION, eval_every=50 * MILLION, activation_checkpointing=True),
        eval=EvalConfig(batch_size=64),
    )


RECIPES: dict[str, Callable[[], RunConfig]] = {
    "demo": demo,
    "clip_baseline": clip_baseline,
    "small": small,
    "small_captioner": small_captioner,
    "small_clip": small_clip,
    "s16": partial(_paper, "s16", "S/16", 112, 384),
    "b16": partial(_paper, "b16", "B/16", 112, 384),
    "l14": partial(_paper, "l14", "L/14", 84, 336),
    "h14": partial(_paper, "h14", "H/14", 84, 336),
}


def recipe(name: str) -> RunConfig:
    """Return the recipe `name` of RECIPES, a complete configuration that `dataclasses.replace` can change.

    >>> recipe("small").phases[0].batch_size
    128
    """
    return RECIPES[name]()


TOWERS: dict[str, dict[str, Any]] = {
    "clips": {},
    "siglip": {"cls": False, "activation": "gelu_tanh"},
    "clip": {"pre_norm": True},
    "clip_model": {"pre_norm": True, "pool": "cls"},
}
"""Fields of VisionConfig for each shape of the image tower. clips is the paper's (ViTModel); the others are
SiglipVisionModel and CLIPVisionModel. clip_model has CLIP's text tower too (CLIPModel)."""


def with_tower(run: RunConfig, name: str) -> RunConfig:
    """Return `run` with the image tower in the shape `name` of TOWERS."""
    text = replace(run.model.text, pool="eos", causal=True) if name == "clip_model" else run.model.text
    return replace(run, model=replace(run.model, vision=replace(run.model.vision, **TOWERS[name]), text=text))


def debug_twin(run: RunConfig) -> RunConfig:
    """Return the recipe's smoke test config: three steps of a tiny model on the demo data, the same code in seconds.

    Every phase keeps its order, schedule and augmentation; widths, depths, image sizes and batches shrink.
    """
    patch = run.model.vision.patch_size
    steps = 3 // len(run.phases)
    phases = tuple(
        replace(
            phase,
            samples=8 * steps,
            batch_size=8,
            warmup_samples=min(phase.warmup_samples, 8),
            image_size=patch * (2 + i),
        )
        for i, phase in enumerate(run.phases)
    )
    captioner = run.model.captioner
    model = ModelConfig(
        vision=replace(run.model.vision, width=32, layers=2, heads=2, image_size=phases[-1].image_size),
        text=replace(run.model.text, width=32, layers=2, heads=2),
        captioner=captioner and replace(captioner, width=32, layers=1, heads=2),
        embed_dim=min(run.model.embed_dim, 32),
    )
    return replace(
        run,
        model=model,
        phases=phases,
        data=replace(run.data, train=run.data.train or "demo", workers=0),
        train=replace(run.train, debug=True, log_every=1, eval_every=0, checkpoint_every=0),
    )
