"""Pretraining on a GPU: what a CPU computes, every ZeRO stage, compiled, within the memory that was predicted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from conftest import random_model, tiny_batch, tiny_run

from clips.common.peaks import peak_flops, stated_peak
from clips.common.runtime import init_distributed
from clips.config import RunConfig
from clips.studies.calibrate import Case, compare
from clips.studies.gpu_report import towers
from clips.training.engine import Engine
from clips.training.task import Task

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda", 0)
STAGES = [{"stage": 0}, {"stage": 1}, {"stage": 2}, {"stage": 3}]
OFFLOAD = {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": True}}


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def moved(seed: int, device: torch.device) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device) for name, tensor in tiny_batch(seed).items()}


def losses(run: RunConfig, zero: dict, device: torch.device, steps: int = 4) -> list[float]:
    init_distributed(device)
    engine = Engine(Task(random_model(run), run), run, device, {"zero_optimization": dict(zero)})
    engine.set_lr(1e-2, 2e-2)
    found = []
    for step in range(steps):
        loss, _ = engine(moved(step, device))
        engine.backward(loss)
        assert engine.agree(loss, stop=False) == (True, False)
        engine.step()
        found.append(loss.item())
    return found


def test_its_peak_is_known() -> None:
    assert stated_peak(torch.cuda.get_device_name(GPU)) == peak_flops(GPU, torch.bfloat16)[0]


def test_fp32_gives_the_loss_and_gradients_of_a_cpu() -> None:
    run = tiny_run()
    found = []
    for device in (torch.device("cpu"), GPU):
        task = Task(random_model(run).to(device), run)
        loss, _ = task(moved(0, device))
        loss.backward()
        found.append((loss.item(), {name: p.grad.cpu() for name, p in task.named_parameters() if p.grad is not None}))
    (cpu_loss, cpu), (gpu_loss, gpu) = found
    assert gpu_loss == pytest.approx(cpu_loss, rel=1e-5)
    for name, grad in cpu.items():
        assert (gpu[name] - grad).norm() <= 1e-4 * grad.norm() + 1e-7, name


def test_bf16_is_near() -> None:
    found = [Task(random_model(run).to(GPU), run)(moved(0, GPU))[0].item() for run in
             (tiny_run(), tiny_run(precision="bf16"))]  # fmt: skip
    assert found[1] == pytest.approx(found[0], rel=2e-2)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_every_stage_trains_the_same(kind: str) -> None:
    run = tiny_run(kind=kind)
    reference = losses(run, STAGES[0], GPU)
    assert reference[-1] < reference[0]
    for zero in [*STAGES[1:], OFFLOAD]:
        assert losses(run, zero, GPU) == pytest.approx(reference, rel=1e-3), zero


def test_compiled_trains_the_same() -> None:
    run = tiny_run()
    compiled = replace(run, train=replace(run.train, compile=True))
    assert losses(compiled, STAGES[0], GPU) == pytest.approx(losses(run, STAGES[0], GPU), rel=1e-3)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["s16", "b16"])
def test_memory_is_what_was_predicted(name: str, checkpointing: bool) -> None:
    row = compare(Case(name, 64, 112, checkpointing=checkpointing), GPU)
    assert row["predicted / measured"] == pytest.approx(1, abs=0.15)


def test_the_report_measures_towers() -> None:
    rows = towers("S/16", GPU, tiny=True)
    assert len(rows) == 4
    assert all(row["samples_per_s"] > 0 for row in rows)
