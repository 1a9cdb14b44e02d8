"""VGG, in the form that is used on CIFAR."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from robustscale.fields import require
from robustscale.models.activation import Activation, activation
from robustscale.models.initialization import he_normal_
from robustscale.types import DataSpec

_STAGES: dict[int, tuple[int, ...]] = {
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}
"""Depth -> 3x3 convolutions in each of the five stages: configurations A, B, D and E of the paper's table 1."""


@dataclass(frozen=True)
class VGG:
    """Simonyan and Zisserman 2015, https://arxiv.org/abs/1409.1556, table 1; depth 11 is its configuration A.

    Five stages of 3x3 convolutions (64, 128, 256, 512, 512 channels), each followed by 2x2 max-pooling, then the mean
    over the pixels and one linear layer: the form that is used on CIFAR, in place of the paper's three linear layers of
    4096 units, which suit 224x224 images (torchvision_zoo's vgg11 and vgg11_bn). With BatchNorm, which is younger than
    the paper, and 10 classes VGG-11 has 9,231,114 parameters, VGG-16 14,728,266. Convolutions as `he_normal_` draws
    them, their shifts 0: the paper starts from N(0, 0.01²), at which nets deeper than A do not train.

    Use: as the plain network without shortcuts beside ResNet, to see whether a finding is the architecture's.
    Breaks: under strong adversarial training: at equal cost it ends below a ResNet, and without BatchNorm it may stay
        at chance.
    """

    depth: Literal[11, 13, 16, 19] = 11
    batchnorm: bool = True
    """Between convolution and activation."""
    width: float = 1.0
    """Factor on the channels of every layer."""
    activation: Activation = "relu"

    def __post_init__(self) -> None:
        require(round(64 * self.width) >= 1, f"width: {self.width!r} leaves no channels; 1.0 is the published network")

    def build(self, data: DataSpec) -> nn.Module:
        """Images (N, C, H, W) -> logits (N, classes). Raises InputError for images under 32x32."""
        require(
            min(data.height, data.width) >= 32,
            f"vgg: halves the image five times, so it needs 32x32 at least, these are {data.height}x{data.width}; "
            "take model resnet_cifar or basic",
        )
        return _VGG(data, self)


class _VGG(nn.Module):
    def __init__(self, data: DataSpec, config: VGG) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = data.channels
        for stage, number in enumerate(_STAGES[config.depth]):
            channels = round(min(64 * 2**stage, 512) * config.width)
            for _ in range(number):
                norm = [nn.BatchNorm2d(channels)] if config.batchnorm else []
                layers += [nn.Conv2d(before, channels, 3, 1, 1), *norm, activation(config.activation)]
                before = channels
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(before, data.classes)
        he_normal_(self)
        for conv in self.features:
            if isinstance(conv, nn.Conv2d) and conv.bias is not None:
                nn.init.zeros_(conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).mean((2, 3)))  # type: ignore[no-any-return]
