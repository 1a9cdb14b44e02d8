"""Activations are modules without parameters, so that they can be chosen and exchanged."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from robustscale.models.basic import Basic
from robustscale.models.network import build
from robustscale.models.resnet import ResNet
from robustscale.models.resnet_cifar import ResNetCifar
from robustscale.models.vgg import VGG
from robustscale.models.wide_resnet import WideResNet
from robustscale.types import DataSpec, Model

SPEC = DataSpec(3, 32, 32, 10, (0.5,) * 3, (0.25,) * 3)
PLACES: list[tuple[Model, int]] = [
    (Basic(channels=4, hidden=8), 3),
    (ResNet(width=0.125), 17),
    (ResNet(depth=50, width=0.125), 49),
    (ResNetCifar(8, base=4), 7),
    (WideResNet(10, 1), 7),
    (VGG(), 8),
]
each = pytest.mark.parametrize("model, places", PLACES, ids=lambda value: type(value).__name__)


def activations(network: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(m, kind) for m in network.modules())


@each
def test_every_place_has_its_own(model: Model, places: int) -> None:
    with torch.device("meta"):
        relu = model.build(SPEC)
        silu = dataclasses.replace(model, activation="silu").build(SPEC)  # type: ignore[type-var]
    assert (activations(relu, nn.ReLU), activations(relu, nn.SiLU)) == (places, 0)
    assert (activations(silu, nn.ReLU), activations(silu, nn.SiLU)) == (0, places)
    assert list(relu.state_dict()) == list(silu.state_dict())


@each
def test_every_one_is_called_once_a_forward(model: Model, places: int) -> None:
    network = build(dataclasses.replace(model, activation="silu"), SPEC).eval()  # type: ignore[type-var]
    called: list[nn.Module] = []
    for module in network.modules():
        if isinstance(module, nn.SiLU):
            module.register_forward_hook(lambda layer, _inputs, _output: called.append(layer))
    with torch.no_grad():
        network(torch.zeros(1, 3, 32, 32))
    assert len(called) == len(set(called)) == places
