"""Models by hub id: which files are fetched from a hub that speaks its protocol, and every command on its cache."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from conftest import script_parser
from huggingface_hub import constants
from tiny_hub import COMMIT, cache_model
from tiny_web import picture, write_export

from clips import CLIPS
from clips.common import hub as hub_module
from clips.common.errors import UserError
from clips.common.hub import resolve
from clips.evaluation.evaluate import evaluate_from_flags
from clips.weights.export import export_from_flags
from clips.weights.load import load_model
from clips.weights.open_clip import write_open_clip
from mllm.encoders.registry import load_vision

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


class Hub(BaseHTTPRequestHandler):
    """The three requests by which huggingface_hub fetches a model; each file holds its own name."""

    def _answer(self, content: bytes, **headers: str) -> None:
        self.send_response(200)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def do_GET(self) -> None:
        *_, name = self.path.split("/resolve/")[0].split("/tree/")[0].split("/revision/")[0].split("/")
        if "/resolve/" in self.path:
            file = self.path.split(COMMIT + "/")[1].encode()
            self._answer(file, ETag=f'"{hashlib.sha1(file).hexdigest()}"', X_Repo_Commit=COMMIT)
            return
        content: object = {"id": f"owner/{name}", "sha": COMMIT, "siblings": [{"rfilename": f} for f in LAYOUTS[name]]}
        if "/tree/" in self.path:
            content = [
                {"type": "file", "path": f, "size": len(f), "oid": hashlib.sha1(f.encode()).hexdigest()}
                for f in LAYOUTS[name]
            ]
        self._answer(json.dumps(content).encode(), Content_Type="application/json")

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        """A test's output is not the place."""


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


@pytest.mark.parametrize(
    ("model", "weights", "expected"),
    [
        ("both", "ANY_WEIGHTS", [LAYOUTS["both"][i] for i in (0, 3, 4, 6, 7)]),
        ("both", "WEIGHT_FILES", [LAYOUTS["both"][i] for i in (0, 1, 3, 4, 6, 7)]),
        ("native", "ANY_WEIGHTS", LAYOUTS["native"]),
        ("transformers", "WEIGHT_FILES", [LAYOUTS["transformers"][i] for i in (0, 1, 2, 4, 5)]),
    ],
)  # fmt: skip
def test_what_is_fetched(
    endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, weights: str, expected: list[str]
) -> None:
    """From the hub, and again from its cache without one."""
    at = {"ENDPOINT": endpoint, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": False}
    at["HUGGINGFACE_CO_URL_TEMPLATE"] = f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    for name, value in at.items():
        monkeypatch.setattr(constants, name, value)
    directory = resolve(f"owner/{model}", "a model", getattr(hub_module, weights))
    assert sorted(str(path.relative_to(directory)) for path in directory.rglob("*.*")) == sorted(expected)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve(f"owner/{model}", "a model", getattr(hub_module, weights)) == directory


def test_what_is_no_model_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name in ("owner/name", "./name"):
        with pytest.raises(UserError, match=f"model: .*{name}"):
            resolve(name, "model")


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


def test_encoders_open_by_hub_id(hub: CLIPS) -> None:
    for layout in ("native", "open_clip"):
        opened = CLIPS.from_pretrained(f"owner/{layout}", device="cpu")
        torch.testing.assert_close(opened.encode_image(picture()), hub.encode_image(picture()), atol=1e-5, rtol=0)
        torch.testing.assert_close(opened.encode_text(TEXTS), hub.encode_text(TEXTS), atol=1e-5, rtol=0)
        loaded = load_model(f"owner/{layout}", "elsewhere")
        assert loaded.path.name == COMMIT
        assert loaded.home == Path("elsewhere") / f"owner--{layout}", "nothing is written into the hub's cache"


def test_vision_encoders_load_by_hub_id(hub: CLIPS, tmp_path: Path) -> None:
    pixels = hub.preprocess(picture())[None]
    expected = load_vision(f"clips:{tmp_path / 'run'}").features(pixels)
    for name in ("clips:owner/hf_vit", "open_clip:hf-hub:owner/open_clip"):
        torch.testing.assert_close(load_vision(name).features(pixels), expected, atol=1e-4, rtol=0)


def test_commands_take_a_hub_id(hub: CLIPS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they write of it lies under runs/, and counts there as any run's export."""
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(["cat", "dog"]):
        (tmp_path / "classes" / name).mkdir(parents=True)
        picture(seed=number).save(tmp_path / "classes" / name / "0.png")
    (tmp_path / "pairs.csv").write_text("jpg,json:org_caption\nclasses/cat/0.png,a cat\nclasses/dog/0.png,a dog\n")
    for flags in (["classes"], ["classes", "--limit", "1"]):  # each has a file of its own
        command = ["--model", "owner/open_clip", "--data", *flags]
        evaluate_from_flags(script_parser("evaluate_clips").parse_args(command))
    files = Path("runs/owner--open_clip").glob("evaluation-classes-*.json")
    evaluations = [json.loads(path.read_text()) for path in files]
    assert {evaluation["limit"] for evaluation in evaluations} == {None, 1}
    assert all("zero_shot_top1" in evaluation["figures"] for evaluation in evaluations)
    export_from_flags(script_parser("export_clips").parse_args(["--model", "owner/native", "--data", "pairs.csv"]))
    again = CLIPS.from_pretrained("runs/owner--native", device="cpu")
    torch.testing.assert_close(again.encode_image(picture()), hub.encode_image(picture()), atol=1e-5, rtol=0)
