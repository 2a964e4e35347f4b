"""The benchmark compares like with like."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, run_python, tiny_batch, tiny_run

from clips.data.tokenizer import build_tokenizer
from clips.model.clips import CLIPSModel
from clips.model.layers import attention
from clips.studies import accumulation, benchmark, data_speed

CPU = torch.device("cpu")


@pytest.mark.parametrize("masked", [False, True])
def test_both_attention_kernels_compute_the_same(masked: bool) -> None:
    q, k, v = torch.randn(3, 2, 4, 9, 8, dtype=torch.float64)
    visible = (torch.arange(9) < 6).expand(2, 1, 1, 9) if masked else None
    plain = benchmark.plain_attention(q, k, v, visible)
    torch.testing.assert_close(plain, F.scaled_dot_product_attention(q, k, v, attn_mask=visible))
    torch.testing.assert_close(plain, attention(q, k, v, visible))


def test_fastest_takes_turns_and_leaves_the_warm_up_out(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls = [0.0], []
    durations = {"a": iter([0.1, 3.0, 2.0]), "b": iter([9.0, 5.0, 7.0])}
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: clock[0])

    def part(name: str) -> None:
        calls.append(name)
        clock[0] += next(durations[name])

    seconds = benchmark.fastest({name: lambda n=name: part(n) for name in durations}, 2, CPU)
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
        def recorded(batch):
            loss = loss_of(batch)
            losses.append(loss.item())
            return loss

        return original(model, recorded, device)

    monkeypatch.setattr(benchmark, "stock_step", recording)
    torch.manual_seed(0)
    for step in (
        benchmark._stock_towers(run, tokenizer, CPU, full_context=True),
        benchmark._stock_towers(run, tokenizer, CPU, full_context=False),
        benchmark._stock_coca(run, tokenizer, CPU),
    ):
        losses.clear()
        for _ in range(30):
            step(batch)
        assert losses[-1] < losses[0] - 0.05


@pytest.mark.slow
def test_chunk_command_finds_the_saving(tmp_path: Path) -> None:
    out = tmp_path / "chunk.json"
    done = run_python(ROOT / "scripts" / "benchmark.py", "chunk", "--device", "cpu", "--repeats", "1", "--out", out)
    assert done.returncode == 0, done.stderr
    whole, *chunked = json.loads(out.read_text())["rows"]
    assert all(row["peak_MB"] < 0.7 * whole["peak_MB"] for row in chunked)


@pytest.mark.slow
def test_accumulation_is_measured_to_save_memory_in_both_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accumulation, "MICRO_BATCHES", (8,))
    (row,) = accumulation.accumulation_rows(CPU, 1)
    assert (row["micro_batches"], row["samples"]) == (8, 256)
    assert row["batches_MB"] == pytest.approx(256 * (3 * 60 * 60 + 8 * (32 + 16 + 48)) / 1e6)
    for mode in ("micro", "global"):
        assert row[f"{mode}_peak_MB"] < 0.7 * row["one_batch_peak_MB"], mode
    assert row["global / micro"] * row["micro_ms"] == pytest.approx(
        row["micro_ms"] + row["extra / towers"] * row["towers_ms"]
    )


CHECKPOINT_ROW = """
import json, torch
from conftest import tiny_batch, tiny_run
from clips.common.runtime import init_distributed
from clips.data.tokenizer import build_tokenizer
from clips.studies import benchmark
def ready(name, device, demo_dir):
    init_distributed(device)
    texts = ["a cat", "a dog"] * 8
    return tiny_run(), build_tokenizer("wordpiece", texts, vocab_size=64), [tiny_batch(0), tiny_batch(1)]
benchmark._ready = ready
print(json.dumps(benchmark.checkpoint_row("tiny", torch.device("cpu"), 3, "")))
"""


@pytest.mark.slow
def test_what_a_checkpoint_stops_is_measured(tmp_path: Path) -> None:
    (tmp_path / "row.py").write_text(CHECKPOINT_ROW)
    done = run_python(tmp_path / "row.py", env={"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"})
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout.splitlines()[-1])
    assert row["MB"] > 0.1
    assert row["beside / before"] == row["stop_ms_beside"] / row["stop_ms_written_before"] > 0
    assert row["written_after_ms"] > row["stop_ms_beside"]


@pytest.mark.slow
def test_the_loader_is_measured_against_bare_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a batch takes of shared memory is its pictures' bytes and its ids."""
    monkeypatch.setattr(data_speed, "PHOTOS", ((1000, 900, 8, 8),))
    one, two = data_speed.loader_rows(1)
    assert (one["workers"], two["workers"]) == (1, 2)
    pixels = data_speed.BATCH * 3 * data_speed.SIDE**2 / 1e6
    for row in (one, two):
        assert row["lowest"] == row["loader / bare"] == row["highest"] > 0
        assert all(row[name] > 0 for name in ("bare_cpu_ms", "loader_cpu_ms", "whole_cpu_ms"))
        assert pixels < row["batch_MB"] < 1.1 * pixels
        assert row["as_float32_MB"] - row["batch_MB"] == pytest.approx(3 * pixels)


@pytest.mark.slow
def test_startup_command_opens_what_it_made(tmp_path: Path) -> None:
    out = tmp_path / "startup.json"
    done = run_python(ROOT / "scripts" / "benchmark.py", "startup", "--shards", "300", "--out", out)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [row["samples"] for row in rows] == [450] * 4


def test_unusable_flags_are_the_users_mistake() -> None:
    done = run_python(ROOT / "scripts" / "benchmark.py", "chunk", "--repeats", "0")
    assert done.returncode == 2
    assert "--repeats 0 must be at least 1" in done.stderr
