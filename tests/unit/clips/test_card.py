"""Model cards of exports and of LLaVA models: they parse, their code runs, their metrics are of these weights."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_chat
import torch
from conftest import random_model, tiny_run
from huggingface_hub import ModelCard
from PIL import Image

from clips.config import DataConfig, RunConfig
from clips.data.tokenizer import build_tokenizer
from clips.evaluation.metrics import Metric
from clips.evaluation.results import write_metrics
from clips.model.clips import CLIPSModel
from clips.weights.card import LIBRARIES
from clips.weights.export import export_all

TOKENIZER = build_tokenizer("wordpiece", ["a cat and two dogs"] * 3, vocab_size=64)


def export(directory: Path, run: RunConfig, model: CLIPSModel, **options: object) -> dict[str, str]:
    """Format → its card."""
    export_all(model, run, TOKENIZER, directory, torch.randn(2, 3, 32, 32), ["a cat", "two dogs"], **options)
    return {path.parent.name: path.read_text(encoding="utf-8") for path in directory.glob("*/README.md")}


def tokenizer_run(*, pre_norm: bool = False) -> RunConfig:
    run = tiny_run(pad_mask=True)
    vision = replace(run.model.vision, pre_norm=pre_norm)
    text = replace(run.model.text, vocab_size=TOKENIZER.vocab_size)
    data = DataConfig(train="https://me:secret@host/recap/{00000..9}.tar", image_root="/secret")
    return replace(run, data=data, model=replace(run.model, vision=vision, text=text))


@pytest.mark.parametrize("tower", ["ViT", "pre_norm"])
def test_the_code_of_a_card_runs_beside_it(tower, tmp_path, monkeypatch, capsys):
    run = tokenizer_run(pre_norm=tower == "pre_norm")
    model = random_model(run)
    place = tmp_path / "mine" / "export"
    cards = export(place, run, model)
    assert sorted(cards) == ["hf_vit", "native", "open_clip"]
    files = [path for path in place.rglob("*") if path.is_file() and path != place / "native" / "config.json"]
    assert not [path for path in files if b"secret" in path.read_bytes() or str(place).encode() in path.read_bytes()]
    for kind, card in cards.items():
        data = ModelCard(card).data
        assert data.library_name == LIBRARIES[kind]
        assert (data.pipeline_tag == "image-feature-extraction") == (kind == "hf_vit")
        assert data.license is None  # whoever publishes the weights states it
        assert "\n# mine\n" in card
        assert str(place) not in card
        assert "text 32" in card
        monkeypatch.chdir(place / kind)
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
        image.save("image.png")
        (block,) = re.findall(r"^```python\n(.*?)^```", card, flags=re.DOTALL | re.MULTILINE)
        names: dict[str, object] = {}
        exec(block, names)
        shown = [float(number) for number in re.findall(r"-?\d+\.\d+", capsys.readouterr().out)]
        if kind == "hf_vit":
            assert names["model"].config.image_size == 32
        else:
            assert len(shown) == 2
            assert (sum(shown) == pytest.approx(1, abs=1e-3)) == (kind == "open_clip")


def write_evaluation(run_dir: Path, model: CLIPSModel, *, limit: int | None = None) -> dict:
    metrics = {"sentence_i2t_r1": Metric(12.3, 0.2, 500), "unseen/sentence_i2t_r1": Metric(7.8, 0.2, 500)}
    metrics["sentence_i2t_r5"] = Metric(45.6, 1.0, 500)
    write_metrics(run_dir / "evaluation.json", metrics, model, [], test_set="test", limit=limit)
    return json.loads((run_dir / "evaluation.json").read_text())


def test_a_card_holds_metrics_of_these_weights_only(tmp_path: Path) -> None:
    run = tokenizer_run()
    model = random_model(run)
    whole = write_evaluation(tmp_path, model)
    others = [
        whole | {"image_size": 48},
        write_evaluation(tmp_path, model, limit=20),
        write_evaluation(tmp_path, random_model(run, seed=1)),
    ]
    for card in export(tmp_path / "export", run, model, evaluations=[*others, whole]).values():
        results = {(result.dataset_name, result.metric_value) for result in ModelCard(card).data.eval_results}
        assert results == {("test", 12.3), ("unseen", 7.8)}
    for card in export(tmp_path / "export", run, model, evaluations=others).values():
        assert not ModelCard(card).data.eval_results


place = tiny_chat.own_place  # a fixture: evaluations write on the model's card


def test_the_code_of_a_llava_card_runs_beside_it(place, monkeypatch, capsys):
    directory = place / "runs" / "llava" / "model"
    written = (directory / "README.md").read_text(encoding="utf-8")
    assert "\n# llava\n" in written
    data = ModelCard(written).data
    assert (data.library_name, data.pipeline_tag) == ("transformers", "image-text-to-text")
    assert (data.base_model, data.license) == (None, None)  # a directory is no base that others have
    (block,) = re.findall(r"^```python\n(.*?)^```", written, flags=re.DOTALL | re.MULTILINE)
    shutil.copytree(directory, place / "elsewhere")
    shutil.copy(place / "images" / "0.png", place / "elsewhere" / "image.png")
    monkeypatch.chdir(place / "elsewhere")
    names: dict[str, object] = {}
    exec(block, names)
    assert capsys.readouterr().out.strip() == names["answer"][0]["generated_text"].strip() != ""
