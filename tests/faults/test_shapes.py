"""Row 25: weights of another shape than their place needs; the message names both shapes."""

import shutil
from pathlib import Path

import pytest
import torch
from launched import small_data
from serve_process import write_models
from tiny_llava import ALIGN, INSTRUCT, command, write_place

from clips.common.tensors import read_weights, write_weights

VIT, PATCHES = "runs/clips-demo/export/hf_vit", "patch_embeddings.projection.weight"
OUT = ["--output_dir", "runs/x"]
WRONG = {  # what is wrong → (its copy is made from, the end of the tensor's name, the command; {} is the copy)
    "projector": (
        "start.bin",
        "mm_projector.0.weight",
        ["train_llava.py", *INSTRUCT, "--pretrain_mm_mlp_adapter", "{}"],
    ),
    "encoder": (VIT, PATCHES, ["train_llava.py", *ALIGN, "--vision_tower", "hf:{}"]),
    "init_from": (VIT, PATCHES, ["pretrain_clips.py", "--debug", "--device", "cpu", "--init-from", "{}"]),
    "language_model": ("llm", "0.mlp.up_proj.weight", ["train_llava.py", *ALIGN, "--model_name_or_path", "{}"]),
    "whole_model": ("runs/llava/model", "multi_modal_projector.linear_1.weight", ["chat.py", "--model", "{}"]),
    "native_encoder": ("runs/clips-demo/export/native", "patch_embed.weight", ["search.py", "a cat", "--model", "{}"]),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """What training reads, and models for chat and server."""
    place, models = write_place(tmp_path_factory.mktemp("llava")), tmp_path_factory.mktemp("models")
    write_models(models, context=256)
    return place, models


def widened(path: Path, part: str) -> tuple[str, str]:
    """Give the matrix in `path` whose name ends so one more row; returns both shapes, the file's first."""
    tensors = read_weights(path)
    name = next(name for name in tensors if name.endswith(part))
    rows, *rest = tensors[name].shape
    tensors[name] = torch.cat([tensors[name], tensors[name][:1]])
    write_weights(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)
    return str((rows + 1, *rest)), str((rows, *rest))


@pytest.mark.parametrize("kind", WRONG)
def test_row_25_both_shapes_are_said(kind, places, tmp_path, monkeypatch):
    source, part, (script, *words) = WRONG[kind]
    place, models = places
    served = script in ("chat.py", "search.py")
    original, copied = (models if served else place) / source, tmp_path / Path(source).name
    (shutil.copytree if original.is_dir() else shutil.copy)(original, copied)
    shapes = widened(copied / "model.safetensors" if copied.is_dir() else copied, part)
    more = {
        "train_llava.py": OUT,
        "pretrain_clips.py": small_data(tmp_path / "data") if kind == "init_from" else [],
        "chat.py": ["--device", "cpu", "--prompt", "Hello"],
        "search.py": ["--device", "cpu", "--pictures", "runs"],
    }
    words = [word.replace("{}", str(copied)) for word in words]
    code, output = command(place, monkeypatch, script, *words, *more[script])
    assert code == 2, output
    assert all(shape in output for shape in shapes), output
    assert "Traceback" not in output
