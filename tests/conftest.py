"""Fixtures that every test may use: tiny configurations, and a way to start real commands."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell's background job, and so would be all its children
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # under nohup
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import warm
from filelock import FileLock
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from clips.config import (
    CaptionerConfig,
    CaptionsConfig,
    DataConfig,
    ModelConfig,
    OptimConfig,
    PhaseConfig,
    RunConfig,
    TaskConfig,
    TextConfig,
    TrainConfig,
    VisionConfig,
)
from clips.model.clips import CLIPSModel

ROOT = Path(__file__).resolve().parent.parent
collect_ignore_glob = [] if torch.cuda.is_available() else ["gpu/*"]
"""Without a GPU its tests are no tests: neither skipped nor passed, but named at the end."""

if not torch.cuda.is_available():  # which no fork could use after its parent has looked for it
    subprocess.Popen = warm.Popen


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("numprocesses", None):  # once for all the processes of xdist
        warm.start()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if collect_ignore_glob:
        count = len(list((ROOT / "tests" / "gpu").glob("test_*.py")))
        terminalreporter.write_line(f"tests/gpu: {count} files NOT RUN, torch sees no GPU here", yellow=True)


class FlopCounter(TorchDispatchMode):
    """Counts by torch's formulas; `FlopCounterMode` follows modules, too, and so keeps what a checkpoint lets go."""

    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        kernel = getattr(torch.ops.aten, func._overloadpacket.__name__.replace("_for_cpu", ""), func._overloadpacket)
        if counted := flop_registry.get(kernel):
            count = counted(*args, **(kwargs or {}), out_val=out)
            # A fused kernel computes scores a second time in its backward pass, the fifth of five products.
            self.flops += count * 4 // 5 if re.search("attention.*backward", func.__name__) else count
        return out


def tiny_run(
    *, kind: str = "adamw", inputs: str = "queries", pad_mask: bool = True, precision: str = "fp32"
) -> RunConfig:
    """A run whose model has every part and a few thousand parameters."""
    return RunConfig(
        recipe="tiny",
        model=ModelConfig(
            vision=VisionConfig(width=32, layers=2, heads=2, image_size=32, patch_size=16),
            text=TextConfig(width=32, layers=2, heads=2, context_length=16, vocab_size=64, pad_mask=pad_mask),
            captioner=CaptionerConfig(width=32, layers=1, heads=2, length=16, inputs=inputs),
            embed_dim=32,
        ),
        captions=CaptionsConfig(tokenizer="wordpiece"),
        task=TaskConfig(caption_chunk=7),
        data=DataConfig(workers=0),
        optim=OptimConfig(kind=kind),
        phases=(PhaseConfig(name="a", samples=64, batch_size=8, lr=1e-2, muon_lr=2e-2, image_size=32),),
        train=TrainConfig(precision=precision),
    )


def dropping(run: RunConfig) -> RunConfig:
    """`run` with patches of 8 px; in training its tower sees half of them and its captioner 0.4 of these, 8 and 3 of an
    image of 32 px. Two thirds of the captions are predicted."""
    vision = replace(run.model.vision, patch_size=8, patch_dropout=0.5)
    return replace(
        run,
        model=replace(run.model, vision=vision, captioner=replace(run.model.captioner, image_token_keep=0.4)),
        task=replace(run.task, caption_share=2 / 3),
    )


def drawn_tokens(seed: int, *, size: int = 8) -> dict[str, torch.Tensor]:
    """What the loader draws for a run that is `dropping` and its images of 16 patches, to go with `tiny_batch`."""
    rng = random.Random(seed)

    def draw(there: int, kept: int) -> torch.Tensor:
        return torch.tensor([sorted(rng.sample(range(there), kept)) for _ in range(size)])

    caption = tiny_batch(seed, size=size)["caption"]
    caption[seed % 3 :: 3] = 0
    return {"patches": draw(16, 8), "image_tokens": draw(8, 3), "caption": caption}


def random_model(run: RunConfig, seed: int = 0) -> CLIPSModel:
    """A model none of whose weights is zero, unlike at the start of training: every part shows in the output."""
    torch.manual_seed(seed)
    model = CLIPSModel(run.model, pad_id=0)
    for parameter in model.parameters():
        if parameter.ndim == 2 and not parameter.any():
            torch.nn.init.xavier_uniform_(parameter)
        elif parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def tiny_batch(seed: int, *, size: int = 8) -> dict[str, torch.Tensor]:
    """Random images and ids in the layout of clips/data/loader.py; pad 0, bos 1, eos 2, CLS 3."""
    g = torch.Generator().manual_seed(seed)

    def text(slots: int) -> torch.Tensor:
        ids = torch.zeros(size, slots, dtype=torch.long)
        for row in range(size):
            words = int(torch.randint(1, slots - 3, (1,), generator=g))
            ids[row, : words + 2] = torch.cat(
                [torch.tensor([1]), torch.randint(4, 64, (words,), generator=g), torch.tensor([2])]
            )
        ids[:, -1] = 3
        return ids

    caption = text(15)[:, :-1]
    return {"images": torch.randn(size, 3, 32, 32, generator=g), "web": text(12), "sub": text(10), "caption": caption}


def load_script(path: str) -> ModuleType:
    """The program at `path` of the repository as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def script_parser(name: str) -> argparse.ArgumentParser:
    """That of scripts/`name`.py."""
    return load_script(f"scripts/{name}.py").parser()


def run_python(
    *arguments: str | Path, ranks: int = 1, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a script as a user would; several ranks through torchrun. It has to end without an error."""
    launcher = [] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [sys.executable, *launcher, *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(env or {})}
    done = run_group(command, cwd=ROOT, env=env, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def run_group(
    command: list[str], *, timeout: float, stderr: int = subprocess.PIPE, **popen: Any
) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run`, but after the timeout nothing that the command started is left to slow the next tests."""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=stderr, text=True, start_new_session=True, **popen
    ) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """In CI nothing is skipped in silence: what a test needs is installed by the scripts, or the test fails."""
    report = yield
    if os.environ.get("CI") == "true" and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped, which CI counts as failed: {report.longrepr}"
    return report


@pytest.fixture(autouse=True)
def _one_thread(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    if request.node.get_closest_marker("draws"):
        monkeypatch.setenv(warm.DRAWS, "1")


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPS_MLLM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def one_pixel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Charts are one pixel, as in forked processes (tests/warm.py): drawing them takes most of a report's time."""
    monkeypatch.setattr("clips.common.page.png", lambda *_: warm.PIXEL)


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """made_once(name, make): a folder `make(folder)` fills once per session, also under xdist. Do not change it."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def made(name: str, make: Callable[[Path], object]) -> Path:
        folder, done = shared / "made" / name, shared / "made" / f"{name}.done"
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not done.exists():
                make(folder)
                done.touch()
        return folder

    return made


@pytest.fixture(scope="session")
def shards(made_once: Callable[[str, Callable[[Path], object]], Path]) -> tuple[str, ...]:
    """Flags of the pretraining command that name small real data. Do not change the data."""
    from launched import small_data, splits  # which imports from here

    return splits(made_once("shards", small_data))
