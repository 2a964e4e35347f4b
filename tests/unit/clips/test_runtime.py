"""A process: kept memory, bf16 that is tried, signals, its exit code; the peaks of cards, and the plan of a run."""

import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, FlopCounter, run_python

from clips.common import distributed, runtime
from clips.common.errors import UserError
from clips.common.rehearsal import META, rehearsed_ranks
from clips.common.signals import STOP_SIGNALS, StopSignal, stopped_by
from clips.engine.metrics import CARDS, Machine, peak_flops, stated_peak
from clips.recipes import recipe
from clips.training.prepare import full_batch
from clips.training.rehearsal import built, print_pretraining

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
    ours = run_python(tmp_path / "faults.py").stdout.split()
    theirs = run_python(tmp_path / "faults.py", env={"MALLOC_TRIM_THRESHOLD_": "131072"}).stdout.split()
    assert (ours[0], theirs[0]) == ("True", "False")
    assert int(ours[1]) < 0.2 * int(theirs[1])


@pytest.mark.parametrize(("ratio", "has"), [(1.4, True), (24.0, False)])
def test_a_processor_that_claims_bf16_is_tried(ratio: float, has: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Held to AVX2 by ONEDNN_MAX_CPU_ISA, oneDNN emulates bf16, and a product takes 20 times as long."""
    monkeypatch.setattr(runtime, "BF16", {})
    monkeypatch.setattr(runtime, "claims_bf16", lambda _: True)
    monkeypatch.setattr(runtime, "_product_ratio", lambda: ratio)
    assert runtime.has_bf16(torch.device("cpu")) == has


@pytest.mark.parametrize(
    ("name", "rank", "said"),
    [
        ("cuda:1", "0", r"no GPU 1, torch sees 1 here: name one below cuda:1"),
        ("auto", "1", "start at most 1 ranks"),
        ("cuda", "1", "start at most 1 ranks"),
    ],
)
def test_a_gpu_that_is_not_there_is_named(name, rank, said, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch says "invalid device ordinal", behind a traceback."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", rank)
    with pytest.raises(UserError, match=said):
        runtime.choose_device(name)
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert runtime.choose_device("cuda:0") == runtime.choose_device("auto") == torch.device("cuda", 0)


COLLECTIVES_UNDER_WAY = """
import sys
import threading
import torch, torch.distributed as dist
from clips.common.distributed import init_distributed
init_distributed(torch.device("cpu"))
for _ in range(2000):
    dist.all_reduce(torch.zeros(100_000), async_op=True)
sys.exit(7)
"""


def test_a_process_that_ends_amid_collectives_has_its_own_exit_code() -> None:
    """gloo's threads let go of tensors when Python has ended, and torch then aborts: 134, and a run counts as lost."""
    done = subprocess.run(
        [sys.executable, "-c", COLLECTIVES_UNDER_WAY], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 7, done.stderr


def test_a_process_ends_although_a_thread_of_gloo_never_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "_gloo_threads", lambda: ["R"])
    monkeypatch.setattr(distributed, "SETTLED", 0.05)
    settling = threading.Thread(target=distributed._settle, daemon=True)
    settling.start()
    settling.join(10)
    assert not settling.is_alive()


PEAKS = {
    "NVIDIA H100 80GB HBM3": 989, "NVIDIA H100 PCIe": 756, "NVIDIA H100 NVL": 835, "NVIDIA H200": 989,
    "NVIDIA GH200 480GB": 989, "NVIDIA GH200 144G HBM3e": 989, "NVIDIA B200": 2250, "NVIDIA GB200": 2500,
    "NVIDIA A100-SXM4-80GB": 312, "NVIDIA A100 80GB PCIe": 312, "NVIDIA A100-PCIE-40GB": 312, "NVIDIA A40": 149.7,
    "NVIDIA A10": 125, "NVIDIA A10G": 70, "NVIDIA L4": 121, "NVIDIA L40": 181, "NVIDIA L40S": 362,
    "NVIDIA RTX A6000": 154.8, "NVIDIA RTX 6000 Ada Generation": 364.2, "NVIDIA GeForce RTX 3090": 71,
    "NVIDIA GeForce RTX 4090": 165.2, "AMD Instinct MI300X": 1307.4,
}  # fmt: skip
"""torch's names, and their peaks in TFLOP/s."""
UNKNOWN = ("NVIDIA RTX A4000", "NVIDIA RTX A1000", "NVIDIA GeForce RTX 3090 Ti", "NVIDIA GeForce RTX 4090 Laptop GPU",
           "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA RTX 4000 Ada Generation", "NVIDIA H20", "Card 7")  # fmt: skip
"""Names of which a part is in the table: an A1000 had the peak of an A100."""


def test_a_gpu_has_its_own_peak_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {name: stated_peak(name) for name in PEAKS} == {name: pytest.approx(1e12 * t) for name, t in PEAKS.items()}
    assert [name for name in UNKNOWN if stated_peak(name)] == []
    said: list[str] = []
    for name in ("NVIDIA L40", "NVIDIA RTX A4000"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        peak_flops(torch.device("cuda"), said.append)
    assert peak_flops(torch.device("cpu"), said.append) is None
    assert len(said) == 1
    assert "NVIDIA RTX A4000" in said[0]


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_remembered_and_gives_the_exit_code(number: signal.Signals) -> None:
    if number == signal.SIGHUP:
        signal.signal(number, signal.SIG_DFL)  # these tests may run under nohup
    stop = StopSignal()
    try:
        assert stop.requested == 0
        os.kill(os.getpid(), number)
        assert stop.requested == number
        assert stopped_by(stop.requested).exit_code == 128 + number
    finally:
        stop.restore()
    assert signal.getsignal(number) == stop.before[number]


def test_under_nohup_a_closed_terminal_stops_nothing() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = StopSignal()
    try:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.requested == 0
    finally:
        stop.restore()
        signal.signal(signal.SIGHUP, before)


def test_a_launcher_that_was_killed_before_its_rank_began_is_missed() -> None:
    """`deepspeed` ends at once; its own launcher, which init adopts, then starts the rank."""
    rank = "from clips.common.signals import LAUNCHERS, has_lost; print(has_lost(LAUNCHERS))"
    launcher = 'while [ "$(ps -o ppid= $$)" -eq "$3" ]; do sleep 0.01; done; "$0" -c "$1"; exit'
    words = [launcher, sys.executable, rank, "deepspeed.launcher.launch"]
    env = os.environ | {"CROSS_SIZE": "1", "PYTHONPATH": str(ROOT)}
    command = ["bash", "-c", 'bash -c "$@" $$ &', "deepspeed", *words]
    assert subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout == "True\n"


def test_a_run_goes_on_when_nobody_reads_its_output() -> None:
    code = (
        "import sys; from clips.common.signals import StopSignal; stop = StopSignal()\n"
        "print('ready', flush=True); input(); stop.requested\n"
        "print('a step', file=sys.stderr, flush=True); sys.exit(7)"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True, **pipes) as process:
        assert process.stdout.readline() == "ready\n"
        process.stderr.close()
        process.communicate("\n")
    assert process.returncode == 7


def test_days_follow_from_flops_and_the_share_of_the_peak() -> None:
    machine = Machine("h100", 64, mfu=0.2)
    assert machine.days(86_400 * 64 * 0.2 * 989e12) == pytest.approx(1)
    assert (machine.fits(72e9), machine.fits(72.1e9)) == (True, False)
    assert all(stated_peak(name) for name, _ in CARDS.values())
    for wrong in (("h9", 1, 0.2), ("h100", 0, 0.2), ("h100", 1, 2.0)):
        with pytest.raises(UserError, match="--"):
            Machine(*wrong)


def test_a_phase_that_does_not_fit_is_refused_behind_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    run = recipe("demo")
    print_pretraining(run, Machine("h100", 8, 0.2), "zero0")
    assert "parameters train" in capsys.readouterr().out
    run = run.override(["phases.*.batch_size=16384"])
    with pytest.raises(UserError, match="does not fit"):
        print_pretraining(run, Machine("rtx4090", 1, 0.2), "zero1")
    assert "16,384" in capsys.readouterr().out
    run = run.override(["train.contrastive=global"])
    advice = r"try --set train\.accumulation=2, or more --gpus$"  # nothing that is set, and no smaller stage
    with pytest.raises(UserError, match=advice):
        print_pretraining(run, Machine("rtx4090", 1, 0.2), "zero3")


@pytest.mark.parametrize("gpus", [1, 64])
def test_the_flops_that_a_plan_shows_are_counted_ones(gpus: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Torch's formulas count a step whose texts fill half of their context."""
    run = recipe("s16").override([f"phases.*.batch_size={256 * gpus}"])
    phase = run.phases[0]
    print_pretraining(replace(run, phases=(phase,)), Machine("h100", gpus, 0.2), "zero0")
    (row,) = (line.split("│") for line in capsys.readouterr().out.splitlines() if line.startswith(f"│ {phase.name}"))
    task = built(run, phase)
    words, share = run.model.text.context_length // 2, run.task.caption_share
    batch = full_batch(run.model, run.task, phase.image_size, 256, META, words=words, share=share)
    with rehearsed_ranks(gpus), FlopCounter() as counted:
        task(task.to_device(batch, META))[0].backward()
    assert float(row[4].replace(",", "")) == pytest.approx(counted.flops / 256 / 1e9, abs=0.05)
