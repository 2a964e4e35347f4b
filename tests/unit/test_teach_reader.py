"""The reader: a language model is taught on imagined scenes, and its adapter becomes a part of a stock model."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from tiny_mllm import write_llm
from transformers import AutoModelForCausalLM

from clips.common.errors import UserError
from clips.common.files import read_json, sha256
from mllm.data.demo import KINDS
from mllm.model.llm import LanguageModel, load_llm
from tools import teach_reader
from tools.teach_reader import GRID, SHARES, Imagination, Reader, place_of

WORDS = ("picture", "cat", "dogs", "red")


@pytest.fixture(scope="module")
def llm_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.1}
    return write_llm(tmp_path_factory.mktemp("reader") / "llm", num_hidden_layers=3, **options)


def cut_model(path: Path, reader: Path | None = None) -> LanguageModel:
    return load_llm(str(path), layers="1,1", reader=reader)


@pytest.mark.slow
def test_a_taught_adapter_is_merged_into_a_model_that_stock_libraries_open(
    llm_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teach_reader, "WARMUP", 2)
    monkeypatch.setattr(teach_reader, "EVERY", 160)
    flags = SimpleNamespace(output=tmp_path, layers="1,1", samples=160, seed=0, rank=8, questions=2)
    reader, rng = Reader(cut_model(llm_path)), random.Random(1)
    imagination = Imagination(reader.llm, held_out=False, words=WORDS)
    samples = [imagination.sample("attribute_yes_no", rng) for _ in range(8)]
    before = reader.loss(samples)
    teach_reader.teach(reader, flags, WORDS)
    assert reader.loss(samples) < before - 1
    taught = {name: weight.detach().clone() for name, weight in reader.weights.items()}
    teach_reader.save(reader, flags, WORDS)
    adapter = tmp_path / "adapter"
    facts = read_json(adapter / "reader.json")
    assert facts["sha256"] == sha256(adapter / "adapter_model.safetensors")
    assert facts["rank"] == 8

    merged, plain = cut_model(llm_path, adapter), cut_model(llm_path)
    assert merged.source.endswith(", with the adapter adapter")
    merged.model.save_pretrained(tmp_path / "merged")
    ids = torch.tensor([[5, 6, 7, 8]])
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    by_peft = PeftModel.from_pretrained(cut_model(llm_path).model, str(adapter))
    for model in (stock, by_peft):
        torch.testing.assert_close(model(ids).logits, merged.model(ids).logits)
    for name, weight in taught.items():
        change, kept = (
            w - plain.model.get_parameter(f"{name}.weight")
            for w in (weight, merged.model.get_parameter(f"{name}.weight"))
        )
        torch.testing.assert_close(
            (change - kept).norm() ** 2, change.norm() ** 2 - kept.norm() ** 2, rtol=0.02, atol=0
        )
    with pytest.raises(UserError, match=r"not of these layers.*layers\.2"):
        load_llm(str(llm_path), reader=adapter)


def test_teaching_goes_on_from_its_checkpoint(llm_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teach_reader, "EVERY", 32)
    flags = SimpleNamespace(output=tmp_path, layers="1,1", samples=64, seed=0, rank=8, questions=1)
    whole = Reader(cut_model(llm_path))
    teach_reader.teach(whole, flags, WORDS)
    (tmp_path / "checkpoint.pt").unlink()

    def stop(step: int, steps: int) -> float:
        if step == 3:
            raise InterruptedError
        return rate_at(step, steps)

    rate_at = teach_reader.rate_at
    half = Reader(cut_model(llm_path))
    monkeypatch.setattr(teach_reader, "rate_at", stop)
    with pytest.raises(InterruptedError):
        teach_reader.teach(half, flags, WORDS)
    monkeypatch.setattr(teach_reader, "rate_at", rate_at)
    again = Reader(cut_model(llm_path))
    teach_reader.teach(again, flags, WORDS)
    for name, weight in whole.weights.items():
        assert torch.equal(weight, again.weights[name]), name
    flags.seed = 1
    with pytest.raises(UserError, match="another --output"):
        teach_reader.teach(again, flags, WORDS)


def test_held_out_words_and_the_demos_are_in_no_training() -> None:
    llm = load_llm(layers="1,1")
    known, unknown = (Imagination(llm, held_out=held_out) for held_out in (False, True))
    assert not {*known.words} & {*unknown.words}
    assert len(unknown.words) / len(known.words) == pytest.approx(1 / 9, rel=0.2)
    left_out = {"balloon", "balloons", "automobile", "purple", "bottom", "center", "shoes", "navy"}
    assert not left_out & {*known.words, *unknown.words}


def test_cells_show_their_things_at_their_places(llm_path: Path) -> None:
    imagination = Imagination(cut_model(llm_path), held_out=False, words=WORDS)
    rng = random.Random(0)
    for kind in SHARES:
        pairs, cells = imagination.sample(kind, rng)
        assert cells.shape == (GRID**2, 64)
        assert all(question and answer for question, answer in pairs)
    for kind in KINDS:
        assert len(imagination.question(kind, rng)[0]) == 1
    assert [place_of(2, 3), place_of(0, 5), place_of(3, 1)] == ["center", "top right", "bottom left"]
