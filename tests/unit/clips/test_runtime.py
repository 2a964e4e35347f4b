"""A process: freed memory that is kept, bf16 that is tried, its exit code; the peaks that cards state."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_python

from clips.common import runtime
from clips.common.peaks import peak_flops, stated_peak

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
    monkeypatch.setattr(runtime, "_bf16", {})
    monkeypatch.setattr(runtime, "claims_bf16", lambda _: True)
    monkeypatch.setattr(runtime, "_product_ratio", lambda: ratio)
    assert runtime.has_bf16(torch.device("cpu")) == has


def test_the_ratio_of_two_products_is_that_of_this_processor() -> None:
    emulates = not runtime.claims_bf16(torch.device("cpu"))
    assert runtime._product_ratio() > 8 or not emulates


COLLECTIVES_UNDER_WAY = """
import sys
import torch, torch.distributed as dist
from clips.common.runtime import init_distributed
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


def test_the_name_that_fits_best_counts() -> None:
    assert stated_peak("NVIDIA H100 80GB HBM3") == 989e12
    assert stated_peak("NVIDIA H100 PCIe") == 756e12
    assert stated_peak("NVIDIA A100-SXM4-80GB") == 312e12
    assert stated_peak("NVIDIA GH200 480GB") == 989e12
    assert stated_peak("NVIDIA L40S") == 362e12
    assert stated_peak("Some Card 7") is None


def test_nobody_states_the_peak_of_a_cpu() -> None:
    """A measured one was below what training reached: "158 % of the processor's peak"."""
    assert peak_flops(torch.device("cpu")) is None
