"""Rows 23 to 25: code in a pickle, code beside a model, weights of another shape; refused on every route."""

import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import bomb
import pytest
import tiny_llava
import torch
from launched import small_data
from safetensors.torch import load_file
from serve_process import write_models
from tiny_llava import ALIGN, INSTRUCT, command
from tiny_original import write_base, write_lora, write_tower

from clips.common.tensors import read_weights, write_weights

place = tiny_llava.place  # a fixture


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[Path]:
    """What a bomb leaves; at the end of each test it is not there."""
    yield tmp_path / "was_run"
    assert not (tmp_path / "was_run").exists()


def test_the_bomb_goes_off_where_code_is_run(tmp_path: Path) -> None:
    bomb.plant(tmp_path / "bomb.pt", tmp_path / "mark")
    torch.load(tmp_path / "bomb.pt", weights_only=False)
    assert (tmp_path / "mark").is_dir()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA model, a language model and an encoder, whole."""
    root = tmp_path_factory.mktemp("models")
    write_models(root, context=256)
    return root


def as_bin(directory: Path, target: Path, mark: Path) -> Path:
    """A copy of a model whose weights lie in a pytorch_model.bin with a bomb in it."""
    shutil.copytree(directory, target)
    weights = target / "model.safetensors"
    torch.save(load_file(weights), target / "pytorch_model.bin")
    bomb.plant(target / "pytorch_model.bin", mark)
    weights.unlink()
    return target


def adapter_with_a_pickle(root: Path, mark: Path) -> Path:
    """LoRA adapters of the original LLaVA on a model beside them."""
    write_tower(root / "tower")
    write_base(root / "base")
    lora, _ = write_lora(root)
    bomb.plant(lora / "adapter_model.bin", mark)
    return lora


Refused = Callable[[str, dict[str, Callable[[], Path]]], str]


@pytest.fixture
def refused(place: Path, shards: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> Refused:
    """refused(route, made) → what the command of the route says, which must refuse.

    A word of the command that is a key of `made` stands for the path that the function makes.
    """

    def said_of(route: str, made: dict[str, Callable[[], Path]]) -> str:
        script, *words = ROUTES[route]
        filled: list[str] = []
        for word in words:
            prefix, name = ("hf:", word[3:]) if word.startswith("hf:") else ("", word)
            filled += shards if word == "DATA" else [f"{prefix}{made[name]()}" if name in made else word]
        return command(place, monkeypatch, script, *filled, code=2)

    return said_of


ROUTES = {
    "resume": ("pretrain_clips", "--debug", "--device", "cpu", "DATA", "--resume", "FILE"),
    "convert": ("convert", "VIT", "out"),
    "adapter": ("convert", "LORA", "out", "--to", "transformers", "--base", "BASE", "--vision-tower", "TOWER"),
    "projector": ("train_llava", *INSTRUCT, "--pretrain_mm_mlp_adapter", "FILE", "--output_dir", "runs/x"),
    "language model": ("train_llava", *ALIGN, "--model_name_or_path", "LLM", "--output_dir", "runs/x"),
    "vision tower": ("train_llava", *ALIGN, "--vision_tower", "hf:VIT", "--output_dir", "runs/x"),
    "chat": ("chat", "--device", "cpu", "--model", "LLAVA", "--prompt", "Hello"),
}


@pytest.mark.parametrize("route", ROUTES)
def test_row_23_a_pickle_on_every_route(route, refused, place, models, mark, tmp_path):
    file = tmp_path / "weights.bin"
    bomb.plant(file, mark)
    made = {"FILE": lambda: file}
    made["LLM"] = lambda: as_bin(place / "llm", tmp_path / "llm", mark)
    made["VIT"] = lambda: as_bin(place / "runs/clips-demo/export/hf_vit", tmp_path / "vit", mark)
    made["LLAVA"] = lambda: as_bin(models / "runs/llava/model", tmp_path / "llava", mark)
    made["LORA"] = lambda: adapter_with_a_pickle(tmp_path, mark)
    made["BASE"], made["TOWER"] = (lambda: tmp_path / "base"), (lambda: tmp_path / "tower")
    message = refused(route, made)
    assert str(tmp_path) in message
    assert route == "resume" or "pickled code" in message or "is damaged" in message  # --resume takes directories alone
    assert "weights_only" not in message  # torch's own message says how to run the code
    assert not (place / "out").exists()


CODE = "import os\nos.mkdir({mark!r})\nfrom transformers import *\nclass Foreign(PreTrainedModel): pass\n"
AUTO = {"AutoConfig": "foreign.Foreign", "AutoModel": "foreign.Foreign", "AutoModelForCausalLM": "foreign.Foreign"}
AUTO |= {"AutoProcessor": "foreign.Foreign", "AutoTokenizer": ["foreign.Foreign", None]}


def with_code(directory: Path, target: Path, mark: Path, kind: str) -> Path:
    """A copy of a model that asks for the Python file beside it, as a kind of model that transformers does not know."""
    shutil.copytree(directory, target)
    (target / "foreign.py").write_text(CODE.format(mark=str(mark)))
    for name in ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json"):
        if (target / name).is_file():
            fields = json.loads((target / name).read_text()) | {"auto_map": AUTO}
            fields |= {"model_type": kind} if name == "config.json" else {}
            (target / name).write_text(json.dumps(fields))
    return target


REMOTE = ("language model", "vision tower", "chat", "convert")


@pytest.mark.parametrize("route", REMOTE)
def test_row_24_a_model_that_asks_for_its_own_code(route, refused, place, models, mark, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # transformers asks at a terminal, where it is let
    sources = {
        "LLM": place / "llm",
        "VIT": place / "runs/clips-demo/export/hf_vit",
        "LLAVA": models / "runs/llava/model",
    }
    refused(
        route, {name: partial(with_code, source, tmp_path / name, mark, "foreign") for name, source in sources.items()}
    )
    assert not mark.exists()


VIT, PATCHES = "runs/clips-demo/export/hf_vit", "patch_embeddings.projection.weight"
OUT = ["--output_dir", "runs/x"]
WRONG = {  # what is wrong → (its copy is made from, the end of the tensor's name, the command; {} is the copy)
    "projector": (
        "start.bin",
        "mm_projector.0.weight",
        ["train_llava", *INSTRUCT, "--pretrain_mm_mlp_adapter", "{}"],
    ),
    "encoder": (VIT, PATCHES, ["train_llava", *ALIGN, "--vision_tower", "hf:{}"]),
    "init_from": (VIT, PATCHES, ["pretrain_clips", "--debug", "--device", "cpu", "--init-from", "{}"]),
    "language_model": ("llm", "0.mlp.up_proj.weight", ["train_llava", *ALIGN, "--model_name_or_path", "{}"]),
    "whole_model": ("runs/llava/model", "multi_modal_projector.linear_1.weight", ["chat", "--model", "{}"]),
    "native_encoder": ("runs/clips-demo/export/native", "patch_embed.weight", ["search", "a cat", "--model", "{}"]),
}


def widened(path: Path, part: str) -> tuple[str, str]:
    """Give the matrix in `path` whose name ends so one more row; returns both shapes, the file's first."""
    tensors = read_weights(path)
    name = next(name for name in tensors if name.endswith(part))
    rows, *rest = tensors[name].shape
    tensors[name] = torch.cat([tensors[name], tensors[name][:1]])
    write_weights(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)
    return str((rows + 1, *rest)), str((rows, *rest))


@pytest.mark.parametrize("kind", WRONG)
def test_row_25_both_shapes_are_said(kind, place, models, tmp_path, monkeypatch):
    source, part, (script, *words) = WRONG[kind]
    served = script in ("chat", "search")
    original, copied = (models if served else place) / source, tmp_path / Path(source).name
    (shutil.copytree if original.is_dir() else shutil.copy)(original, copied)
    shapes = widened(copied / "model.safetensors" if copied.is_dir() else copied, part)
    more = {
        "train_llava": OUT,
        "pretrain_clips": small_data(tmp_path / "data") if kind == "init_from" else [],
        "chat": ["--device", "cpu", "--prompt", "Hello"],
        "search": ["--device", "cpu", "--image-folder", "runs"],
    }
    words = [word.replace("{}", str(copied)) for word in words]
    output = command(place, monkeypatch, script, *words, *more[script], code=2)
    assert all(shape in output for shape in shapes), output
