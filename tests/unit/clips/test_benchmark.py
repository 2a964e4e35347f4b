"""The benchmark compares like with like."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_batch, tiny_run
from lab_runs import run_main

from clips.data.tokenizer import build_tokenizer
from clips.model.clips import CLIPSModel
from clips.model.layers import attention
from clips.studies import benchmark, measuring

CPU = torch.device("cpu")


@pytest.mark.parametrize("masked", [False, True])
def test_both_attention_kernels_compute_the_same(masked: bool) -> None:
    q, k, v = torch.randn(3, 2, 4, 9, 8, dtype=torch.float64)
    visible = (torch.arange(9) < 6).expand(2, 1, 1, 9) if masked else None
    stock = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
    torch.testing.assert_close(attention(q, k, v, visible), stock)
    plain = attention(*(x.bfloat16() for x in (q, k, v)), visible)  # a CPU computes short ones by plain products
    torch.testing.assert_close(plain.double(), stock, atol=2e-2, rtol=2e-2)


def test_fastest_takes_turns_and_leaves_the_warm_up_out(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls = [0.0], []
    durations = {"a": iter([0.1, 3.0, 2.0]), "b": iter([9.0, 5.0, 7.0])}
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: clock[0])

    def part(name: str) -> None:
        calls.append(name)
        clock[0] += next(durations[name])

    seconds = measuring.fastest({name: lambda n=name: part(n) for name in durations}, 2, CPU)
    assert calls == ["a", "b"] * 3
    assert seconds == pytest.approx({"a": 2.0, "b": 5.0})


@pytest.mark.parametrize("name", benchmark.SETTINGS)
def test_the_stock_towers_are_as_large_as_ours(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainable parameters differ by the patch bias, which open_clip lacks, and the text's CLS, with us a token."""
    run = benchmark.setting(name, CPU, "unused")
    built = []
    monkeypatch.setattr(benchmark, "stock_step", lambda model, loss_of, device: built.append(model))
    tokenizer = build_tokenizer("bert")
    with torch.device("meta"):
        ours = CLIPSModel(run.model, pad_id=0).parameter_counts()
        benchmark._stock_towers(run, tokenizer, CPU, full_context=True)
    stock = sum(p.numel() for p in built[0].parameters() if p.requires_grad)
    width, text_width = run.model.vision.width, run.model.text.width
    assert stock + width - text_width == ours["total"] - ours["captioner"]


def test_stock_steps_train(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each stock step lowers its own loss on one batch."""
    run = tiny_run()
    batch = tiny_batch(0) | {"images": torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)}
    vision = replace(run.model.vision, width=48)  # another width than the decoder's, as in B/16
    run = replace(run, model=replace(run.model, vision=vision))
    tokenizer = build_tokenizer("bert")
    losses = []
    original = benchmark.stock_step

    def recording(model: torch.nn.Module, loss_of, device: torch.device):
        return original(model, lambda batch: losses.append(loss_of(batch)) or losses[-1], device)

    monkeypatch.setattr(benchmark, "stock_step", recording)
    torch.manual_seed(0)
    for step in (
        benchmark._stock_towers(run, tokenizer, CPU, full_context=True),
        benchmark._stock_towers(run, tokenizer, CPU, full_context=False),
    ):
        losses.clear()
        for _ in range(30):
            step(batch)
        assert losses[-1] < losses[0] - 0.05


def test_unusable_flags_are_the_users_mistake(monkeypatch, capsys) -> None:
    assert run_main(monkeypatch, "benchmark", "train", "--repeats", "0") == 2
    assert "--repeats 0 must be at least 1" in capsys.readouterr().err
