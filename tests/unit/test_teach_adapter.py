"""The learner: a language model is taught on imagined scenes, and its adapter becomes a part of a stock model."""

import itertools
import random
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_mllm import write_llm
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from clips import PLACES
from clips.common.errors import UserError
from clips.common.files import read_json, sha256, write_json
from clips.common.tensors import read_weights, write_weights
from mllm.model.llm import ADAPTER, LanguageModel, load_llm
from mllm.training.recipes import DEMO_LAYERS
from tools import teach_adapter
from tools.teach_adapter import GRID, KINDS, PLACES_OF_CELLS, Imagination, Learner, Sample

WORDS = ("image", "cat", "dogs", "red")


@pytest.fixture(scope="module")
def llm_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.1}
    return write_llm(tmp_path_factory.mktemp("learner") / "llm", num_hidden_layers=3, **options)


def cut_model(path: Path, adapter: Path | str = "none") -> LanguageModel:
    return load_llm(str(path), layers="1,1", llm_adapter=str(adapter))


def loss(learner: Learner, samples: Sequence[Sample]) -> Tensor:
    logits, tokens, _ = learner.predict(samples)
    return cross_entropy(logits, tokens)


@pytest.mark.slow
def test_a_taught_adapter_is_merged_into_a_model_that_stock_libraries_open(llm_path, tmp_path, monkeypatch):
    monkeypatch.setattr(teach_adapter, "WARMUP", 2)
    monkeypatch.setattr(teach_adapter, "EVERY", 160)
    flags = SimpleNamespace(output=tmp_path, layers="1,1", samples=160, seed=0, rank=32, questions=2)
    learner, rng = Learner(cut_model(llm_path)), random.Random(1)
    imagination = Imagination(learner.llm, held_out=False, words=WORDS)
    samples = [imagination.sample("is_value", rng) for _ in range(8)]
    before = loss(learner, samples)
    teach_adapter.teach(learner, flags, WORDS)
    assert loss(learner, samples) < before - 1
    taught = loss(learner, samples)
    teach_adapter.save(learner, flags, WORDS)
    adapter = tmp_path / "adapter"
    facts = read_json(adapter / "taught.json")
    assert facts["sha256"] == sha256(adapter / "adapter_model.safetensors")
    assert facts["rank"] == 32

    merged = cut_model(llm_path, adapter)
    assert merged.source.endswith(f"(--llm_adapter {adapter})")
    merged.model.save_pretrained(tmp_path / "merged")
    ids = torch.tensor([[5, 6, 7, 8]])
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    by_peft = PeftModel.from_pretrained(cut_model(llm_path).model, str(adapter))
    for model in (stock, by_peft):
        torch.testing.assert_close(model(ids).logits, merged.model(ids).logits)
    for name, weight in learner.weights.items():
        torch.testing.assert_close(merged.model.get_parameter(f"{name}.weight"), weight)
    assert loss(learner, samples) < taught + 0.3 * (before - taught), "half of the rank keeps most"
    with pytest.raises(UserError, match=r"not of these layers.*layers\.2"):
        load_llm(str(llm_path), llm_adapter=str(adapter))


@pytest.fixture
def adapter(llm_path: Path, tmp_path: Path) -> Path:
    """A random adapter of rank 2 for the two layers of `cut_model`, as PEFT and tools/teach_adapter.py write one."""
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    wrapped = get_peft_model(cut_model(llm_path).model, config)
    for name, weight in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight)
    wrapped.save_pretrained(tmp_path, save_embedding_layers=False)
    facts = {"layers": "1,1", "sha256": sha256(tmp_path / "adapter_model.safetensors")}
    write_json(tmp_path / "taught.json", facts)
    return tmp_path


def test_an_adapter_is_merged_as_peft_merges_it(llm_path: Path, adapter: Path) -> None:
    by_peft: Any = PeftModel.from_pretrained(cut_model(llm_path).model, str(adapter))
    merged, plain = cut_model(llm_path, adapter).model.state_dict(), cut_model(llm_path).model.state_dict()
    for name, weight in by_peft.merge_and_unload().state_dict().items():
        torch.testing.assert_close(merged[name], weight)
    assert sum(not torch.equal(plain[name], merged[name]) for name in plain) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 10**6}, "r must be a number from 1"),
        ({"r": 4096}, "not of these layers"),
        ({"r": True}, "r must be"),
        ({"lora_alpha": "3"}, "lora_alpha a number"),
        ({"lora_alpha": 10**400}, "OverflowError"),
        ({"rank_pattern": {"q_proj": 10**7}}, "plain LoRA: rank_pattern"),
        ({"layer_replication": [[0, 1000000]]}, "plain LoRA: layer_replication"),
        ({"target_modules": "(.*)*" * 40 + "$"}, "list of plain names"),
        ({"target_modules": ["(a+)+$"]}, "list of plain names"),
        ({"target_modules": ["q_proj"]}, "not of these layers"),
        ({"use_dora": True, "bias": "all", "x": 1}, "bias.*use_dora.*x"),
        ({"peft_type": "IA3"}, "peft_type"),
    ],
)  # fmt: skip
def test_an_untrusted_adapter_decides_neither_memory_nor_time(llm_path, adapter, change, message, monkeypatch):
    path = adapter / "adapter_config.json"
    write_json(path, read_json(path) | change)
    monkeypatch.setattr("mllm.model.lora.read_weights", None)  # it is refused before a factor is read
    with pytest.raises(UserError, match=message):
        cut_model(llm_path, adapter)


