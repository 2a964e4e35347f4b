"""Whole programs side by side: what is timed is what is said, on equal terms."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from conftest import ROOT, run_python

from clips.common.errors import CommandError, UserError
from clips.data.demo import ensure_demo
from clips.model.clips import CLIPSModel
from clips.studies import program
from clips.studies.program import THEIRS, Turn
from clips.training.cli import config_from_flags, parser

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_demo(tmp_path_factory.mktemp("demo") / "demo", sizes={"train": 60, "val": 8, "test": 8})


# ------------------------------------------------------------------------------------------------------------ watching
STEADY = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("worker", child.pid, flush=True)
time.sleep(0.4)
for step in range(0, 200, 2):
    print(f"Train Epoch: 0 [ {10 * step:>4}/2000 (1%)] Loss: 1", file=sys.stderr, flush=True)
    end = time.process_time() + 0.01
    while time.process_time() < end:
        pass
    time.sleep(0.01)
"""


def test_a_program_is_timed_by_its_log_and_ended_with_its_workers(tmp_path: Path) -> None:
    script = tmp_path / "steady.py"
    script.write_text(STEADY.replace('"worker", child.pid', f'child.pid, file=open("{tmp_path}/pid", "w")'))
    turn = program.watch([sys.executable, str(script)], THEIRS, 400, CPU)
    assert 0 < turn.samples_per_s < 20 / 0.02  # 20 samples in 0.02 s and more
    assert 0 < turn.samples_per_s < turn.samples_per_cpu_s < 1.5 * 20 / 0.01  # counted in hundredths of a second
    assert turn.startup_s >= 0.4
    assert turn.peak_memory_MB > 1
    worker = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 20
    while psutil.pid_exists(worker) and psutil.Process(worker).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_program_that_ends_early_is_told_with_its_last_words() -> None:
    with pytest.raises(CommandError, match=r"ended with 3 before its turn:\nno such shard"):
        program.watch([sys.executable, "-c", "print('no such shard'); exit(3)"], THEIRS, 400, CPU)


def test_a_python_without_the_trainer_is_refused() -> None:
    with pytest.raises(UserError, match=r"nowhere cannot be started"):
        program.compare_programs("demo", device=CPU, repeats=1, train=Path(), their_python="/nowhere")


def test_ratios_are_of_turns() -> None:
    ours, theirs = [Turn(s, 9, 1, 50) for s in (30, 10, 21)], [Turn(s, 3, 2, 100) for s in (10, 5, 10)]
    found = program.summary(ours, theirs)
    assert found["ratios"] == {
        "samples_per_s": pytest.approx(2.1), "samples_per_s_lowest": 2, "samples_per_s_highest": 3,
        "samples_per_cpu_s": 3, "peak_memory": 0.5,
    }  # fmt: skip
    assert (found["ours"]["samples_per_s"], found["theirs"]["startup_s"]) == (21, 2)
    assert [turn["samples_per_s"] for turn in found["theirs"]["turns"]] == [10, 5, 10]


# --------------------------------------------------------------------------------------------------------- equal terms
@pytest.mark.parametrize("size", ["demo", "s16"])
def test_both_programs_train_the_same(size: str, demo: Path, tmp_path: Path) -> None:
    """open_clip's own parser takes the flags, and what they and its configuration say is what our run says."""
    import open_clip
    from open_clip_train.params import parse_args

    run = config_from_flags(parser().parse_args(program.our_flags(size, CPU, demo / "train", tmp_path)))
    stock = program.write_stock_config(run, tmp_path)
    theirs = parse_args(program.their_flags(run, CPU, demo / "train", stock, tmp_path / "logs"))
    phase = run.phases[0]
    assert (theirs.batch_size, theirs.train_num_samples) == (phase.batch_size, phase.samples)
    assert (theirs.lr, theirs.wd, theirs.workers) == (phase.lr, run.optim.weight_decay, run.data.workers)
    assert theirs.log_every_n_steps == run.train.log_every
    assert theirs.train_data.count("::") == len(list((demo / "train").glob("*.tar"))) - 1
    assert (theirs.precision == "amp_bf16") == (run.train.precision == "bf16")
    assert not run.train.activation_checkpointing
    model, _, _ = open_clip.create_model_and_transforms(theirs.model, output_dict=True)
    assert model.visual.image_size == (phase.image_size, phase.image_size)
    theirs.distill, theirs.rank, theirs.world_size = False, 0, 1  # as its main sets them
    assert type(open_clip.create_loss(theirs)).__name__ == "ClipLoss"
    ours = CLIPSModel(run.model, pad_id=0)
    assert len(model.visual.transformer.resblocks) == run.model.vision.layers
    assert len(model.text.transformer.resblocks) == run.model.text.layers
    # Theirs has no patch bias, and a CLS of the text that is no token.
    stock_size = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert stock_size + run.model.vision.width - run.model.text.width == ours.parameter_counts()["total"]
    texts = open_clip.get_tokenizer(theirs.model)(["a red cat"])
    assert texts.shape[1] == run.model.text.context_length - 1


