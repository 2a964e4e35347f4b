"""The card of a saved LLaVA model: it parses, its code runs, it names no place of this machine."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import tiny_chat
from hostile import HOSTILE
from huggingface_hub import ModelCard
from local_hub import hub
from tiny_mllm import write_run

from clips.common.hub import model_digest
from mllm.encoders.registry import load_vision
from mllm.model.card import add_evaluation
from mllm.training.finish import card, trained_on

__all__ = ["hub"]


place = tiny_chat.own_place  # a fixture: evaluations write on the model's card


def test_the_code_of_a_card_runs_beside_it(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = place / "runs" / "llava" / "model"
    written = (directory / "README.md").read_text(encoding="utf-8")
    assert "\n# llava\n" in written
    data = ModelCard(written).data
    assert (data.library_name, data.pipeline_tag) == ("transformers", "image-text-to-text")
    assert (data.base_model, data.license) == (None, None)  # a directory is no base that others have
    (block,) = re.findall(r"^```python\n(.*?)^```", written, flags=re.DOTALL | re.MULTILINE)
    shutil.copytree(directory, place / "elsewhere")
    shutil.copy(place / "images" / "0.png", place / "elsewhere" / "picture.png")
    monkeypatch.chdir(place / "elsewhere")
    names: dict[str, object] = {}
    exec(block, names)
    assert capsys.readouterr().out.strip() == names["answer"][0]["generated_text"].strip() != ""


@pytest.mark.parametrize("asked", ["clips:{}", "clips:{}/export/hf_vit"])
def test_rows_name_files_and_folders_without_their_place(tmp_path: Path, asked: str) -> None:
    write_run(tmp_path / "me" / "demo")
    asked = asked.format(tmp_path / "me" / "demo")
    vision = load_vision(asked)
    llm, data = str(tmp_path / "llms" / "tiny"), str(tmp_path / "private" / "mix.json")
    trains = {"vision_tower": asked, "model_name_or_path": llm, "data_path": data, "mm_projector_lr": None}
    trains |= {"learning_rate": 1e-4, "batch_size": 4, "seed": 0}
    facts = {"vision encoder": vision.describe(), "language model": llm, "data": f"{data}: 8 samples, format v1"}
    record = {"trains": trains, "facts": facts, "freeze": {"projector": "full"}}
    (tmp_path / "config.json").write_text(json.dumps({"align": record, "instruct": record}))
    rows = card(tmp_path, {"stage": "instruct", "samples": 8}, vision)
    assert str(tmp_path) not in str(rows)
    assert rows["Vision encoder"].startswith("clips:demo (ViTModel from demo; 32 px")
    assert rows["Language model"] == "tiny"
    assert rows["Stage instruct: data"] == "mix.json: 8 samples, format v1"
    assert "8 samples" in rows["Stage instruct: rates"]
    assert trained_on(tmp_path) == {"align": "mix.json", "instruct": "mix.json"}
    (tmp_path / "config.json").write_text(json.dumps({"align": {"trains": trains | {"data_path": None}}}))
    assert trained_on(tmp_path) == {"align": "demo"}


FIGURES = {
    "dtype": "float32",
    "exact_match": {"yes/no": {"accuracy": 0.775, "low": 0.7, "high": 0.83, "n": 1200}},
    "cider": {"cider_d": 1.184, "n": 200},
}


def saved(place: Path, tmp_path: Path) -> Path:
    return shutil.copytree(place / "runs" / "llava" / "model", tmp_path / "model")


def results_of(model: Path) -> dict[tuple[str, str], tuple[float, dict]]:
    """(test set, figure) → value and what belongs to it."""
    results = ModelCard.load(model / "README.md").data.eval_results or []
    return {(one.dataset_name, one.metric_name): (one.metric_value, one.metric_args) for one in results}


def test_figures_come_onto_the_card_of_exactly_their_weights(place: Path, tmp_path: Path) -> None:
    """Several test sets stand beside each other; one that is measured again replaces its figures."""
    model = saved(place, tmp_path)
    before = ModelCard.load(model / "README.md").text
    assert results_of(model) == {}
    weights = {"weights": model_digest(model)}
    assert add_evaluation(model, "old.jsonl", FIGURES | weights)
    assert add_evaluation(model, HOSTILE["markup"], FIGURES | weights)
    assert add_evaluation(model, "old.jsonl", FIGURES | weights | {"dtype": "bfloat16"})
    results = results_of(model)
    assert {test_set for test_set, _ in results} == {"old.jsonl", HOSTILE["markup"]}
    value, args = results["old.jsonl", "yes/no, right in %"]
    assert (value, args) == (77.5, {"low": 70.0, "high": 83.0, "questions": 1200, "dtype": "bfloat16"} | weights)
    assert results["old.jsonl", "CIDEr-D of descriptions"][0] == 1.18
    assert ModelCard.load(model / "README.md").text == before


def test_figures_of_other_weights_are_not_shown(place: Path, tmp_path: Path) -> None:
    """Neither added to a model that was trained on since, nor kept where its weights are replaced."""
    model = saved(place, tmp_path)
    assert not add_evaluation(model, "mine", FIGURES | {"weights": "0" * 64})
    assert add_evaluation(model, "mine", FIGURES | {"weights": model_digest(model)})
    path = model / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert add_evaluation(model, "yours", FIGURES | {"weights": model_digest(model)})
    assert {test_set for test_set, _ in results_of(model)} == {"yours"}
    (model / "README.md").write_text("# Mine\n")  # by somebody else
    assert not add_evaluation(model, "mine", FIGURES | {"weights": model_digest(model)})
    assert (model / "README.md").read_text() == "# Mine\n"
