"""What LLaVA stages and captions are said to take: sizes as published, what fits, what is refused."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from torch import nn

from clips.common.cards import Machine, card
from clips.common.errors import UserError
from mllm.model.quantize import quantize, stored_bytes
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


def planned(name: str, *, lora: bool = False, bits: int = 16, **sees: object) -> Planned:
    return Planned.of(name, VISION, lora=lora, bits=bits, **sees)


def on(gpus: int, kind: str = "h100") -> Machine:
    return Machine(card(kind), gpus, 0.2, 2.0)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_language_models_have_their_published_size(name: str) -> None:
    counts = count_parameters(planned(name).build())
    assert counts["language_model"][0] == pytest.approx(PUBLISHED[name], rel=1e-3)


@pytest.fixture
def _shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    """vicuna-7b has a quarter of its layers: PEFT takes seconds for the adapters of all 32."""
    monkeypatch.setitem(LANGUAGE_MODELS, "vicuna-7b", LANGUAGE_MODELS["vicuna-7b"] | {"num_hidden_layers": 8})


def test_a_stage_costs_about_six_operations_a_parameter_and_token() -> None:
    """Full tuning: 6 N for forward and backward, 2 N for checkpointing; attention and the encoder come on top."""
    model, machine = planned("vicuna-7b"), on(8)
    plan = plan_stage(model, machine, 2)
    tokens = 128 / 8 * (256 + 250)
    rough = 8 * 6.48e9 * tokens / machine.speed  # without embeddings and head
    assert rough < plan.time.compute_s < 1.1 * rough
    assert plan_stage(planned("vicuna-7b"), machine, 1).time.compute_s < 1.5 * plan.time.compute_s
    assert plan.time.steps == 5198  # LLaVA-1.5's own


@pytest.mark.usefixtures("_shallow")
def test_adapters_cost_less() -> None:
    full, lora = (plan_stage(planned("vicuna-7b", lora=lora), on(8), 2).time.compute_s for lora in (False, True))
    assert lora < 0.85 * full


@pytest.mark.usefixtures("_shallow")
def test_what_does_not_fit_is_refused_and_what_is_proposed_fits(capsys: pytest.CaptureFixture[str]) -> None:
    def cards(gpus: int) -> Machine:
        return replace(on(gpus, "rtx4090"), card=replace(card("rtx4090"), memory_gb=7))

    refused = r"stage 2 of vicuna-7b .* does not fit 1 × RTX 4090 .* fits with --lora, or --bits 8, or --gpus \d+, or"
    with pytest.raises(UserError, match=refused) as caught:
        print_stages(planned("vicuna-7b"), cards(1))
    gpus = int(re.search(r"--gpus (\d+)", str(caught.value))[1])
    assert plan_stage(planned("vicuna-7b"), cards(gpus), 2).memory_gb < 0.9 * 7
    with pytest.raises(UserError, match="does not fit"):
        plan_stage(planned("vicuna-7b"), cards(gpus // 2), 2, propose=False)
    print_stages(planned("vicuna-7b", bits=4), cards(1))  # what does not fit would be refused
    said = capsys.readouterr().out
    assert "instruct" in said
    assert "at 2 a GPU hour" in said


def test_tiles_and_videos_cost_their_squares_and_tokens() -> None:
    plain, tiles, video = ({}, {"tiles": "2x2"}, {"tiles": "2x2", "frames": 32})
    models = [planned("smollm2-135m", **sees) for sees in (plain, tiles, video)]
    assert [model.image_tokens for model in models] == [256, 256 + 32 * 33, 32 * 8**2 + 1]
    assert [model.layout.most_squares for model in models] == [1, 5, 32]
    seconds = [plan_stage(model, on(8), 2).time.compute_s for model in models]
    assert 2 * seconds[0] < seconds[1] < seconds[2]
    assert str(models[2]).endswith("1,312 tokens a picture in 2 × 2 tiles and whole, 2,049 a video of 32 frames")
    for wrong in ({"frames": 8}, {"tiles": "2x2", "frames": 65}, {"tiles": "4x4", "frames": 8}, {"tiles": "7x1"}):
        with pytest.raises(UserError, match=r"--frames \d+ must be 0 to 64, and needs|--tiles '7x1' must be"):
            planned("smollm2-135m", **wrong)


@pytest.mark.parametrize(("bits", "double_quant"), [(4, True), (4, False), (8, True)])
def test_quantised_layers_take_the_bytes_that_bitsandbytes_stores(bits: int, double_quant: bool) -> None:
    """The weights, their scales and the tables, each counted in the layer that bitsandbytes made."""
    layers = nn.Sequential(nn.Linear(256, 192), nn.Linear(1024, 320, bias=False))
    expected = [stored_bytes(layer, bits, double_quant=double_quant) for layer in layers]
    quantize(layers, bits, torch.float32, torch.device("cpu"), double_quant=double_quant)
    for layer, size in zip(layers, expected, strict=True):
        state = getattr(layer.weight, "quant_state", None)
        parts = [layer.weight.data, layer.weight.SCB] if state is None else [layer.weight.data, *tensors_of(state)]
        assert sum(part.nbytes for part in parts) == size


def tensors_of(state: object) -> list[torch.Tensor]:
    values = [value for value in vars(state).values() if value is not None]
    inner = [tensor for value in values if hasattr(value, "absmax") for tensor in tensors_of(value)]
    return [value for value in values if isinstance(value, torch.Tensor)] + inner


def test_recaptioning(capsys: pytest.CaptureFixture[str]) -> None:
    print_recaptioning(planned("smollm2-135m"), on(8), 1_000_000)
    assert "1,000,000 captions by smollm2-135m" in capsys.readouterr().out
    with pytest.raises(UserError, match="its weights take 26"):
        print_recaptioning(planned("vicuna-13b"), on(1, "rtx4090"), 10)


def test_a_language_model_that_is_not_known() -> None:
    with pytest.raises(UserError, match="choose one of: smollm2-135m"):
        planned("gpt-5")
