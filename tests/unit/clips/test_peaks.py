"""What MFU is a share of."""

from __future__ import annotations

import torch

from clips.common.peaks import peak_flops, stated_peak


def test_the_name_that_fits_best_counts() -> None:
    assert stated_peak("NVIDIA H100 80GB HBM3") == 989e12
    assert stated_peak("NVIDIA H100 PCIe") == 756e12
    assert stated_peak("NVIDIA A100-SXM4-80GB") == 312e12
    assert stated_peak("NVIDIA GH200 480GB") == 989e12
    assert stated_peak("NVIDIA L40S") == 362e12
    assert stated_peak("Some Card 7") is None


def test_a_cpu_is_measured_and_says_so() -> None:
    speed, where = peak_flops(torch.device("cpu"), torch.float32)
    assert 1e8 < speed < 1e15
    assert where == "a matrix product in float32, measured"
    assert peak_flops(torch.device("cpu"), torch.float32) == (speed, where)  # once
