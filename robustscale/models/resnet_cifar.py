"""The thin ResNets that were published for CIFAR: ResNet-20 and its kin."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from robustscale.fields import require
from robustscale.models.activation import Activation, activation
from robustscale.models.initialization import he_normal_
from robustscale.types import DataSpec


@dataclass(frozen=True)
class ResNetCifar:
    """He et al. 2016, https://arxiv.org/abs/1512.03385, section 4.2: three stages of n blocks, depth = 6 n + 2.

    Shortcuts have no parameters (option A): every second pixel, and zeros for the new channels. Weights as
    `he_normal_` draws them. ResNet-20 with 10 classes has 269,722 parameters; depth 8 suits 8x8 digits.

    Use: for quick runs on CIFAR and smaller images, with a fortieth of ResNet-18's parameters.
    Breaks: where robustness needs capacity (Madry et al. 2018, https://arxiv.org/abs/1706.06083, section 4): trained
        adversarially it stays well below ResNet-18, clean and attacked.
    """

    depth: int = 20
    base: int = 16
    """Channels of the first stage; the second has twice and the third four times as many."""
    activation: Activation = "relu"

    def __post_init__(self) -> None:
        n = max(1, round((self.depth - 2) / 6))
        require(self.depth == 6 * n + 2, f"depth: {self.depth} is not 6 n + 2 with n >= 1; the nearest is {6 * n + 2}")
        require(self.base >= 1, f"base: {self.base} is below 1; the published networks have 16 channels")

    def build(self, data: DataSpec) -> nn.Module:
        """Images (N, C, H, W) -> logits (N, classes). Raises InputError for images under 4x4."""
        require(
            min(data.height, data.width) >= 4,
            f"resnet_cifar: needs images of at least 4x4, these are {data.height}x{data.width}; take model basic",
        )
        return _ResNetCifar(data, (self.depth - 2) // 6, self)


class _Block(nn.Module):
    def __init__(self, channels_in: int, channels: int, stride: int, name: Activation) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.act1, self.act2 = activation(name), activation(name)
        self.stride, self.extra = stride, channels - channels_in

    def shortcut(self, x: Tensor) -> Tensor:
        if self.stride == 1 and self.extra == 0:
            return x
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra))

    def forward(self, x: Tensor) -> Tensor:
        h = self.act1(self.bn1(self.conv1(x)))
        return self.act2(self.bn2(self.conv2(h)) + self.shortcut(x))  # type: ignore[no-any-return]


class _ResNetCifar(nn.Module):
    def __init__(self, data: DataSpec, blocks: int, config: ResNetCifar) -> None:
        super().__init__()
        base, name = config.base, config.activation
        self.conv1 = nn.Conv2d(data.channels, base, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(base)
        self.act1 = activation(name)
        stages = []
        for stage in range(3):
            channels = base * 2**stage
            before, stride = (channels // 2, 2) if stage > 0 else (channels, 1)
            first = _Block(before, channels, stride, name)
            stages += [first, *(_Block(channels, channels, 1, name) for _ in range(blocks - 1))]
        self.blocks = nn.Sequential(*stages)
        self.fc = nn.Linear(4 * base, data.classes)
        he_normal_(self)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act1(self.bn1(self.conv1(x)))
        return self.fc(self.blocks(h).mean((2, 3)))  # type: ignore[no-any-return]
