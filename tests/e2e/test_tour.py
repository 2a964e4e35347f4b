"""What the README and the notebook show of Python, run as they stand, on tiny models in place of the quickstart's."""

import os
import re
import shutil
from pathlib import Path

import nbformat
import pytest
import torch
from conftest import ROOT, random_model, tiny_run
from nbclient import NotebookClient
from tiny_mllm import make_images, write_llava_on

from clips.data.tokenizer import build_tokenizer
from clips.weights.export import export_all

TOUR = ROOT / "docs" / "tour.ipynb"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository after the quickstart: runs/demo with its exports, a language model on it, the demo's images."""
    root = tmp_path_factory.mktemp("after_quickstart")
    run = tiny_run()
    tokenizer = build_tokenizer("wordpiece", ["a red cat and two dogs"] * 3, vocab_size=run.model.text.vocab_size)
    images = torch.randn(2, 3, 32, 32)
    (root / "runs" / "demo").mkdir(parents=True)
    run.save(root / "runs" / "demo" / "config.json")
    export_all(random_model(run), run, tokenizer, root / "runs" / "demo" / "export", images, ["a cat"])
    write_llava_on(root / "runs" / "llava-clips", root / "runs" / "demo", max_position_embeddings=1024)
    folder = root / "data" / "llava_demo" / "images"
    for i, name in enumerate(make_images(folder, 5)):
        (folder / name).rename(folder / f"unseen-{i:06}.jpg")
    return root


def test_the_readme_s_lines(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    (lines,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    images = place / "data" / "llava_demo" / "images"
    for name in ("cat.jpg", "dog.jpg", "images/1.jpg"):
        (place / name).parent.mkdir(exist_ok=True)
        shutil.copy(images / "unseen-000000.jpg", place / name)
    names: dict = {}
    exec(re.sub(r'"UCSC-VLAA/[^"]+"', '"runs/demo"', lines), names)
    assert names["model"].path == Path("runs/demo")


def test_the_lines_of_the_python_page(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks in order, as one program."""
    monkeypatch.chdir(place)
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "python.md").read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 10
    names: dict = {}
    exec("\n".join(blocks), names)
    assert names["features"].shape == (3, names["model"].embed_dim)
    assert len(names["index"]) == 5
    assert names["similar"][0].path.endswith("unseen-000000.jpg")
    assert len(names["session"].turns) == 2


def kinds(notebook: nbformat.NotebookNode) -> dict[str, set[str]]:
    """Cell → the kinds of its outputs; an image may be a JPEG too."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    kinds_of = {cell.id: {kind for out in cell.outputs for kind in out.get("data", {"text": ""})} for cell in code}
    return {cell: of_cell - {"image/jpeg"} for cell, of_cell in kinds_of.items()}


@pytest.mark.slow
def test_the_notebook_runs(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a fresh kernel in docs/, where Jupyter starts it."""
    (place / "docs").mkdir()
    shutil.copy(TOUR, place / "docs")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(place / "docs" / TOUR.name, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(place / "docs")}}).execute()
    assert kinds(notebook) == kinds(nbformat.read(TOUR, as_version=4))
    outputs = {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}
    printed = {name: "".join(out.get("text", "") for out in parts) for name, parts in outputs.items()}
    assert "5 images" in printed["encoder"]
    assert printed["zero-shot"].count("%") == 5
    assert printed["retrieval"].count("unseen-00000") == 4
    assert outputs["caption"][-1].data["text/plain"].startswith("'")
    assert printed["chat"].count("A: ") == 2
