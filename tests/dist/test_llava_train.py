"""Both stages really trained: resumed against uninterrupted, one rank against two, ZeRO-3, adapters, 4 and 8 bits."""

import itertools
import json
import re
import shutil
from pathlib import Path

import pytest
import tiny_llava
import torch
from llava_worker import stop_in_step
from peft import get_peft_model
from tiny_llava import (
    ALIGN,
    INSTRUCT,
    START,
    TRAIN,
    WORKER,
    assert_same_results,
    build,
    command,
    conversation,
    launch,
    losses,
    run,
)
from tiny_mllm import write_llm
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from clips.common.errors import NotFiniteError, Stopped, UserError
from clips.common.files import MANIFEST
from clips.common.tensors import read_weights
from mllm.encoders.load import load_vision
from mllm.model.llava import build_model
from mllm.model.llm import load_llm
from mllm.model.projector import save_projector
from mllm.model.quantize import dequantize, quantize
from mllm.training.build import apply_freeze, lora_config, merge_lora, merge_quantized_lora
from mllm.training.config import StageConfig, parse_stage
from mllm.training.recipes import STAGES, freeze_table
from mllm.training.trainer import LlavaTrainer, TrainingModel

place = tiny_llava.place  # a fixture

CPU = torch.device("cpu")
CAPTIONS = ["--mm_projector_init", "captions"]
LORA = ["--lora_enable", "--lora_r", "4", "--lora_dropout", "0.2"]


RUNS = {
    "align_from_captions": [*ALIGN, *CAPTIONS],
    "lora_4bit": [*INSTRUCT, *LORA, *START, "--bits", "4"],
    "encoder_too": [*INSTRUCT, *START, "--unfreeze_mm_vision_tower", "--gradient_accumulation_steps", "2"],
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", RUNS)
def test_a_stopped_and_resumed_stage_is_bit_equal_to_an_uninterrupted_one(kind, place, monkeypatch):
    whole, broken = f"runs/{kind}-whole", f"runs/{kind}-broken"
    flags = [*RUNS[kind], "--max_steps", "9"]
    run(place, monkeypatch, *flags, "--output_dir", whole)
    with monkeypatch.context() as patch:
        patch.setattr(LlavaTrainer, "begin_step", LlavaTrainer.begin_step)  # undone at the end of the block
        stop_in_step(7)  # in the second epoch of stage 1, in the first one of stage 2
        with pytest.raises(Stopped) as stopped:
            run(place, monkeypatch, *flags, "--output_dir", broken)
    assert stopped.value.exit_code == 143
    stage = "align" if kind.startswith("align") else "instruct"
    assert (place / broken / stage / "checkpoints/step-00000007" / MANIFEST).is_file()
    assert not (place / broken / "model").exists()
    # A checkpoint that a killed run was still writing, and lines that it logged behind the checkpoint.
    (place / broken / stage / "checkpoints/step-00000009.partial").mkdir()
    with (place / broken / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"stage": stage, "step": 9, "loss": 0.0}) + '\n{"stage": "al')
    run(place, monkeypatch, *flags, "--output_dir", broken)
    assert losses(place / broken) == losses(place / whole)
    first = assert_same_results(place / whole, place / broken)
    assert "align/mm_projector.bin:model.mm_projector.0.weight" in first or stage != "align"
    start = read_weights(place / "start.bin")
    moved = first[f"{stage}/mm_projector.bin:model.mm_projector.2.weight"]
    assert stage == "align" or not torch.equal(moved, start["model.mm_projector.2.weight"])
    assert not (place / broken / stage / "checkpoints").exists()
    assert ("adapter/adapter_model.safetensors" in str(first.keys())) == ("lora" in kind)
    before = (place / broken / stage / "done.json").read_text()
    run(place, monkeypatch, *flags, "--output_dir", broken)  # finished: nothing is trained again
    assert (place / broken / stage / "done.json").read_text() == before
    with pytest.raises(UserError, match=r"learning_rate: .* → 0\.5"):
        run(place, monkeypatch, *flags, "--output_dir", broken, "--learning_rate", "0.5")


