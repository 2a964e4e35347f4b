"""LLaVA's steps at published sizes, rehearsed for a GPU: no wait, one device, and the plan's memory and FLOPs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch import Tensor
from transformers import DynamicCache

from clips.common.rehearsal import META, Rehearsal
from mllm.evaluation.batches import pixel_inputs
from mllm.model.flops import LlavaFlops, LlavaShape
from mllm.model.load import CACHE
from mllm.model.packing import pairs_of
from mllm.model.tiles import Layout
from mllm.training.freeze import llava_of
from mllm.training.plan import ANSWERS, LANGUAGE_MODELS, WORDS, StepBytes
from mllm.training.rehearsal import TOWER, agreements, batch_of, made, planned, stepped

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "stage", "lora", "checkpointing"),
    [
        ("smollm2-135m", 2, False, False),
        ("vicuna-7b", 1, False, False),
        ("vicuna-7b", 2, False, True),
        ("llama3-8b", 2, False, True),
        ("qwen2.5-7b", 2, False, False),
        ("qwen2.5-7b", 2, True, True),
    ],
)
def test_a_step_needs_what_the_plan_says(name: str, stage: int, lora: bool, checkpointing: bool) -> None:
    """Memory of a rank and its activations within 2 %; without checkpointing torch's FLOPs within 1 %."""
    training, arguments = made(name, stage, lora=lora, checkpointing=checkpointing)
    batch = batch_of(training, 4)
    rehearsal, there = stepped(training, batch)
    activations = planned(training, arguments)
    assert there + activations == pytest.approx(rehearsal.peak, rel=0.02)
    assert activations == pytest.approx(rehearsal.peak - there, rel=0.02)
    if not checkpointing:
        flops = LlavaFlops(training.llava, image_size=336, image_tokens=576, features=False)
        counts = batch["counts"]
        pairs = pairs_of(4, 576 + WORDS[2], counts.shared)
        parts = flops.parts(pictures=4, positions=counts.row, pairs=pairs, predicted=counts.learned)
        assert sum(parts.values()) == pytest.approx(rehearsal.flops, rel=0.01)


def test_the_table_of_the_docs_is_what_the_command_prints() -> None:
    """Two of its rows."""
    page = (ROOT / "docs" / "planning.md").read_text()
    assert [f"| {' | '.join(row)} |" in page for row in agreements(("smollm2-135m",))] == [True, True]


