"""Row 25: weights of another shape than what they are to go into; the message says both."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from launched import small_data
from tiny_llava import ALIGN, INSTRUCT, command, write_place
from tiny_serve import write_models

from clips.common.tensors import read_weights, write_weights


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_place(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    write_models(root, context=256)
    return root


def widened(path: Path, part: str) -> tuple[str, str]:
    """Give the matrix in `path` whose name ends so one more row; returns both shapes, the file's first."""
    tensors = read_weights(path)
    name = next(name for name in tensors if name.endswith(part))
    rows, *rest = tensors[name].shape
    tensors[name] = torch.cat([tensors[name], tensors[name][:1]])
    write_weights(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)
    return str((rows + 1, *rest)), str((rows, *rest))


def projector(place: Path, models: Path, root: Path) -> tuple[list[str], tuple[str, str]]:
    path = Path(shutil.copy(place / "start.bin", root / "wide.bin"))
    shapes = widened(path, "mm_projector.0.weight")
    return ["train_llava.py", *INSTRUCT, "--pretrain_mm_mlp_adapter", str(path), "--output_dir", "runs/x"], shapes


def encoder(place: Path, models: Path, root: Path) -> tuple[list[str], tuple[str, str]]:
    vit = shutil.copytree(place / "runs/clips-demo/export/hf_vit", root / "vit")
    shapes = widened(vit / "model.safetensors", "patch_embeddings.projection.weight")
    return ["train_llava.py", *ALIGN, "--vision_tower", f"hf:{vit}", "--output_dir", "runs/x"], shapes


def init_from(place: Path, models: Path, root: Path) -> tuple[list[str], tuple[str, str]]:
    vit = shutil.copytree(place / "runs/clips-demo/export/hf_vit", root / "vit")
    shapes = widened(vit / "model.safetensors", "patch_embeddings.projection.weight")
    return [
        "pretrain_clips.py",
        "--debug",
        "--device",
        "cpu",
        *small_data(root / "data"),
        "--init-from",
        str(vit),
    ], shapes


def language_model(place: Path, models: Path, root: Path) -> tuple[list[str], tuple[str, str]]:
    llm = shutil.copytree(place / "llm", root / "llm")
    shapes = widened(llm / "model.safetensors", "0.mlp.up_proj.weight")
    return ["train_llava.py", *ALIGN, "--model_name_or_path", str(llm), "--output_dir", "runs/x"], shapes


def whole_model(place: Path, models: Path, root: Path) -> tuple[list[str], tuple[str, str]]:
    model = shutil.copytree(models / "runs/llava/model", root / "model")
    shapes = widened(model / "model.safetensors", "multi_modal_projector.linear_1.weight")
    return ["chat.py", "--device", "cpu", "--model", str(model), "--prompt", "Hello"], shapes


def served_encoder(place: Path, models: Path, root: Path) -> tuple[list[str], tuple[str, str]]:
    native = shutil.copytree(models / "runs/clips-demo/export/native", root / "native")
    shapes = widened(native / "model.safetensors", "patch_embed.weight")
    model = str(models / "runs/llava/model")
    return ["serve.py", "--device", "cpu", "--port", "0", "--model", model, "--encoder", str(native)], shapes


WRONG: list[Callable] = [projector, encoder, init_from, language_model, whole_model, served_encoder]


@pytest.mark.parametrize("make", WRONG, ids=[make.__name__ for make in WRONG])
def test_row_25_both_shapes_are_said(
    make: Callable, place: Path, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (script, *words), (found, needed) = make(place, models, tmp_path)
    assert (ROOT / "scripts" / script).is_file()
    code, said = command(place, monkeypatch, script, *words)
    assert code == 2, said
    assert found in said
    assert needed in said
    assert "Traceback" not in said