@pytest.mark.slow
def test_checkpointing_and_accumulation_change_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = [*START, "--max_steps", "4", "--group_by_modality_length", "False"]
    variants = {
        "plain": [],
        "checkpointing": ["--gradient_checkpointing"],
        "accumulation": ["--per_device_train_batch_size", "1"],
    }
    curves = {}
    for name, flags in variants.items():
        run(place, monkeypatch, *INSTRUCT, *start, *flags, "--output_dir", f"runs/variant-{name}")
        curves[name] = [loss for _, loss in losses(place / f"runs/variant-{name}")]
        assert curves[name] == pytest.approx(curves["plain"], rel=1e-5), name


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run_before_any_weight_changes(place, monkeypatch):
    original = TrainingModel.forward

    def forward(self, *arguments):
        loss, _ = original(self, *arguments)
        return loss * float("nan"), {"loss": loss.detach() * float("nan")}

    monkeypatch.setattr(TrainingModel, "forward", forward)
    with pytest.raises(NotFiniteError, match=r"(?s)step 1;.*rank 0: sample \d+ \(id \d+\.png\), sample"):
        run(place, monkeypatch, *ALIGN, "--output_dir", "runs/nan")
    assert not list((place / "runs/nan/align").glob("checkpoints/*"))


def test_with_save_steps_0_a_stage_saves_at_its_end_only(place, monkeypatch):
    run(place, monkeypatch, *ALIGN, "--max_steps", "2", "--save_steps", "0", "--output_dir", "runs/once")
    assert (place / "runs/once/align/done.json").is_file()


def test_the_short_last_step_of_an_epoch_counts_the_samples_that_it_has(place, monkeypatch):
    """20 samples in steps of 8, two epochs: in the plan, the log and done.json, also after a resume."""
    flags = [*ALIGN, "--batch_size", "8", "--output_dir", "runs/short", "--save_steps", "2"]
    with monkeypatch.context() as patch:
        patch.setattr(LlavaTrainer, "begin_step", LlavaTrainer.begin_step)  # undone at the end of the block
        stop_in_step(4)
        output = command(place, monkeypatch, "train_llava", *flags, code=143)
    assert "= 40 samples, 2.0 epochs" in output
    assert (place / "runs/short/align/checkpoints/step-00000002").is_dir()
    run(place, monkeypatch, *flags)
    lines = [json.loads(line) for line in (place / "runs/short/metrics.jsonl").read_text().splitlines()]
    assert [line["samples"] for line in lines] == [8, 16, 20, 28, 36, 40]
    assert json.loads((place / "runs/short/align/done.json").read_text())["samples"] == 40


def test_stage_two_does_not_take_a_projector_made_for_other_parts(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = ["--output_dir", "runs/mixed"]
    run(place, monkeypatch, *ALIGN, *out, "--max_steps", "1")
    with pytest.raises(UserError, match=r"with other settings:\n  vision tower's weights: \"\w+\" → \"\w+\""):
        run(place, monkeypatch, *INSTRUCT, *out, "--vision", "random")
    assert not (place / "runs/mixed/instruct").exists()
    (place / "runs/mixed/align/done.json").unlink()  # stage 1 was started anew, and killed
    with pytest.raises(UserError, match=r"there is no runs/mixed/align/done\.json: stage 1 has not finished"):
        run(place, monkeypatch, *INSTRUCT, *out)


ZERO2 = {"sub_group_size": 1e9, "reduce_bucket_size": "auto"}
ZERO3 = ZERO2 | {f"stage3_{name}": "auto" for name in ("prefetch_bucket_size", "param_persistence_threshold")}
ZERO3 |= {"stage3_max_live_parameters": 1e9, "stage3_max_reuse_distance": 1e9, "stage": 3}
OFFLOAD = {f"offload_{what}": {"device": "cpu", "pin_memory": True} for what in ("optimizer", "param")}
LLAVA_ZERO = {  # LLaVA's scripts/zero2.json and zero3_offload.json
    "zero2": ZERO2 | {"stage": 2},
    "zero3_offload": ZERO3 | OFFLOAD | {"gather_16bit_weights_on_model_save": True},
}


def llava_zero(path: Path, name: str, **changes: object) -> str:
    """Write LLaVA's DeepSpeed file `name`, with `changes`."""
    loss_scale = {"loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2}
    config: dict[str, object] = {
        "fp16": {"enabled": "auto", "min_loss_scale": 1, **loss_scale},
        "bf16": {"enabled": "auto"},
        "train_micro_batch_size_per_gpu": "auto",
        "train_batch_size": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_optimization": {"overlap_comm": True, "contiguous_gradients": True, **LLAVA_ZERO[name]},
    }
    if name == "zero3_offload":
        optimizer = dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")
        scheduler = dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "warmup_num_steps"), "auto")
        config |= {
            "optimizer": {"type": "AdamW", "params": optimizer},
            "scheduler": {"type": "WarmupLR", "params": scheduler},
            "gradient_clipping": "auto",
            "steps_per_print": 1e5,
            "wall_clock_breakdown": False,
        }
    path.write_text(json.dumps(config | changes), encoding="utf-8")
    return str(path)


