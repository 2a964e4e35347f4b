"""Count the FLOPs of a training step by the layers of a model. Both halves compute their MFU from this count.

A multiply-add counts twice. Linear layers, convolutions and attention are counted, as `torch.utils.flop_counter` does;
recomputation that saves memory is not (PaLM, appendix B).
"""

import math
from collections.abc import Iterator

from torch import nn


def forward_flops(module: nn.Module) -> int:
    """Return the FLOPs of one token through the linear layers and convolutions of `module`."""
    return sum(_product(layer) for layer in _layers(module))


def training_flops(module: nn.Module, learns: bool) -> int:
    """Return the FLOPs of one token forward and backward, counted as in `forward_flops`.

    A layer computes a gradient with respect to its weights if they train, and one with respect to its input if a layer
    before it trains.

    Args:
        learns: True if the input of `module` needs a gradient.
    """
    total = 0
    for layer in _layers(module):
        trains = layer.weight.requires_grad
        total += (1 + learns + trains) * _product(layer)
        learns |= trains
    return total


def _layers(module: nn.Module) -> Iterator[nn.Linear | nn.Conv2d]:
    return (layer for layer in module.modules() if isinstance(layer, (nn.Linear, nn.Conv2d)))


def _product(layer: nn.Linear | nn.Conv2d) -> int:
    """Return the FLOPs of one vector by the layer's sizes, because quantised and sharded weights have other shapes."""
    if isinstance(layer, nn.Conv2d):
        return 2 * layer.in_channels * layer.out_channels * math.prod(layer.kernel_size)
    return 2 * layer.in_features * layer.out_features
