"""Building: normalisation, and weights as a function of the seed alone."""

from __future__ import annotations

import pytest
import torch

from robustscale.errors import InputError
from robustscale.models.basic import Basic
from robustscale.models.network import build
from robustscale.models.normalize import Normalize
from robustscale.models.resnet_cifar import ResNetCifar
from robustscale.models.torchvision_zoo import TorchvisionZoo
from robustscale.types import DataSpec, Model

SPEC = DataSpec(1, 8, 8, 10, (0.3,), (0.2,))
RGB = DataSpec(3, 32, 32, 10, (0.1, 0.2, 0.3), (0.5, 0.4, 0.2))


@pytest.mark.parametrize(
    "model, spec", [(Basic(), SPEC), (ResNetCifar(8), SPEC), (TorchvisionZoo("mobilenet_v3_small"), RGB)], ids=str
)
def test_weights_are_a_function_of_the_seed(model: Model, spec: DataSpec) -> None:
    torch.manual_seed(1)
    first = build(model, spec, seed=7).state_dict()
    torch.manual_seed(2)
    again, other = build(model, spec, seed=7).state_dict(), build(model, spec, seed=8).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_building_leaves_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    build(Basic(), SPEC, seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    with pytest.raises(InputError):
        build(ResNetCifar(8), SPEC._replace(height=2), seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_first_layer_normalises_each_channel() -> None:
    x = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    found = Normalize(RGB.mean, RGB.std)(x)
    for channel in range(3):
        torch.testing.assert_close(found[:, channel], (x[:, channel] - RGB.mean[channel]) / RGB.std[channel])


def test_network_is_the_body_of_normalised_images() -> None:
    network = build(Basic(), RGB).eval()
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(network(x), network.body(network.normalize(x)))
    assert {"normalize.mean", "normalize.std"} <= set(network.state_dict())
    assert not any(name.startswith("normalize") for name, _ in network.named_parameters())


@pytest.mark.parametrize(
    "spec, message",
    [
        (SPEC._replace(classes=1), "data: 1 classes"),
        (SPEC._replace(mean=(0.1, 0.2, 0.3), std=(1.0, 1.0, 1.0)), "data.mean, data.std: 3 numbers for images of 1 ch"),
        (SPEC._replace(std=(0.0,)), "data.std: (0.0,) must be positive"),
        (RGB._replace(std=(1.0,)), "data.mean, std: 3 and 1 numbers"),
    ],
)
def test_data_that_cannot_be_normalised_is_refused(spec: DataSpec, message: str) -> None:
    with pytest.raises(InputError) as error:
        build(Basic(), spec)
    assert str(error.value).startswith(message)
