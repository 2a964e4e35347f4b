"""Model cards of exports: they parse, their code runs, their figures are of these weights, no text in them acts."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import generative, random_model, tiny_run
from huggingface_hub import ModelCard
from PIL import Image

from clips.config import RunConfig
from clips.data.tokenizer import build_tokenizer
from clips.evaluation.figures import write_figures
from clips.evaluation.metrics import Figure
from clips.model.clips import CLIPSModel
from clips.weights.card import HEADERS
from clips.weights.export import export_all

TOKENIZER = build_tokenizer("wordpiece", ["a cat and two dogs"] * 3, vocab_size=64)


def export(directory: Path, run: RunConfig, model: CLIPSModel, **options: object) -> dict[str, str]:
    """Format → its card."""
    export_all(model, run, TOKENIZER, directory, torch.randn(2, 3, 32, 32), ["a cat", "two dogs"], **options)
    return {
        kind: (directory / kind / "README.md").read_text(encoding="utf-8")
        for kind in HEADERS
        if (directory / kind).is_dir()
    }


def tokenizer_run(*, pad_mask: bool = True, pre_norm: bool = False) -> RunConfig:
    run = tiny_run(pad_mask=pad_mask)
    vision = replace(run.model.vision, pre_norm=pre_norm)
    text = replace(run.model.text, vocab_size=TOKENIZER.vocab_size)
    return replace(run, model=replace(run.model, vision=vision, text=text))


def write_evaluation(run_dir: Path, model: CLIPSModel, *, name: str = "test", limit: int | None = None) -> dict:
    shown = {"sentence_i2t_r1": Figure(12.3, 0.2, 500), "unseen/sentence_i2t_r1": Figure(7.8, 0.2, 500)}
    figures = shown | {"sentence_i2t_r5": Figure(45.6, 1.0, 500)}
    write_figures(run_dir / "evaluation.json", figures, test_set=name, skipped=[], model=model, limit=limit)
    return json.loads((run_dir / "evaluation.json").read_text())


@pytest.fixture(scope="module", params=["ViT", "pre_norm", "caption", "caption+web"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, CLIPSModel, Path]:
    """A kind of model, the model, and the directory of its exports."""
    run = tokenizer_run(pre_norm=request.param == "pre_norm")
    if request.param.startswith("caption"):
        run = generative(run, request.param)
    model, place = random_model(run), tmp_path_factory.mktemp("runs") / "mine" / "export"
    export_all(model, run, TOKENIZER, place, torch.randn(2, 3, 32, 32), ["a cat", "two dogs"])
    return request.param, model, place


def test_the_code_of_a_card_runs_beside_it(
    exported: tuple[str, CLIPSModel, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model without text features has no open_clip export, and its cards promise no text features."""
    name, model, place = exported
    has_texts = not name.startswith("caption")
    kinds = sorted(path.name for path in place.iterdir() if path.is_dir())
    assert kinds == (["hf_vit", "native", "open_clip"] if has_texts else ["hf_vit", "native"])
    for kind in kinds:
        card = (place / kind / "README.md").read_text(encoding="utf-8")
        data = ModelCard(card).data
        assert data.library_name == HEADERS[kind]["library_name"]
        assert data.pipeline_tag == (HEADERS[kind]["pipeline_tag"] if has_texts else "image-feature-extraction")
        assert "clips" in data.tags
        assert data.license is None  # whoever publishes the weights states it
        assert card.splitlines()[0] == "---"
        assert "\n# mine\n" in card
        assert str(place) not in card
        assert ("learned from captions alone" in card) != has_texts
        assert ("text 32" in card) == (name != "caption")
        monkeypatch.chdir(place / kind)
        picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
        picture.save("picture.png")
        (block,) = re.findall(r"^```python\n(.*?)^```", card, flags=re.DOTALL | re.MULTILINE)
        names: dict[str, object] = {}
        exec(block, names)
        shown = [float(number) for number in re.findall(r"-?\d+\.\d+", capsys.readouterr().out)]
        if kind == "hf_vit":  # the same feature as the encoder's own
            own = model.encode_image(torch.as_tensor(names["inputs"]["pixel_values"]))
            assert torch.allclose(names["feature"], own, atol=1e-5)
        elif has_texts:
            assert len(shown) == 2
            assert (sum(shown) == pytest.approx(1, abs=1e-3)) == (kind == "open_clip")


def test_a_card_shows_figures_of_these_weights_only(tmp_path: Path) -> None:
    run = tokenizer_run()
    model = random_model(run)
    found = write_evaluation(tmp_path, model)
    for evaluations, is_shown in [
        ([found], True),
        ([], False),
        ([found | {"image_size": 48}], False),
        ([write_evaluation(tmp_path, model, limit=20)], False),
        ([write_evaluation(tmp_path, random_model(run, seed=1))], False),
    ]:
        for card in export(tmp_path / "export", run, model, evaluations=evaluations).values():
            assert ("| sentence image → text R@1 | 12.3 | 0.20 | 500 |" in card) == is_shown
            assert ("None were measured" in card) != is_shown
            assert "45.6" not in card
            if is_shown:
                seen, unseen = card.split("## Measured on test")[1].split("## Measured on unseen")
                assert "7.8" in unseen
                assert "7.8" not in seen


def test_samples_and_data_are_named_without_their_place(tmp_path: Path) -> None:
    run = tokenizer_run()
    assert "these weights have seen 48" in export(tmp_path / "export", run, random_model(run), samples=48)["native"]
    card = export(tmp_path / "export", run, random_model(run))["open_clip"]
    assert "have seen" not in card
    assert "drawings" in card
    assert "several widths" not in card
    spec = "/data/me/recap/{00000..00009}.tar;https://user:secret@host/private/more.tar?token=secret"
    run = replace(run, data=replace(run.data, train=spec), phases=(replace(run.phases[0], sizes=((48, 16), (32, 32))),))
    for card in export(tmp_path / "export", run, random_model(run)).values():
        assert "{00000..00009}.tar; more.tar" in card
        assert "64 at 48 × 16, 32 × 32 px" in card
        assert ("positions of 2 × 2 patches" in card) != ("CLIPS-MLLM computes the positions of any grid" in card)
        assert "drawings" not in card
        for hidden in ("secret", "/data", "private", "host"):
            assert hidden not in card


@pytest.mark.parametrize("pad_mask", [True, False])
def test_the_card_says_that_the_authors_fork_refuses_the_files(pad_mask: bool, tmp_path: Path) -> None:
    """Their CLIPTextCfg has no `eos_id` (the fields are in tests/numerics/test_init_from.py)."""
    run = tokenizer_run(pad_mask=pad_mask)
    card = export(tmp_path / "export", run, random_model(run))["open_clip"]
    config = json.loads((tmp_path / "export" / "open_clip" / "open_clip_config.json").read_text())
    assert "eos_id" in config["model_cfg"]["text_cfg"]
    assert "refuses these files, because its configuration has no `eos_id`" in card
    assert ("no mask of padding" in card) == pad_mask
    assert ("--to official" in card) != pad_mask