@pytest.mark.slow
def test_both_programs_run(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("webdataset", reason="open_clip's trainer needs it: pip install 'open_clip_torch[training]'")
    monkeypatch.setitem(program.SIZES, "demo", ("clip_baseline", 8, 10))
    found = program.compare_programs("demo", device=CPU, repeats=1, train=demo / "train", their_python=sys.executable)
    assert all(found[name]["samples_per_s"] > 0 for name in ("ours", "theirs"))


FAULTS = """
import resource, torch
from clips.common.runtime import keep_freed_memory
print(keep_freed_memory())
for turn in range(6):
    if turn == 1:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(10_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="an option of glibc")
def test_freed_memory_is_kept_unless_the_user_says_otherwise(tmp_path: Path) -> None:
    """40 MB five times over are 48,828 pages of 4 KB."""
    (tmp_path / "faults.py").write_text(FAULTS)
    kept = run_python(tmp_path / "faults.py").stdout.split()
    asked = run_python(tmp_path / "faults.py", env={"MALLOC_TRIM_THRESHOLD_": "131072"}).stdout.split()
    assert (kept[0], asked[0]) == ("True", "False")
    assert int(kept[1]) < 0.2 * int(asked[1])


BITS = """
import hashlib, torch
from dataclasses import replace
from conftest import load_script
from clips.common.runtime import init_distributed
from clips.data.tokenizer import build_tokenizer
from clips.recipes import recipe
from clips.studies.benchmark import clips_engine
from clips.training.prepare import fullest_shape
from clips.training.step import optimizer_step
CPU = torch.device("cpu")
init_distributed(CPU)
run = recipe("demo").override(["train.precision=bf16"])
torch.manual_seed(0)
random_batch = load_script("tools/gpu_report.py").random_batch
batches = [random_batch(run, replace(fullest_shape(run, run.phases[0], 16, 1), texts=(n, n))) for n in (20, 30, 20)]
engine = clips_engine(run, build_tokenizer("wordpiece", ["a cat"] * 8, vocab_size=run.model.text.vocab_size), CPU)
for batch in batches:
    optimizer_step(engine, [batch])
digest = hashlib.sha256()
for _, weights in sorted(engine.state.gather_weights().items()):
    digest.update(weights.numpy().tobytes())
print(digest.hexdigest())
"""
AS_BEFORE = {
    "MALLOC_TRIM_THRESHOLD_": "131072",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1024",
    "LRU_CACHE_CAPACITY": "1024",
    "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
}


@pytest.mark.slow
def test_memory_that_is_kept_and_kernels_that_are_not_change_no_bit(tmp_path: Path) -> None:
    """Three steps of the demo's model: with the settings of a CPU's process, and with glibc's and oneDNN's own."""
    (tmp_path / "bits.py").write_text(BITS)
    found = [run_python(tmp_path / "bits.py", env=env) for env in ({"PYTHONPATH": AS_BEFORE["PYTHONPATH"]}, AS_BEFORE)]
    assert all(done.returncode == 0 for done in found), found[0].stderr[-3000:] + found[1].stderr[-3000:]
    kept, asked = (done.stdout.splitlines()[-1] for done in found)
    assert len(kept) == 64
    assert kept == asked


KERNELS = """
import sys, torch
from clips.common.runtime import bound_kernel_caches, keep_freed_memory
keep_freed_memory()
if sys.argv[1] == "bounded":
    bound_kernel_caches()
layer = torch.nn.Linear(128, 512)
for turn in range(500):
    if turn == 200:
        before = open("/proc/self/status").read()
    with torch.autocast("cpu", torch.bfloat16):
        layer(torch.randn(300 + turn, 128)).float().sum().backward()
    layer.weight.grad = None
after = open("/proc/self/status").read()
print(*(int(text.partition("VmRSS:")[2].split()[0]) // 1000 for text in (before, after)))
"""


@pytest.mark.slow
@pytest.mark.cold  # oneDNN reads the bound once in a process
@pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="bf16 is emulated here")
def test_products_of_many_sizes_do_not_fill_the_memory(tmp_path: Path) -> None:
    """300 batches of other lengths: what oneDNN keeps of them without a bound is hundreds of MB."""
    (tmp_path / "kernels.py").write_text(KERNELS)
    grown = {}
    for how in ("bounded", "unbounded"):
        env = AS_BEFORE if how == "unbounded" else None  # a test's process can hold the bounds in its environment
        before, after = map(int, run_python(tmp_path / "kernels.py", how, env=env).stdout.split())
        grown[how] = after - before
    assert grown["unbounded"] > 100
    assert grown["bounded"] < grown["unbounded"] / 3  # 20 MB with torch 2.13, 31 MB with torch 2.15
