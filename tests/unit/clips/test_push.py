"""Uploads to the hub: a folder stands in for it, laid out as its cache, from which the stock libraries then load."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
from conftest import random_model, tiny_run
from local_hub import REPO, hub, run_card, uploaded

from clips.common.errors import UserError
from clips.config import DataConfig, Fields, MixPart, NamedSet, RunConfig, from_dict, published
from clips.data.tokenizer import build_tokenizer
from clips.weights.export import export_all
from clips.weights.push import push

__all__ = ["hub"]
TOKENIZER = build_tokenizer("wordpiece", ["a cat and two dogs"] * 3, vocab_size=64)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with its exports, whose data lay in a place that is nobody's business."""
    run = tiny_run()
    data = DataConfig(
        train="https://me:secret@host/recap/{00000..9}.tar", val="/data/me/val.csv", image_root="/data/me/pictures"
    )
    text = replace(run.model.text, vocab_size=TOKENIZER.vocab_size)
    run = replace(run, data=data, model=replace(run.model, text=text))
    directory = tmp_path_factory.mktemp("runs") / "mine"
    export_all(random_model(run), run, TOKENIZER, directory / "export", torch.randn(2, 3, 32, 32), ["a cat", "dogs"])
    return directory


@pytest.fixture
def copy(run_dir: Path, tmp_path: Path) -> Path:
    return shutil.copytree(run_dir / "export" / "hf_vit", tmp_path / "hf_vit")


@pytest.mark.parametrize(
    "kind",  # for all but "native" a process of its own loads them
    ["native", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("open_clip", "hf_vit"))],
)
def test_what_is_uploaded_is_the_model_and_nothing_of_this_machine(
    run_dir: Path, hub: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = run_dir / "export" / kind
    push(directory, REPO, private=kind == "native")
    out = capsys.readouterr().out
    assert f"https://hub/{REPO}" in out
    assert "license" in out
    files = {path.relative_to(uploaded(hub)) for path in uploaded(hub).rglob("*") if path.is_file()}
    assert files == {path.relative_to(directory) for path in directory.rglob("*") if path.is_file()}
    for file in files:
        content = (uploaded(hub) / file).read_bytes()
        if file.suffix == ".safetensors":
            assert content == (directory / file).read_bytes()
        for hidden in ("secret", "/data/me", "host/", str(Path.home()), str(run_dir), "hf_not_a_real_one"):
            assert hidden.encode() not in content, file
    assert json.loads((hub / "asked.json").read_text()) == {"private": kind == "native" or None, "exist_ok": True}
    if kind == "native":  # the run's own configuration stays as it was, and what is published is one
        assert RunConfig.load(directory / "config.json").data.val == "/data/me/val.csv"
        assert RunConfig.load(uploaded(hub) / "config.json").data.train == "not published"
    else:
        run_card(hub)  # which loads the repository with the stock library


def free_texts(value: object, path: str = "") -> Iterator[str]:
    """The fields of a configuration that may hold any text."""
    for name, hint in get_type_hints(type(value)).items():
        inner, place = getattr(value, name), f"{path}.{name}".strip(".")
        if isinstance(inner, tuple) and inner and is_dataclass(inner[0]):
            inner, place = inner[0], f"{place}.0"
        if is_dataclass(inner):
            yield from free_texts(inner, place)
        elif hint in (str, str | None):
            yield place


def test_no_text_of_a_configuration_leaves_this_machine_but_the_names_of_recipe_and_phases() -> None:
    """Also of a mix, whose published configuration loads."""
    secret = "https://h/mix.tar?sig=SECRET"
    mix = (MixPart(name=secret, share=1, data=secret, fields=Fields(image=secret), image_root=secret),)
    run = replace(tiny_run(), data=DataConfig(train="mix", mix=mix, further_tests=(NamedSet(name="a", data=secret),)))
    texts = list(free_texts(run))
    assert {"data.mix.0.data", "data.mix.0.image_root", "train.init_from", "data.fields.image"} < set(texts)
    named = [text for text in texts if text not in ("data.train", "data.further_tests.0.name")]
    run = run.override([f"{text}={secret}" for text in named])
    shown = replace(published(run), recipe="", phases=tiny_run().phases).to_dict()
    assert "SECRET" not in json.dumps(shown)
    assert from_dict(RunConfig, json.loads(json.dumps(published(run).to_dict()))) == published(run)


def test_files_that_are_no_part_of_a_model_stay_here(copy: Path, hub: Path) -> None:
    others = ("optimizer.pt", "step-5/model.safetensors", "metrics.jsonl", "secret.safetensors", "evaluation-test.json")
    for name in (*others, "credentials.json", "tokenizer/secret.json", ".lock"):
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_bytes(b"")
    push(copy, REPO)
    names = {path.name for path in uploaded(hub).rglob("*") if path.is_file()}
    weights = {"model.safetensors", "embedding.safetensors"}
    assert names == {"README.md", "config.json", "preprocessor_config.json"} | weights


def test_an_original_llava_goes_up_with_its_tower_and_no_place(copy: Path, hub: Path) -> None:
    """LLaVA finds the tower from the directory above the downloaded model, where its card's command runs."""
    shutil.copytree(copy, copy / "vision_tower", ignore=lambda *_: ["README.md", "embedding.safetensors"])
    (copy / "config.json").write_text(json.dumps({"mm_vision_tower": str(copy / "vision_tower")}), encoding="utf-8")
    (copy / "README.md").write_text(f"python -m llava.serve.cli --model-path {copy.name} --image-file x.png")
    push(copy, REPO)
    there, name = uploaded(hub), REPO.rpartition("/")[2]
    assert json.loads((there / "config.json").read_text()) == {"mm_vision_tower": f"{name}/vision_tower"}
    assert (there / "vision_tower" / "model.safetensors").is_file()
    assert f"--model-path {name} " in (there / "README.md").read_text()


def test_a_dry_run_needs_no_token_and_what_is_no_model_is_refused(
    run_dir: Path, copy: Path, hub: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    push(copy, REPO, dry_run=True)
    assert "  model.safetensors" in capsys.readouterr().out.splitlines()
    assert not (hub / "asked.json").exists()
    with pytest.raises(UserError, match="no model"):
        push(run_dir, REPO)
    with pytest.raises(UserError, match="OWNER/NAME"):
        push(copy, "tiny")