ZERO_LORA = [*INSTRUCT, *START, "--lora_enable", "--lora_r", "4", "--lora_dropout", "0", "--max_steps", "4"]
TWO_RANKS = {  # name → flags, and the DeepSpeed file; without it the stage's own
    "align": ([*ALIGN, *CAPTIONS, "--max_steps", "4"], None),
    "lora": (ZERO_LORA, None),
    "tiles": ([*INSTRUCT, *START, "--max_steps", "2", "--image_aspect_ratio", "anyres"], None),
    "words_frozen": ([*INSTRUCT, *START, "--max_steps", "2", "--freeze_word_embeddings"], None),
    "zero2": ([*INSTRUCT, *START, "--max_steps", "3", "--freeze_word_embeddings"], "zero2"),
    "zero3_offload": ([*INSTRUCT, *START, "--max_steps", "3"], "zero3_offload"),
}


@pytest.fixture(scope="module")
def two_ranks(place: Path) -> Path:
    """`place` with every run of TWO_RANKS by two ranks, all started together; LLaVA's files are first run dry."""
    runs = []
    for name, (flags, engine) in TWO_RANKS.items():
        words = [*flags, "--output_dir", f"runs/{name}-two"]
        if engine is not None:
            words += ["--deepspeed", llava_zero(place / f"{engine}.json", engine)]
            runs.append([*words, "--dry-run"])
        runs.append(words)
    words = itertools.chain.from_iterable([*run_words, "+"] for run_words in runs)
    done = launch(place, WORKER, "each", "0", *list(words)[:-1])
    assert done.returncode == 0, done.stderr[-3000:]
    return place


