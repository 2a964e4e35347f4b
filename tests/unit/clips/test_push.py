"""Uploads to the hub: a folder stands in for it, laid out as its cache, from which the stock libraries then load."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
from conftest import random_model, tiny_run
from huggingface_hub import constants
from lab_runs import run_main
from local_hub import REPO, hub, run_card, uploaded
from range_server import serving

from clips.common.errors import UserError
from clips.config import DataConfig, Fields, MixPart, NamedSet, RunConfig, from_dict, published
from clips.data.tokenizer import build_tokenizer
from clips.weights.card import HEADERS
from clips.weights.export import export_all
from clips.weights.push import model_files, push

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


@pytest.mark.parametrize(  # these towers have no "hf", and for all but "native" a process of its own loads them
    "kind", [pytest.param(kind, marks=[pytest.mark.slow][kind == "native" :]) for kind in HEADERS if kind != "hf"]
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


def test_no_text_of_a_configuration_leaves_this_machine_but_the_names_of_recipe_and_phases(run_dir: Path) -> None:
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


@pytest.fixture
def copy(run_dir: Path, tmp_path: Path) -> Path:
    shutil.copytree(run_dir / "export" / "hf_vit", tmp_path / "hf_vit")
    return tmp_path / "hf_vit"


def refusal(directory: Path, hub: Path) -> str:
    with pytest.raises(UserError) as refused:
        push(directory, REPO)
    assert not (hub / "cache").exists()
    return str(refused.value)


def test_what_is_not_whole_is_refused(run_dir: Path, copy: Path, hub: Path) -> None:
    assert "give one of them, such as" in refusal(run_dir, hub)
    assert "there is no directory" in refusal(run_dir / "nothing", hub)
    (copy / "README.md").rename(copy / "card.txt")
    assert "no part of a model: card.txt" in refusal(copy, hub)
    (copy / "card.txt").unlink()
    assert "no model card" in refusal(copy, hub)
    (copy / "README.md").write_text("# mine")
    (copy / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00002-of-00002.safetensors"}}')
    assert "not whole: model.safetensors.index.json names model-00002" in refusal(copy, hub)
    for text in ("[" * 100_000, '{"weight_map": 3}', '{"weight_map": {"a": ["b"]}}', "[]"):
        (copy / "model.safetensors.index.json").write_text(text, encoding="utf-8")
        assert "model.safetensors.index.json" in refusal(copy, hub)
    (copy / "model.safetensors.index.json").unlink()
    (copy / "README.md").write_text("---\nlicense: [\n---\n# mine", encoding="utf-8")
    assert "README.md: its header cannot be read" in refusal(copy, hub)
    (copy / "README.md").write_text("# mine", encoding="utf-8")
    for path in copy.glob("*.safetensors"):
        path.unlink()
    assert "has no weights" in refusal(copy, hub)
    (copy / "config.json").unlink()
    assert "no config.json" in refusal(copy, hub)


@pytest.mark.parametrize(
    "name",
    [
        *("optimizer.pt", "step-5/model.safetensors", ".lock", "metrics.jsonl", "env.txt", "credentials.json"),
        *(".secret.json", "LICENSE.secret", "tokenizer/secret.json", "secret.safetensors", "evaluation/x.json"),
    ],
)
def test_leftovers_of_a_run_are_refused(copy: Path, hub: Path, name: str) -> None:
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).write_bytes(b"")
    assert f"no part of a model: {name}" in refusal(copy, hub)


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


def test_places_are_looked_for_in_bounded_time(copy: Path, hub: Path) -> None:
    """A text of 100,000 letters took a minute, one of 30,000 five seconds: each letter might have begun an address."""
    for text in ("a" * 30_000, "a://" * 30_000, "a://b?" * 30_000):
        (copy / "preprocessor_config.json").write_text(json.dumps({"x": text}), encoding="utf-8")
        begin = time.process_time()
        push(copy, REPO, dry_run=True)
        assert time.process_time() - begin < 2


@pytest.mark.parametrize("name", ["LICENSE", "tokenizer"])
def test_a_link_is_refused(copy: Path, hub: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "outside").mkdir()
    (copy / name).symlink_to(tmp_path / "outside")
    assert f"holds links, which may lead elsewhere: {name}" in refusal(copy, hub)


@pytest.mark.parametrize(
    ("file", "place"),
    [
        ("tokenizer_config.json", "/data/me/llm"),
        ("tokenizer_config.json", "~/models/llm"),
        ("tokenizer_config.json", "file:///mnt/x/y"),
        ("tokenizer_config.json", "C:\\Users\\me"),
        ("README.md", "/data/me/llm"),
        ("README.md", "{home}/x"),
        ("README.md", "https://me:secret@host/x.tar"),
        ("tokenizer_config.json", "https://host/x.tar?sig=SECRET"),
    ],
)
def test_places_of_this_machine_are_refused(copy: Path, hub: Path, file: str, place: str) -> None:
    place = place.format(home=Path.home())
    text = (copy / "README.md").read_text() + f"\nIt came from {place}.\n"
    (copy / file).write_text(json.dumps({"name_or_path": place}) if file.endswith("json") else text)
    assert f"{file}: " in refusal(copy, hub)


def test_a_token_is_no_place_and_evaluations_beside_the_weights_stay_here(copy: Path, hub: Path) -> None:
    (copy / "evaluation-test.json").write_text('{"test_set": "/data/me/private"}')
    (copy / "tokenizer.json").write_text(json.dumps({"/usr/local/bin": 5}))
    (copy / "special_tokens_map.json").write_text(json.dumps({"eos": "</s>", "url": "https://a.b/c/d", "x": "a/b/c"}))
    push(copy, REPO)
    assert (uploaded(hub) / "tokenizer.json").is_file()
    assert not list(uploaded(hub).glob("evaluation*"))


def test_a_dry_run_lists_what_would_go_up_and_needs_no_token(
    copy: Path, hub: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    (copy / "evaluation-test.json").write_text("{}")
    push(copy, REPO, dry_run=True)
    listed = [line.split()[-1] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert sorted(listed) == sorted(model_files(copy))
    assert "README.md" in listed
    assert "evaluation-test.json" not in listed
    assert not (hub / "cache").exists()
    assert not (hub / "asked.json").exists()
    (copy / "notes.txt").write_text("x")
    with pytest.raises(UserError, match=r"notes\.txt"):
        push(copy, REPO, dry_run=True)


def test_a_name_that_is_none_and_a_missing_token_are_said(
    copy: Path, hub: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for repo in ("tiny", "a/b/c", "../x", "some body/x", "a/b--c", ""):
        with pytest.raises(UserError, match="owner/name"):
            push(copy, repo)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(UserError, match="hf auth login"):
        push(copy, REPO)


def test_a_hub_that_refuses_or_is_not_there_ends_the_command_in_words(
    copy: Path, unused_port: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_not_a_real_one")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with serving(copy) as server:
        server.fault = lambda method, name, before: 403
        for place, code, message in [
            (server.url, 2, f"the hub refuses {REPO}"),
            (f"http://127.0.0.1:{unused_port}", 1, "the hub cannot be reached"),
        ]:
            monkeypatch.setattr(constants, "ENDPOINT", place)
            assert run_main(monkeypatch, "push_to_hub", copy, REPO) == code
            said = capsys.readouterr()
            assert message in said.err
            assert "Traceback" not in said.err
            assert "hf_not_a_real_one" not in said.err + said.out
        assert server.asked["POST", "api/repos/create"] == 1
