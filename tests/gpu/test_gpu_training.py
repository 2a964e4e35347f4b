"""Pretraining on a GPU: what a CPU computes, every ZeRO stage, compiled, within the memory that was predicted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from conftest import random_model, tiny_batch, tiny_run
from torch.nn.attention import SDPBackend, sdpa_kernel

from clips.common.distributed import init_distributed
from clips.config import RunConfig
from clips.data.loader import counted
from clips.engine.metrics import peak_flops
from clips.model.captioner import caption_mask
from clips.model.clips import CLIPSModel
from clips.model.layers import attention
from clips.recipes import PRESETS, recipe
from clips.training.optim import make_engine
from clips.training.prepare import full_batch
from clips.training.rehearsal import rehearse
from clips.training.trainer import Task, rates_of
from tools.benchmark import optimizer_step

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


def losses(run: RunConfig, zero: dict, device: torch.device) -> list[float]:
    init_distributed(device)
    engine = make_engine(Task(random_model(run), run.task, run.train), run, device, {"zero_optimization": dict(zero)})
    engine.set_rates(rates_of(1e-2, 2e-2))
    values = []
    for step in range(4):
        agreed = optimizer_step(engine, [moved(step, device)])
        assert agreed.finite
        values.append(agreed.loss)
    return values


def test_its_peak_is_known() -> None:
    assert peak_flops(GPU, print) is not None


def test_fp32_gives_the_loss_and_gradients_of_a_cpu() -> None:
    run = tiny_run()
    results = []
    for device in (torch.device("cpu"), GPU):
        task = Task(random_model(run).to(device), run.task, run.train)
        loss, _ = task(moved(0, device))
        loss.backward()
        results.append((loss.item(), {name: p.grad.cpu() for name, p in task.named_parameters() if p.grad is not None}))
    (cpu_loss, cpu), (gpu_loss, gpu) = results
    assert gpu_loss == pytest.approx(cpu_loss, rel=1e-5)
    for name, grad in cpu.items():
        assert (gpu[name] - grad).norm() <= 1e-4 * grad.norm() + 1e-7, name


def test_bf16_is_near() -> None:
    losses = [Task(random_model(run).to(GPU), run.task, run.train)(moved(0, GPU))[0].item() for run in
             (tiny_run(), tiny_run(precision="bf16"))]  # fmt: skip
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_every_stage_trains_the_same(kind: str) -> None:
    run = tiny_run(kind=kind)
    reference = losses(run, STAGES[0], GPU)
    assert reference[-1] < reference[0]
    for zero in [*STAGES[1:], OFFLOAD]:
        assert losses(run, zero, GPU) == pytest.approx(reference, rel=1e-3), zero


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_step_waits_for_the_device_where_ranks_agree_and_nowhere_else(kind: str) -> None:
    init_distributed(GPU)
    run = tiny_run(kind=kind)
    engine = make_engine(Task(random_model(run), run.task, run.train), run, GPU, {"zero_optimization": {"stage": 0}})
    engine.set_rates(rates_of(1e-2, 2e-2))
    on_device = {**counted(tiny_batch(0), run.model, 0), **moved(0, GPU)}
    agree = engine.agree

    def agree_and_wait(*arguments: object, **options: object) -> object:
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("default")
        agreed = agree(*arguments, **options)
        torch.cuda.set_sync_debug_mode(mode)
        return agreed

    engine.agree = agree_and_wait
    try:
        for step in range(4):
            torch.cuda.set_sync_debug_mode("error" if step else "default")  # the first step makes what stays
            assert optimizer_step(engine, [on_device]).finite
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["S/16", "B/16", "L/14", "H/14"])
def test_masked_attention_has_a_fused_kernel(name: str) -> None:
    """scaled_dot_product_attention fails where plain products are forbidden and no other kernel takes the mask."""
    model, B = PRESETS[name], 8
    text, captioner = model.text, model.captioner
    assert captioner is not None
    for slots in (text.context_length, 37, 22):  # texts are as long as the longest of their batch
        visible = torch.arange(slots, device=GPU) < torch.randint(3, slots, (B, 1), device=GPU)
        masks = {(text.heads, text.width): visible[:, None, None, :]}
        patches, positions = model.vision.tokens(112 - 112 % model.vision.patch_size), captioner.length - 1
        mask = caption_mask(patches + slots - 1, positions, visible[:, :-1], GPU)
        for (heads, width), shown in [*masks.items(), ((captioner.heads, captioner.width), mask)]:
            L = shown.shape[-1]
            q, k, v = (torch.randn(B, heads, L, width // heads, device=GPU, dtype=torch.bfloat16) for _ in range(3))
            inputs = [x.requires_grad_() for x in (q, k, v)]
            with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]):
                fused = attention(*inputs, shown)
                gradients = torch.autograd.grad(fused.float().pow(2).sum(), inputs)
            exact = [x.detach().float().requires_grad_() for x in inputs]
            with sdpa_kernel(SDPBackend.MATH):
                plain = attention(*exact, shown)
            wanted = torch.autograd.grad(plain.pow(2).sum(), exact)
            for a, b in zip([fused, *gradients], [plain, *wanted], strict=True):
                assert (a.float() - b).norm() <= 2e-2 * b.norm(), (name, L, heads)


def test_compiled_trains_the_same() -> None:
    run = tiny_run()
    compiled = replace(run, train=replace(run.train, compile=True))
    assert losses(compiled, STAGES[0], GPU) == pytest.approx(losses(run, STAGES[0], GPU), rel=1e-3)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["s16", "b16"])
def test_memory_is_what_was_predicted(name: str, checkpointing: bool) -> None:
    run = recipe(name).override(
        ["train.precision=bf16", f"train.activation_checkpointing={str(checkpointing).lower()}"]
    )
    phase = replace(run.phases[0], batch_size=64, samples=64, image_size=112, warmup_samples=0)
    run = replace(run, phases=(phase,))
    init_distributed(GPU)
    torch.cuda.reset_peak_memory_stats(GPU)
    before = torch.cuda.memory_allocated(GPU)
    model = CLIPSModel(run.model, pad_id=0)
    model.visual.set_image_size(112)
    engine = make_engine(Task(model, run.task, run.train), run, GPU, {"zero_optimization": {"stage": 0}})
    for _ in range(2):  # the second step has the optimizer's state of the first
        optimizer_step(engine, [full_batch(run.model, run.task, 112, 64, torch.device("cpu"))])
    measured = torch.cuda.max_memory_allocated(GPU) - before
    assert rehearse(run, phase, 1).on_rank({"stage": 0}, 1) == pytest.approx(measured, rel=0.15)
