"""The card of a saved LLaVA model: it parses, its code runs, it names no place of this machine."""

import re
import shutil

import tiny_chat
from huggingface_hub import ModelCard

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