@pytest.mark.parametrize(("stage", "samples", "padded"), [(1, 4, True), (2, 4, True), (2, 1, False)])
def test_masks_of_attention_and_repeated_keys_are_planned(
    stage: int, samples: int, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without checkpointing every layer keeps them, which a small model feels most. A sample alone needs neither."""
    monkeypatch.setattr("transformers.masking_utils.is_tracing", lambda tensor: padded)
    training, arguments = made("smollm2-135m", stage, lora=False, checkpointing=False, padded=padded)
    rehearsal, there = stepped(training, batch_of(training, samples))
    arguments = replace(arguments, per_device_train_batch_size=samples)
    assert planned(training, arguments) == pytest.approx(rehearsal.peak - there, rel=0.02)


@pytest.mark.parametrize(("bits", "stage", "checkpointing"), [(4, 2, True), (4, 2, False), (8, 2, True), (8, 1, True)])
def test_a_step_in_few_bits_needs_what_the_plan_says(
    bits: int, stage: int, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bitsandbytes knows the shapes of its kernels on "meta". Two of them hide what they need on a GPU, so they are
    written out here as its CUDA backend has them; nor does it quantise on "meta" of itself.
    """
    bnb = pytest.importorskip("bitsandbytes")
    ops = torch.ops.bitsandbytes

    def gemm_4bit(
        x: Tensor, w: Tensor, shape: list[int], scales: Tensor, *how: Any, bias: Any, **double: Any
    ) -> Tensor:
        scales = torch.empty_like(double["absmax_8bit"], dtype=torch.float32)
        return F.linear(x, ops.dequantize_4bit(w, scales, *how, shape, x.dtype), bias)

    def int8_scaled_mm(x: Tensor, w: Tensor, rows: Tensor, columns: Tensor, bias: Any, dtype: torch.dtype) -> Tensor:
        return ops.int8_mm_dequant(ops.int8_linear_matmul(x, w), rows, columns, torch.float16, bias).to(dtype)

    monkeypatch.setattr(ops.gemm_4bit, "default", gemm_4bit)
    monkeypatch.setattr(ops.int8_scaled_mm, "default", int8_scaled_mm)
    for kind in (bnb.nn.Params4bit, bnb.nn.Int8Params):
        monkeypatch.setattr(kind, "to", lambda w, *_, **__: w if w.itemsize == 1 else w._quantize(META))
    monkeypatch.setattr("mllm.model.quantize._check", lambda *_: None)
    monkeypatch.setattr("bitsandbytes.functional.name2qmap", {})  # what it keeps of "meta" goes with this test
    monkeypatch.setitem(LANGUAGE_MODELS["qwen2.5-7b"], "num_hidden_layers", 4)  # full width, for all layers are alike
    training, arguments = made("qwen2.5-7b", stage, lora=stage == 2, checkpointing=checkpointing, bits=bits)
    rehearsal, there = stepped(training, batch_of(training, 4))
    assert planned(training, replace(arguments, bits=bits)) == pytest.approx(rehearsal.peak - there, rel=0.03)


@pytest.mark.parametrize(("frames", "features"), [(0, True), (32, True), (32, False)])
def test_tiles_and_videos_need_what_the_plan_says(frames: int, features: bool) -> None:
    """Their tokens make the row longer, and the projector keeps every square. An encoder that sees 32 frames of each
    sample needs more than all that follows.
    """
    sees = {"tiles": "2x2", "frames": frames}
    training, arguments = made("smollm2-135m", 1, lora=False, checkpointing=True, sees=sees, features=features)
    batch = batch_of(training, 4)
    rehearsal, there = stepped(training, batch)
    layout = Layout.of(training.llava.config)
    there -= batch["image_features"].nbytes if features else 0  # the plan counts them among the activations
    step = StepBytes.of(training.llava, arguments, length=layout.most + WORDS[2], learned=ANSWERS[2])
    assert planned(training, arguments) == pytest.approx(rehearsal.peak - there, rel=0.05)
    assert (planned(training, arguments) == step.tower) == (not features)


@pytest.mark.parametrize("kind", ["features", "text", "tower", "padded"])
def test_no_kind_of_batch_waits(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """But one: for models that train padded, transformers looks for padding itself."""
    monkeypatch.setattr("transformers.masking_utils.is_tracing", lambda tensor: kind == "padded")
    training, _ = made("smollm2-135m", 2, lora=False, checkpointing=True, **({} if kind == "text" else {kind: True}))
    rehearsal, _ = stepped(training, batch_of(training, 4, pictures=kind != "text"))
    assert rehearsal.flops > 0
    trained = {name for name, p in training.named_parameters() if p.grad is not None}
    assert any("vision_tower" in name for name in trained) == (kind == "tower")


@pytest.mark.parametrize("tiles", [None, "2x2"])
def test_adapters_merge_and_the_merged_model_answers_about_a_picture(
    tiles: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As chat and evaluation ask it: the stock forward pass with the arguments of `pixel_inputs`, up to the logits of
    two tokens.

    The rest of `generate` reads from the device by design: it looks for padding, draws tokens, and streams them. The
    stock class once compares the numbers of placeholders and tokens, which is a read too and is left out here.
    """
    for kind in ("llava", "llava_next"):
        monkeypatch.setattr(f"transformers.models.{kind}.modeling_{kind}.torch_compilable_check", lambda *_: None)
    training, _ = made("llama3-8b", 2, lora=True, checkpointing=False, sees={"tiles": tiles})
    llava: Any = llava_of(training.model).eval()
    layout, text, side = Layout.of(llava.config), llava.config.get_text_config(), TOWER["image_size"]
    ids = torch.full((1, layout.most + 40), 7)
    ids[:, 10 : 10 + layout.most] = llava.config.image_token_id
    squares = torch.empty(layout.most_squares, 3, side, side, device=META)
    inputs = pixel_inputs([(squares, layout.sizes[0] if tiles else (side, side))], llava)
    ids, cache = ids.to(META), DynamicCache(config=text)
    with Rehearsal() as rehearsal, torch.no_grad():
        for module in training.model.modules():
            if hasattr(module, "merge") and hasattr(module, "get_base_layer"):
                module.merge()
        llava.model.language_model.set_attn_implementation("sdpa")
        merging = rehearsal.flops
        first = llava(input_ids=ids, **inputs, **{CACHE: cache}, use_cache=True, logits_to_keep=1)
        reading = rehearsal.flops - merging
        following = first.logits[:, -1].argmax(-1, keepdim=True)
        second = llava(input_ids=following, **{CACHE: cache}, use_cache=True, logits_to_keep=1)
    assert first.logits.shape == second.logits.shape == (1, 1, text.vocab_size)
    assert cache.get_seq_length() == ids.shape[1] + 1
    flops = LlavaFlops(llava.requires_grad_(False), image_size=side, image_tokens=layout.square, features=False)
    shape = LlavaShape(samples=1, length=ids.shape[1], pictures=layout.most_squares, predicted=1)
    adapters = sum(2 * p.numel() * ids.shape[1] for name, p in llava.named_parameters() if ".lora_" in name)
    assert sum(flops(shape).values()) - adapters == pytest.approx(reading, rel=0.01)