@pytest.mark.slow
@pytest.mark.parametrize("name", TWO_RANKS)
def test_two_ranks_leave_what_one_rank_leaves(name: str, two_ranks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under ZeRO-2, ZeRO-3 and LLaVA's own DeepSpeed files, against one rank without DeepSpeed."""
    flags, engine = TWO_RANKS[name]
    run(two_ranks, monkeypatch, *flags, "--output_dir", f"runs/{name}-one")
    one, two = (losses(two_ranks / f"runs/{name}-{ranks}") for ranks in ("one", "two"))
    assert [loss for _, loss in two] == pytest.approx([loss for _, loss in one], rel=2e-4)
    if engine is None:
        assert_same_results(two_ranks / f"runs/{name}-two", two_ranks / f"runs/{name}-one", 2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero2", "zero3", "zero2, bf16"])
def test_a_stage_of_two_ranks_goes_on_with_two_one_and_four(
    engine: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With as many ranks bit for bit; the last step of each epoch has fewer samples than ranks."""
    name = engine.replace(", ", "-")
    flags = [*(ALIGN if "zero2" in engine else [*INSTRUCT, *START]), "--max_steps", "6", "--save_steps", "2"]
    flags += ["--per_device_train_batch_size", "1", "--batch_size", "4", "--gradient_accumulation_steps"]
    more = ["--bf16", "True"] if "bf16" in engine else []
    whole = place / f"runs/{name}"
    done = launch(place, WORKER, "keep", "2", *flags, "2", *more, "--output_dir", str(whole))
    assert done.returncode == 0, done.stderr[-3000:]
    expected = [loss for _, loss in losses(whole)]
    for ranks in (2, 4):
        target = shutil.copytree(whole.with_name(f"{name}-kept"), place / f"runs/{name}-{ranks}")
        done = launch(place, TRAIN, *flags, str(4 // ranks), *more, "--output_dir", str(target), ranks=ranks)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "goes on from" in done.stderr
        found = [loss for _, loss in losses(target)]
        assert found == expected if ranks == 2 else found == pytest.approx(expected, rel=2e-2 if more else 2e-4)
        if ranks == 2:
            assert_same_results(target, whole)
    alone = shutil.copytree(whole.with_name(f"{name}-kept"), place / f"runs/{name}-1")
    run(place, monkeypatch, *flags, "4", *more, "--output_dir", f"runs/{name}-1")
    assert [loss for _, loss in losses(alone)] == pytest.approx(expected, rel=2e-2 if more else 2e-4)


@pytest.mark.slow
def test_under_zero3_no_rank_holds_the_whole_model(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading, training, a checkpoint and the result, of a model of 20 layers. Both ranks held all of it, in the end.

    Counted is memory of the process's own (RssAnon). Pages of the weight files are shared by all ranks, and the system
    takes them back when it needs to.
    """
    write_llm(place / "deep", num_hidden_layers=20, hidden_size=512, intermediate_size=2048, initializer_range=0.02)
    whole = sum(path.stat().st_size for path in (place / "deep").glob("*.safetensors")) / 2**20
    keeps = {"stage3_max_live_parameters": 1e6, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
    engine = {"zero_optimization": {"stage": 3, **keeps}}
    (place / "deep.json").write_text(json.dumps(engine))
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")  # freed memory is not kept
    flags = [*INSTRUCT, "--model_name_or_path", "deep", "--pretrain_mm_mlp_adapter", "deep.bin", "--freeze_backbone"]
    flags += ["--gradient_checkpointing", "True"]  # the default on GPUs; else the graph of a step keeps every layer
    llava = build_model(load_vision("clips", runs=place / "runs"), load_llm(str(place / "deep")))[0]
    save_projector(llava.model.multi_modal_projector, place / "deep.bin")
    flags += ["--max_steps", "2", "--deepspeed", "deep.json", "--output_dir", "runs/deep"]
    done = launch(place, WORKER, "memory", "0", *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    peaks = {int(rank): int(mb) for rank, mb in re.findall(r"rank (\d) took (\d+) MB", done.stdout)}
    assert peaks.keys() == {0, 1}
    assert max(peaks.values()) < 0.7 * whole, (peaks, whole)
    trained, before = (
        read_weights(place / "runs/deep/model/model.safetensors"),
        read_weights(place / "deep/model.safetensors"),
    )
    assert torch.equal(
        trained["language_model.model.layers.19.mlp.up_proj.weight"], before["model.layers.19.mlp.up_proj.weight"]
    )
    assert not list((place / "runs/deep").glob("tmp*"))


def batch(model: LlavaForConditionalGeneration) -> dict[str, Tensor]:
    image_id = model.config.image_token_id
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 250, (2, 24), generator=generator)
    ids[:, 1:17] = image_id
    labels = ids.masked_fill(torch.arange(24) < 18, -100)
    pixels = torch.randn(2, 3, 32, 32, generator=generator)
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def adapted(model: LlavaForConditionalGeneration, arguments: StageConfig) -> nn.Module:
    """The model with adapters that do something (both factors random)."""
    model = get_peft_model(model, lora_config(model, arguments))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    apply_freeze(model, freeze_table(STAGES[2], lora=True))
    return model


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    training = TrainingModel(model, features=False).train()
    training(batch(training.llava))[0].backward()
    return {name: p.grad.clone() for name, p in training.model.named_parameters() if p.requires_grad}


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    inputs = {key: value for key, value in batch(model).items() if key != "labels"}
    return model.eval()(**inputs).logits


@pytest.fixture
def arguments() -> StageConfig:
    return parse_stage([*INSTRUCT, *LORA[:3], "--lora_alpha", "8", "--lora_dropout", "0"])


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_gradients_are_those_of_the_dequantised_model_also_after_an_evaluation(bits, place, arguments):
    model = build(place)
    original = model.model.language_model.layers[0].self_attn.q_proj.weight.detach().clone()
    quantize(model.model.language_model, bits, torch.float32, CPU)
    reference = build(place)
    quantize(reference.model.language_model, bits, torch.float32, CPU)
    dequantize(reference, torch.float32)
    restored = reference.model.language_model.layers[0].self_attn.q_proj.weight
    error = (restored - original).norm() / original.norm()
    assert 1e-4 < error < (0.15 if bits == 4 else 0.02)
    model, reference = adapted(model, arguments), adapted(reference, arguments)
    expected = gradients(reference)
    fresh = gradients(model)
    logits(model.get_base_model())  # bitsandbytes would repack the weights here, see mllm/model/quantize.py
    after = gradients(model)
    assert fresh.keys() == after.keys() == expected.keys()
    tolerance = 1e-4 if bits == 4 else 0.06  # int8 also rounds the activations
    for name, gradient in expected.items():
        for state in (fresh, after):
            difference = (state[name] - gradient).norm() / gradient.norm().clamp_min(1e-12)
            assert difference < tolerance, (name, float(difference))
    assert max(float(g.norm()) for g in expected.values()) > 1e-3


@pytest.mark.parametrize("bits", [4, 16])
def test_merged_adapters_compute_what_was_trained(bits: int, place: Path, arguments: StageConfig) -> None:
    model = build(place)
    plain = logits(model)
    if bits < 16:
        quantize(model.model.language_model, bits, torch.float32, CPU)
    model = adapted(model, arguments)
    before = logits(model.get_base_model())
    assert (before - plain).abs().max() > 0.1  # else a merge that does nothing would pass
    merged = merge_lora(model) if bits == 16 else merge_quantized_lora(model, torch.float32)
    assert isinstance(merged, LlavaForConditionalGeneration)
    assert all(type(m) is nn.Linear for n, m in merged.named_modules() if n.endswith("_proj"))
    difference = (logits(merged) - before).norm() / before.norm()
    assert difference < 1e-4


def test_a_layer_that_bitsandbytes_quantises_wrongly_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Version 0.50 gets 4-bit rows wrong on CPUs whose length is no multiple of 64; whatever it is, it is noticed."""
    layer = nn.Sequential(nn.Linear(48, 24, bias=False))
    torch.nn.init.normal_(layer[0].weight)
    monkeypatch.setattr("mllm.model.quantize.dequantize_bnb_weight", lambda weight, state: torch.randn(24, 48))
    with pytest.raises(UserError, match=r"4 bits: .*layer 0 \(24, 48\)"):
        quantize(layer, 4, torch.float32, CPU)


@pytest.mark.parametrize("tokens", ["patch", "cls_patch"])
def test_the_projectors_start_is_named_and_the_same_for_every_encoder(
    tokens: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the tokens are no square grid. The learning rate is 0, so the file holds the start."""
    captions = ["A red cat", "Two dogs in an image"] * 10
    images = sorted(path.name for path in (place / "images").iterdir())
    samples = [conversation(name, [("What?", text)]) for name, text in zip(images, captions, strict=True)]
    (place / "captions.json").write_text(json.dumps(samples))
    flags = [*ALIGN, "--data_path", "captions.json", "--mm_vision_select_feature", tokens]
    flags += ["--learning_rate", "0", "--max_steps", "1"]
    names = {
        "random": "random, seed 0",
        "ridge": "ridge fit on the captions of 20 samples, which takes",
        "captions": "ridge fit and 300 whole-caption steps on the captions of 20 samples, which takes",
    }
    starts = {}
    for init, name in names.items():
        out = f"runs/start-{tokens}-{init}"
        output = command(place, monkeypatch, "train_llava", *flags, "--mm_projector_init", init, "--output_dir", out)
        assert name in output
        starts[init] = read_weights(place / out / "align/mm_projector.bin")["model.mm_projector.2.weight"]
    for a, b in itertools.combinations(starts, 2):
        assert not torch.equal(starts[a], starts[b])
