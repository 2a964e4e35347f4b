"""The card of a saved LLaVA model: it parses, its code runs, it names no place of this machine."""

import json
import re
import shutil
from pathlib import Path

import pytest
import tiny_chat
from huggingface_hub import ModelCard
from tiny_mllm import write_run

from mllm.encoders.registry import load_vision
from mllm.training.finish import card, trained_on

place = tiny_chat.own_place  # a fixture: evaluations write on the model's card


def test_the_code_of_a_card_runs_beside_it(place, monkeypatch, capsys):
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
