"""The table of what can be trained, against the paper's numbers; the schedules against slow formulas."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
from conftest import tiny_run

from clips.common.errors import UserError
from clips.config import AugmentConfig, PhaseConfig, Schedule
from clips.engine.checkpoint import Checkpoint, TrainState
from clips.model.clips import CLIPSModel
from clips.recipes import RECIPES, debug_twin, recipe, with_tower
from clips.training.prepare import check_progress
from clips.training.pretraining import optimizer_steps
from clips.training.trainer import crosses, lr_factor

PAPER = ("s16", "b16", "l14", "h14")
# shared by the four: (samples, batch, lr per 256, warm-up samples)
PAPER_PHASES = [
    (12_800_000_000, 32_768, 8e-6, 51_000_000),
    (512_000_000, 16_384, 4e-7, 26_000_000),
    (128_000_000, 8_192, 1e-7, 0),
]
RESOLUTIONS = {"s16": (112, 224, 384), "b16": (112, 224, 384), "l14": (84, 224, 336), "h14": (84, 224, 336)}
# vision width/layers/heads, text and decoder width/layers/heads, patch, embedding (CLIPS, "Architecture")
TOWERS = {
    "s16": ((384, 12, 6), (384, 12, 6), 16, 384),
    "b16": ((768, 12, 12), (512, 12, 8), 16, 512),
    "l14": ((1024, 24, 16), (768, 12, 12), 14, 768),
    "h14": ((1280, 32, 16), (1024, 24, 16), 14, 1024),
}


@pytest.mark.parametrize("name", PAPER)
def test_paper_recipes_are_the_papers(name: str) -> None:
    run = recipe(name)
    phases = [(p.samples, p.batch_size, p.lr * 256 / p.batch_size, p.warmup_samples) for p in run.phases]
    assert phases == [pytest.approx(phase, rel=1e-12) for phase in PAPER_PHASES]
    assert tuple(phase.image_size for phase in run.phases) == RESOLUTIONS[name]
    assert {(phase.schedule, phase.fresh_optimizer) for phase in run.phases} == {("cosine", True)}
    augment = AugmentConfig(min_crop_area=0.4, jitter=0.32, hue=0.08, jitter_probability=0.8, grayscale=0.2)
    assert {phase.augment for phase in run.phases} == {augment}
    assert (run.optim.kind, run.optim.betas, run.optim.weight_decay) == ("adamw", (0.9, 0.95), 0.2)
    assert (run.optim.decay_embeddings, run.optim.lr_scaling) == (False, "linear")
    assert (run.task.objective, run.task.caption_weight) == ("clips", 2.0)
    assert (run.captions.tokenizer, run.captions.strategy) == ("bert", "sentence")
    vision, text, captioner = run.model.vision, run.model.text, run.model.captioner
    tower, language, patch, embed = TOWERS[name]
    assert (vision.width, vision.layers, vision.heads) == tower
    assert (text.width, text.layers, text.heads) == (captioner.width, captioner.layers, captioner.heads) == language
    assert (vision.patch_size, run.model.embed_dim, vision.image_size) == (patch, embed, RESOLUTIONS[name][-1])
    assert (text.context_length, text.vocab_size, captioner.length) == (80, 32_000, 128)
    assert (vision.patch_dropout, captioner.image_token_keep) == (0.0, 1.0)
    assert not vision.pre_norm
    assert run.data.train == "", "there is no default for somebody's own data"


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_a_debug_twin_of_three_steps(name: str) -> None:
    run, full = debug_twin(recipe(name)), recipe(name)
    assert [phase.name for phase in run.phases] == [phase.name for phase in full.phases]
    for small, large in zip(run.phases, full.phases, strict=True):
        assert (small.schedule, small.augment) == (large.schedule, large.augment)
        assert small.steps == 3 // len(full.phases)
    assert len({phase.image_size for phase in run.phases}) == len(full.phases), "positions are recomputed here too"
    assert (run.optim, run.task, run.captions) == (full.optim, full.task, full.captions)
    assert run.model.vision.patch_size == full.model.vision.patch_size
    assert (run.model.captioner is None) == (full.model.captioner is None)
    model = CLIPSModel(run.model, pad_id=0)
    vocabulary = run.model.text.vocab_size * run.model.text.width * (2 if run.model.captioner else 1)
    assert sum(p.numel() for p in model.parameters()) < vocabulary + 200_000
    for phase in run.phases:
        model.visual.set_image_size(phase.image_size)
        assert len(model.visual.pos_embed) == 1 + (phase.image_size // run.model.vision.patch_size) ** 2


def phase(samples: int, warmup: int, schedule: str) -> PhaseConfig:
    small = tiny_run().phases[0]
    return replace(small, samples=samples, batch_size=10, warmup_samples=warmup, schedule=schedule)


AFTER_WARM_UP = {
    "cosine": lambda step: (1 + math.cos(math.pi * (step - 20) / 100)) / 2,
    "trapezoid": lambda step: min(1.0, (120 - step) / 40),  # flat up to the last third
    "linear": lambda step: (120 - step) / 100,
    "constant": lambda step: 1.0,
}


@pytest.mark.parametrize("schedule", get_args(Schedule))
def test_the_rate_rises_in_a_straight_line_and_falls_by_the_schedule(schedule: str) -> None:
    p = phase(1200, 200, schedule)  # 120 steps, 20 of warm-up
    expected = [(step + 1) / 20 for step in range(20)] + [AFTER_WARM_UP[schedule](step) for step in range(20, 120)]
    assert [lr_factor(p, step) for step in range(p.steps)] == pytest.approx(expected)
    assert lr_factor(phase(1000, 0, schedule), 0) == 1.0, "no warm-up: the peak from the first step"


def test_steps_of_the_optimizer_count_from_where_it_began_anew() -> None:
    p = phase(100, 0, "cosine")  # 10 steps
    run = replace(tiny_run(), phases=(p, p, replace(p, fresh_optimizer=True), p))
    ends = {(0, 4): 4, (1, 10): 20, (2, 0): 0, (2, 3): 3, (3, 1): 11, (3, 10): 20}
    for (index, step), expected in ends.items():
        state = TrainState(seed=0, step=10 * index + step, phase=index, phase_step=step)
        assert optimizer_steps(run.phases, state) == expected
    assert optimizer_steps((p,) * 4, TrainState(seed=0, step=31, phase=3, phase_step=1)) == 31


def test_steps_that_were_left_out_are_no_steps_of_the_optimizer() -> None:
    p = phase(100, 0, "cosine")  # 10 steps
    run = replace(tiny_run(), phases=(p, replace(p, fresh_optimizer=True)))
    left_out = [3, 9, 10, 14, 15]
    assert optimizer_steps(run.phases, TrainState(seed=0, step=4, phase=0, phase_step=4, left_out=left_out)) == 3
    assert optimizer_steps(run.phases, TrainState(seed=0, step=10, phase=0, phase_step=10, left_out=left_out)) == 8
    assert optimizer_steps(run.phases, TrainState(seed=0, step=15, phase=1, phase_step=5, left_out=left_out)) == 3


FIRST_ALONE = replace(tiny_run(), phases=(phase(100, 0, "cosine"),)).to_dict()["phases"]
IN_THE_MIDDLE, AT_A_BORDER, AT_THE_END = (1, 4), (0, 10), (2, 10)


@pytest.mark.parametrize(
    ("at", "change", "fits"),
    [
        (IN_THE_MIDDLE, "phases.1.samples=300", True),
        (IN_THE_MIDDLE, "phases.1.samples=40", True),  # it ends here
        (IN_THE_MIDDLE, "phases.1.samples=30", False),
        (IN_THE_MIDDLE, "phases.1.batch_size=20", False),
        (IN_THE_MIDDLE, "phases.*.batch_size=5", False),
        (IN_THE_MIDDLE, "phases.0.samples=200", False),
        (IN_THE_MIDDLE, "phases.2.batch_size=20", True),
        (IN_THE_MIDDLE, "phases.2.samples=500", True),
        (IN_THE_MIDDLE, f"phases={json.dumps(FIRST_ALONE)}", False),
        (AT_A_BORDER, "phases.0.samples=200", True),
        (AT_A_BORDER, "phases.0.batch_size=20", False),
        (AT_A_BORDER, "phases.1.batch_size=20", True),
        (AT_THE_END, "phases.2.samples=200", True),
        (AT_THE_END, "phases.1.samples=200", False),
        (AT_THE_END, "phases.2.batch_size=50", False),
    ],
)
def test_a_changed_phase_leads_to_the_checkpoint_or_is_refused(at: tuple[int, int], change: str, fits: bool) -> None:
    """With another batch size a run went beyond its last phase, or ended before its rate was 0."""
    run = replace(tiny_run(), phases=(phase(100, 0, "cosine"),) * 3)
    index, step = at
    state = TrainState(seed=0, phase=index, phase_step=step, step=10 * index + step, samples=100 * index + 10 * step)
    saved = Checkpoint(Path("runs/r/checkpoints/step-00000014"), state)
    check_progress(run, saved)
    changed = run.override([change])
    if fits:
        check_progress(changed, saved)
    else:
        with pytest.raises(UserError, match=r"a phase that has begun keeps its batch size.* --init-from .*runs/r$"):
            check_progress(changed, saved)


def test_a_step_crosses_each_multiple_once() -> None:
    hits = [n for n in range(1, 34) if crosses(100, 30 * (n - 1), 30 * n)]
    assert hits == [n for n in range(1, 34) if any(30 * (n - 1) < 100 * k <= 30 * n for k in range(1, 11))]
    assert not any(crosses(0, 30 * (n - 1), 30 * n) for n in range(1, 34))


def test_a_tower_that_others_run_differs_in_its_fields_alone() -> None:
    run = with_tower(recipe("b16"), "siglip")
    assert run.model.vision.transformers_class == "SiglipVisionModel"
    assert replace(run, model=replace(run.model, vision=recipe("b16").model.vision)) == recipe("b16")
    assert with_tower(recipe("b16"), "clips") == recipe("b16")
