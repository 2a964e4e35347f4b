"""What MFU is a share of."""

import torch

from clips.common.peaks import peak_flops, stated_peak


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
