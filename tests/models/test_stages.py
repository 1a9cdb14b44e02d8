"""Every network as a row of stages."""

from __future__ import annotations

import pytest

from robustscale.models.basic import Basic
from robustscale.models.conditional import Conditional
from robustscale.models.network import shapes
from robustscale.models.resnet import ResNet
from robustscale.models.resnet_cifar import ResNetCifar
from robustscale.models.slimmable import Slimmable
from robustscale.models.spectral_norm import SpectralNorm
from robustscale.models.stages import stages, within
from robustscale.models.torchvision_zoo import TorchvisionZoo
from robustscale.models.vgg import VGG
from robustscale.models.wide_resnet import WideResNet
from robustscale.types import DataSpec, Model

SPEC = DataSpec(3, 64, 64, 10, (0.5,) * 3, (0.25,) * 3)
ROWS: dict[str, tuple[Model, int, tuple[str, ...], tuple[str, ...]]] = {
    "resnet": (ResNet(), 10, ("conv1", "bn1"), ("fc",)),
    "resnet 50": (ResNet(50), 18, ("conv1", "bn1"), ("fc",)),
    "wide": (WideResNet(16, 1), 8, ("conv1",), ("fc",)),
    "vgg": (VGG(), 9, ("features.0", "features.1"), ("fc",)),
    "basic": (Basic(), 4, ("conv1",), ("fc2",)),
    "around": (Conditional(model=ResNetCifar(8, 4)), 5, ("body.conv1", "body.bn1"), ("body.fc",)),
    "around two": (
        Conditional(model=Slimmable(model=ResNet(width=1 / 16))),
        10,
        ("body.body.conv1", "body.body.bn1"),
        ("body.body.fc",),
    ),
    "parametrized": (SpectralNorm(model=ResNetCifar(8, 4)), 5, ("conv1", "bn1"), ("fc",)),
    "transformer": (
        TorchvisionZoo("vit_b_32"),
        14,
        ("class_token", "conv_proj", "encoder.pos_embedding"),
        ("heads.head",),
    ),
    "convnext": (TorchvisionZoo("convnext_tiny"), 23, ("features.0.0", "features.0.1"), ("classifier.2",)),
    "efficientnet": (TorchvisionZoo("efficientnet_b0"), 19, ("features.0.0", "features.0.1"), ("classifier.1",)),
    "inception": (TorchvisionZoo("googlenet"), 13, ("conv1",), ("fc",)),
}


@pytest.mark.parametrize("name", ROWS)
def test_from_the_stem_to_the_head(name: str) -> None:
    model, number, stem, head = ROWS[name]
    network = shapes(model, SPEC)
    row = stages(network)
    assert len(row) == number
    assert row[0] == tuple(f"body.{path}" for path in stem) and row[-1] == tuple(f"body.{path}" for path in head)
    for parameter, _ in network.named_parameters():
        assert sum(within(parameter, stage) for stage in row) == 1, f"{parameter} is of no stage, or of two"


def test_a_name_is_no_other_names_beginning() -> None:
    assert within("body.conv1.weight", ("body.conv1",)) and within("body.conv1", ("body.conv1",))
    assert not within("body.conv10.weight", ("body.conv1",))
