"""What the tests of LLaVA training share: a folder with all that both stages need, and both ways of starting one."""

import atexit
import contextlib
import functools
import importlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import deepspeed.utils.groups
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, run_group
from lab_runs import run_main
from tiny_mllm import make_images, write_llm, write_run
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from clips.common.launch import launcher
from clips.common.signals import STOP_SIGNALS
from clips.common.tensors import read_weights
from mllm.encoders.load import load_vision
from mllm.model.llava import build_model
from mllm.model.llm import load_llm
from mllm.model.projector import save_projector
from mllm.training.config import parse_stage
from mllm.training.run import run_stage
from mllm.training.trainer import TrainingModel

COMMON = ["--model_name_or_path", "llm", "--image_folder", "images", "--device", "cpu", "--batch_size", "4"]
COMMON += ["--logging_steps", "1", "--num_train_epochs", "2", "--bf16", "False", "--cache_dir", "cache"]
ALIGN = ["--stage", "1", "--data_path", "align.json", *COMMON]
INSTRUCT = ["--stage", "2", "--data_path", "instruct.json", "--learning_rate", "1e-3", *COMMON]
START = ["--pretrain_mm_mlp_adapter", "start.bin"]
WORKER = ROOT / "tests" / "llava_worker.py"
TRAIN = ROOT / "scripts" / "train_llava.py"


def write_place(root: Path) -> Path:
    """`root` with an encoder, a language model, data of 20 images and 12 text-only samples, and a projector."""
    return shutil.copytree(_made_place(), root, dirs_exist_ok=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_place(tmp_path_factory.mktemp("llava"))


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """Every batch that is trained on, as the model gets it."""
    seen: list[dict] = []
    original = TrainingModel.forward

    def forward(self, inputs, *rest):
        seen.append({name: value.clone() for name, value in inputs.items() if isinstance(value, torch.Tensor)})
        return original(self, inputs, *rest)

    monkeypatch.setattr(TrainingModel, "forward", forward)
    return seen


@functools.cache
def _made_place() -> Path:
    root = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    write_run(root / "runs" / "clips-demo")
    write_llm(root / "llm", initializer_range=0.1, hidden_size=64, intermediate_size=128)
    names = make_images(root / "images", 20)
    align = [conversation(name, [("What?", "A red cat " * (1 + i % 3))]) for i, name in enumerate(names)]
    instruct = [
        conversation(name, [("What is in the picture?", "two dogs " * (1 + i % 4)), ("And?", "cat")])
        for i, name in enumerate(names)
    ]
    instruct += [conversation(None, [("Say it", "the picture " * (1 + i % 2))]) for i in range(12)]
    (root / "align.json").write_text(json.dumps(align))
    (root / "instruct.json").write_text(json.dumps(instruct))
    save_projector(build(root).model.multi_modal_projector, root / "start.bin")
    return root


def conversation(image: str | None, turns: list[tuple[str, str]]) -> dict:
    messages = [
        {"from": who, "value": text} for turn in turns for who, text in zip(("human", "gpt"), turn, strict=True)
    ]
    if image is None:
        return {"id": "text", "conversations": messages}
    messages[0]["value"] = f"<image>\n{messages[0]['value']}"
    return {"id": image, "image": image, "conversations": messages}


def build(place: Path) -> LlavaForConditionalGeneration:
    return build_model(load_vision("clips", runs=place / "runs"), load_llm(str(place / "llm")))[0]


@contextlib.contextmanager
def process_kept() -> Iterator[None]:
    """A command takes over signals, sets RANK and the like, joins a process group; after it all is as before."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    environment = dict(os.environ)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        os.environ.clear()
        os.environ.update(environment)
        if dist.is_initialized():
            dist.destroy_process_group()
        importlib.reload(deepspeed.utils.groups)  # it keeps groups for the life of a process


def run(place: Path, monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
    """One stage in this process."""
    monkeypatch.chdir(place)
    with process_kept():
        run_stage(parse_stage(list(flags)))


def launch(place: Path, script: Path, *words: str, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    """Ranks as train_llava.sh starts them; a hang ends as a failure."""
    command = [sys.executable, *launcher(ranks), str(script), *words]
    env = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return run_group(command, cwd=place, env=env, timeout=300)


def command(place: Path, monkeypatch: pytest.MonkeyPatch, script: str, *words: str | Path, code: int = 0) -> str:
    """What a command of scripts/ says that ends with `code`, as its user starts it, but in this process."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("COLUMNS", "400")  # no path is broken over lines
    output = io.StringIO()
    with process_kept(), contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
        ended = run_main(monkeypatch, script, *words)
    assert ended == code, output.getvalue()
    assert "Traceback" not in output.getvalue()
    return output.getvalue()


def losses(run_dir: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines]


def results(run_dir: Path) -> dict[str, Tensor]:
    """Every weight that a run leaves."""
    tensors = {}
    for path in sorted(run_dir.rglob("*.safetensors")) + sorted(run_dir.rglob("*.bin")):
        tensors |= {f"{path.relative_to(run_dir)}:{name}": tensor for name, tensor in read_weights(path).items()}
    return tensors


def assert_same_results(run_dir: Path, other: Path, tolerance: float = 0.0) -> dict[str, Tensor]:
    """Both runs left the same weights, bit for bit unless there is a tolerance. Returns those of `run_dir`."""
    weights, others = results(run_dir), results(other)
    assert weights.keys() == others.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, others[name], atol=tolerance, rtol=tolerance, msg=name)
    return weights
