"""The language side on a GPU: what a CPU answers, and 4-bit weights that learn."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_mllm import write_llm, write_run

from mllm.encoders.load import load_vision
from mllm.model.llava import build_model
from mllm.model.llm import load_llm
from mllm.model.quantize import quantize
from mllm.training.build import add_lora, apply_freeze, llava_of
from mllm.training.config import parse_stage
from mllm.training.recipes import STAGES, freeze_table
from mllm.training.trainer import TrainingModel, costs_of

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("gpu-llava")
    write_run(root / "runs" / "clips-demo")
    write_llm(root / "llm", hidden_size=64, intermediate_size=128)
    return root


def batch(image_id: int, tokens: int, device: torch.device) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    ids = torch.randint(3, 90, (2, 30))
    ids[:, 2 : 2 + tokens] = image_id
    labels = ids.clone()
    labels[:, : 4 + tokens] = -100
    tensors = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    tensors["pixel_values"] = torch.randn(2, 3, 32, 32)
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def test_the_loss_is_that_of_a_cpu(places: Path) -> None:
    losses = []
    for device in (torch.device("cpu"), GPU):
        vision = load_vision("clips", runs=places / "runs")
        llava, _ = build_model(vision, load_llm(str(places / "llm")))
        training = TrainingModel(llava.to(device), features=False).eval()
        inputs = batch(llava.config.image_token_id, vision.num_tokens, device)
        with torch.no_grad():
            losses.append(training(inputs)[0].item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("bits", [4, 8])
def test_adapters_learn_on_quantised_weights(places: Path, bits: int) -> None:
    arguments = parse_stage(["--stage", "2", "--bits", str(bits)])
    vision = load_vision("clips", runs=places / "runs")
    llava, _ = build_model(vision, load_llm(str(places / "llm")))
    quantize(llava.model.language_model, bits, torch.bfloat16, GPU)
    model = add_lora(llava, arguments)
    apply_freeze(model, freeze_table(STAGES[2], lora=True, bits=bits))
    training = TrainingModel(model.to(GPU), features=False)
    optimizer = torch.optim.AdamW([p for p in training.parameters() if p.requires_grad], lr=1e-2)
    inputs = batch(llava.config.image_token_id, vision.num_tokens, GPU)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss = training(inputs)[0]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert costs_of(llava_of(model), 32)["positions"] > 0
