"""A network's features: what its last linear layer turns into logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from robustscale.fields import require
from robustscale.noise import Noise, drawing
from robustscale.types import DataSpec


@contextmanager
def features(network: nn.Module) -> Iterator[list[Tensor]]:
    """The features (N, D) of each forward made while the block runs, in order, with their graph.

    The network may be wrapped by DDP: what is watched is the layer inside, so the forwards are ordinary ones. Raises
    InputError for a network without a linear layer.
    """
    kept: list[Tensor] = []
    handle = _last_linear(network).register_forward_pre_hook(lambda _layer, inputs: kept.append(inputs[0]))
    try:
        yield kept
    finally:
        handle.remove()


def require_features(network: nn.Module, data: DataSpec) -> None:
    """Raise InputError unless the network's last linear layer gives the logits, of one vector an image."""
    last, logits, inputs = _last_linear(network), [], []

    def keep(_layer: nn.Module, given: tuple[Any, ...], output: Tensor) -> None:
        inputs.append(given[0])
        logits.append(output)

    noise = Noise.of(0, torch.arange(2), "features")
    modes = [(m, m.training) for m in network.modules()]
    handle = last.register_forward_hook(keep)
    try:
        with torch.no_grad(), drawing(noise):
            found = network.eval()(noise.uniform(data.channels, data.height, data.width))
    finally:
        handle.remove()
        for m, training in modes:
            m.training = training
    require(
        len(logits) == 1 and inputs[0].dim() == 2 and torch.equal(logits[0], found),
        "features: the network's logits are not those of its last linear layer; take another model",
    )


def _last_linear(network: nn.Module) -> nn.Linear:
    layers = [m for m in network.modules() if isinstance(m, nn.Linear)]
    require(len(layers) > 0, "features: the network has no linear layer, whose input they are; take another model")
    return layers[-1]