@pytest.mark.parametrize("kind", [torch.int8, torch.bool, torch.complex64, torch.float64, "nan", "inf"])
def test_factors_are_finite_floats(llm_path: Path, adapter: Path, kind: Any) -> None:
    file = adapter / "adapter_model.safetensors"
    factors, name = read_weights(file), "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"
    if isinstance(kind, str):
        factors[name][0, 0] = float(kind)
    else:
        factors[name] = factors[name].to(kind)
    write_weights(factors, file)
    with pytest.raises(UserError, match=r"SHA-256|of type"):
        cut_model(llm_path, adapter)
    (adapter / "taught.json").unlink()
    with pytest.raises(UserError, match=r"NaN or infinite|of type"):
        cut_model(llm_path, adapter)


def test_an_adapter_is_merged_only_into_the_layers_it_was_taught_to(llm_path: Path, adapter: Path) -> None:
    for layers in ("2,0", "0,2"):  # of the same shapes
        with pytest.raises(UserError, match="taught to --llm_layers 1,1: use these"):
            load_llm(str(llm_path), layers=layers, llm_adapter=str(adapter))


def test_teaching_goes_on_from_its_checkpoint(llm_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teach_adapter, "EVERY", 32)
    flags = SimpleNamespace(output=tmp_path, layers="1,1", samples=64, seed=0, rank=8, questions=1)
    whole = Learner(cut_model(llm_path))
    teach_adapter.teach(whole, flags, WORDS)
    (tmp_path / "checkpoint.pt").unlink()

    class Interrupted(Learner):
        calls = itertools.count()

        def predict(self, samples: Sequence[Sample]) -> tuple[Tensor, Tensor, Tensor]:
            if torch.is_grad_enabled() and next(self.calls) == 3:
                raise InterruptedError
            return super().predict(samples)

    with pytest.raises(InterruptedError):
        teach_adapter.teach(Interrupted(cut_model(llm_path)), flags, WORDS)
    again = Learner(cut_model(llm_path))
    teach_adapter.teach(again, flags, WORDS)
    for name, weight in whole.weights.items():
        assert torch.equal(weight, again.weights[name]), name
    flags.seed = 1
    with pytest.raises(UserError, match="another --output"):
        teach_adapter.teach(again, flags, WORDS)


def test_the_packaged_reader_is_the_one_that_its_page_describes() -> None:
    facts, file = read_json(ADAPTER / "taught.json"), ADAPTER / "adapter_model.safetensors"
    assert file.stat().st_size <= 8_000_000
    assert facts["sha256"] == sha256(file)
    assert facts["sha256"] in (ADAPTER / "README.md").read_text()
    assert facts["layers"] == DEMO_LAYERS
    read, plain = (load_llm(layers=DEMO_LAYERS, llm_adapter=adapter) for adapter in ("default", "none"))
    changed = [
        name
        for name, weight in plain.model.named_parameters()
        if not torch.equal(weight, read.model.get_parameter(name))
    ]
    assert len(changed) == 7 * 8, "the linear weights of eight layers"


def test_held_out_words_and_the_demos_are_in_no_training() -> None:
    llm = load_llm(layers="1,1")
    known, unknown = (Imagination(llm, held_out=held_out) for held_out in (False, True))
    assert not {*known.words} & {*unknown.words}
    assert len(unknown.words) / len(known.words) == pytest.approx(1 / 9, rel=0.2)
    left_out = {"balloon", "balloons", "automobile", "purple", "bottom", "center", "shoes", "navy"}
    assert not left_out & {*known.words, *unknown.words}


def test_cells_show_a_thing_at_its_place(llm_path: Path) -> None:
    imagination, rng = Imagination(cut_model(llm_path), held_out=False, words=WORDS), random.Random(0)
    more = []
    for _ in range(200):
        ((_, caption),), cells = imagination.sample("caption", rng)
        match = re.fullmatch(r"A (\w+) (?:at|in) the ([a-z]+(?: [a-z]+)?) on a (\w+) background\.", caption)
        if match and {match[1], match[3]} <= {*WORDS}:
            here = PLACES_OF_CELLS[:, list(PLACES).index(match[2])] == 1
            word = imagination.directions([match[1]], torch.ones(GRID**2, 1), torch.Generator())
            nearness = (cells - imagination.centre) @ word.mean(0)
            more.append(float(nearness[here].mean() - nearness[~here].mean()))
    assert len(more) > 5, "scenes of one thing"
    assert sum(more) / len(more) > 0.1, more


@pytest.mark.parametrize("kind", KINDS)
def test_a_question_alone_has_an_answer(llm_path: Path, kind: str) -> None:
    imagination = Imagination(cut_model(llm_path), held_out=False, words=WORDS)
    samples = [imagination.question(kind, random.Random(number)) for number in range(100)]
    answers = Counter(pairs[-1][1] for pairs, _ in samples)
    assert all(cells.shape == (GRID**2, 64) and torch.isfinite(cells).all() for _, cells in samples)
    assert len(answers) > 1
    if kind in ("yes_no", "is_value"):
        assert set(answers) == {"Yes", "No"}
        assert 30 < answers["Yes"] < 70
