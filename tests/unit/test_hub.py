"""Models by hub id: which files are fetched, and every command on the cache that a download leaves."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import script_parser
from huggingface_hub.utils import filter_repo_objects
from tiny_mllm import make_image, write_export

from clips import CLIPS
from clips.common import hub as hub_module
from clips.common.hub import resolve
from clips.evaluation.evaluate import evaluate_from_flags
from clips.weights.export import export_from_flags
from clips.weights.load import load_model
from clips.weights.open_clip import write_open_clip
from mllm.encoders.load import load_vision

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TEXTS = ["a dog", "a cat at a dog"]
LAYOUTS = {
    "both": [
        "config.json", "model.safetensors", "pytorch_model.bin", "open_clip_config.json", "open_clip_model.safetensors",
        "open_clip_pytorch_model.bin", "preprocessor_config.json", "vocab.txt",
    ],
    "native": ["config.json", "model.safetensors", "tokenizer/tokenizer.json", "tokenizer/special.json"],
    "transformers": [
        "config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.bin",
        "tokenizer.model", "chat_template.jinja", "onnx/model.safetensors", "original/weights.bin",
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("model", "weights", "expected"),
    [
        ("both", "ANY_WEIGHTS", [LAYOUTS["both"][i] for i in (0, 3, 4, 6, 7)]),
        ("both", "WEIGHT_FILES", [LAYOUTS["both"][i] for i in (0, 1, 3, 4, 6, 7)]),
        ("native", "ANY_WEIGHTS", LAYOUTS["native"]),
        ("transformers", "WEIGHT_FILES", [LAYOUTS["transformers"][i] for i in (0, 1, 2, 4, 5)]),
    ],
)  # fmt: skip
def test_what_is_fetched(tmp_path, monkeypatch, model, weights, expected):
    def download(name: str, **patterns: list[str]) -> str:
        for file in filter_repo_objects(LAYOUTS[name.removeprefix("owner/")], **patterns):
            (tmp_path / file).parent.mkdir(exist_ok=True)
            (tmp_path / file).touch()
        return str(tmp_path)

    monkeypatch.setattr(hub_module, "snapshot_download", download)
    directory = resolve(f"owner/{model}", "a model", getattr(hub_module, weights))
    assert sorted(str(path.relative_to(directory)) for path in directory.rglob("*.*")) == sorted(expected)


def cache_model(cache: Path, hub_id: str, directory: Path) -> None:
    """Put the files of `directory` into the hub's cache as the newest version of `hub_id`."""
    place = cache / f"models--{hub_id.replace('/', '--')}"
    snapshot = place / "snapshots" / COMMIT
    for number, file in enumerate(path for path in sorted(directory.rglob("*")) if path.is_file()):
        blob, link = place / "blobs" / f"{number:040x}", snapshot / file.relative_to(directory)
        for path in (blob, link):
            path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, blob)
        link.symlink_to(blob)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(COMMIT)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CLIPS:
    """owner/native, owner/open_clip and owner/hf_vit are the three exports of the model that is returned."""
    model = write_export(tmp_path / "run")
    opened = CLIPS.from_pretrained(tmp_path / "run", device="cpu")
    write_open_clip(model, opened.tokenizer, tmp_path / "run" / "export" / "open_clip")
    for layout in ("native", "open_clip", "hf_vit"):
        cache_model(tmp_path / "hub", f"owner/{layout}", tmp_path / "run" / "export" / layout)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return opened


def test_encoders_open_by_hub_id(hub: CLIPS, tmp_path: Path) -> None:
    for layout in ("native", "open_clip"):
        opened = CLIPS.from_pretrained(f"owner/{layout}", device="cpu")
        torch.testing.assert_close(opened.encode_image(make_image()), hub.encode_image(make_image()), atol=1e-5, rtol=0)
        torch.testing.assert_close(opened.encode_text(TEXTS), hub.encode_text(TEXTS), atol=1e-5, rtol=0)
        loaded = load_model(f"owner/{layout}", "elsewhere")
        assert loaded.path.name == COMMIT
        assert loaded.home == Path("elsewhere") / f"owner--{layout}", "nothing is written into the hub's cache"
    pixels = hub.preprocess(make_image())[None]
    expected = load_vision(f"clips:{tmp_path / 'run'}").features(pixels)
    for name in ("clips:owner/hf_vit", "open_clip:hf-hub:owner/open_clip"):
        torch.testing.assert_close(load_vision(name).features(pixels), expected, atol=1e-4, rtol=0)


def test_commands_take_a_hub_id(hub: CLIPS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they write of it lies under runs/, and counts there as any run's export."""
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(["cat", "dog"]):
        (tmp_path / "classes" / name).mkdir(parents=True)
        make_image(seed=number).save(tmp_path / "classes" / name / "0.png")
    (tmp_path / "pairs.csv").write_text("jpg,json:org_caption\nclasses/cat/0.png,a cat\nclasses/dog/0.png,a dog\n")
    for flags in (["classes"], ["classes", "--limit", "1"]):  # each has a file of its own
        command = ["--model", "owner/open_clip", "--data", *flags]
        evaluate_from_flags(script_parser("evaluate_clips").parse_args(command))
    files = Path("runs/owner--open_clip").glob("evaluation-classes-*.json")
    evaluations = [json.loads(path.read_text()) for path in files]
    assert {evaluation["limit"] for evaluation in evaluations} == {None, 1}
    assert all("zero_shot_top1" in evaluation["metrics"] for evaluation in evaluations)
    export_from_flags(script_parser("export_clips").parse_args(["--model", "owner/native", "--data", "pairs.csv"]))
    again = CLIPS.from_pretrained("runs/owner--native", device="cpu")
    torch.testing.assert_close(again.encode_image(make_image()), hub.encode_image(make_image()), atol=1e-5, rtol=0)
