"""What LLaVA stages and captions are said to take: sizes as published, what fits, what is refused."""

from __future__ import annotations

import pytest

from clips.common.cards import Machine, card
from clips.common.errors import UserError
from mllm.training.freeze import count_parameters
from mllm.training.plan import LANGUAGE_MODELS, Planned, plan_stage, print_recaptioning, print_stages

PUBLISHED = {
    "smollm2-135m": 134.5e6,
    "vicuna-7b": 6.738e9,
    "vicuna-13b": 13.016e9,
    "llama3-8b": 8.030e9,
    "qwen2.5-7b": 7.616e9,
}
"""Parameters of the language models."""
VISION = {
    **{"hidden_size": 192, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 768},
    **{"image_size": 224, "patch_size": 14},
}


def planned(name: str, *, lora: bool = False, bits: int = 16) -> Planned:
    return Planned.of(name, VISION, lora=lora, bits=bits)


def on(gpus: int, kind: str = "h100") -> Machine:
    return Machine(card(kind), gpus, 0.2, 2.0)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_language_models_have_their_published_size(name: str) -> None:
    counts = count_parameters(planned(name).build())
    assert counts["language_model"][0] == pytest.approx(PUBLISHED[name], rel=1e-3)


def test_a_stage_costs_about_six_operations_a_parameter_and_token() -> None:
    """Full tuning: 6 N for forward and backward, 2 N for checkpointing; attention and the encoder come on top."""
    model, machine = planned("vicuna-7b"), on(8)
    plan = plan_stage(model, machine, 2)
    tokens = 128 / 8 * (256 + 250)
    rough = 8 * 6.48e9 * tokens / machine.speed  # without embeddings and head
    assert rough < plan.time.compute_s < 1.1 * rough
    assert plan_stage(planned("vicuna-7b", lora=True), machine, 2).time.compute_s < 0.85 * plan.time.compute_s
    assert plan_stage(planned("vicuna-7b"), machine, 1).time.compute_s < 1.5 * plan.time.compute_s
    assert plan.time.steps == 5198  # LLaVA-1.5's own


def test_what_does_not_fit_is_refused_and_what_is_proposed_fits(capsys: pytest.CaptureFixture[str]) -> None:
    card_of = on(1, "rtx4090")
    with pytest.raises(UserError, match=r"stage 2 of vicuna-7b .* does not fit 1 × RTX 4090 .* Try --lora, --bits 4"):
        print_stages(planned("vicuna-7b"), card_of)
    print_stages(planned("vicuna-7b", bits=4), card_of)
    said = capsys.readouterr().out
    assert "instruct" in said
    assert "at 2 a GPU hour" in said
    assert plan_stage(planned("vicuna-7b", bits=4), card_of, 2).memory_gb < 0.9 * 24


def test_recaptioning(capsys: pytest.CaptureFixture[str]) -> None:
    print_recaptioning(planned("smollm2-135m"), on(8), 1_000_000)
    assert "1,000,000 captions by smollm2-135m" in capsys.readouterr().out
    with pytest.raises(UserError, match="its weights take 26"):
        print_recaptioning(planned("vicuna-13b"), on(1, "rtx4090"), 10)


def test_a_language_model_that_is_not_known() -> None:
    with pytest.raises(UserError, match="choose one of: smollm2-135m"):
        planned("gpt-5")
