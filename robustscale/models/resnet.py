"""ResNet, with the stem that suits the image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from robustscale.fields import require
from robustscale.models.activation import Activation, activation
from robustscale.models.initialization import he_normal_
from robustscale.types import DataSpec

IMAGENET_STEM_FROM = 96
"""Shortest image side, in pixels, from which "auto" takes the ImageNet stem."""


@dataclass(frozen=True)
class ResNet:
    """He et al. 2016, https://arxiv.org/abs/1512.03385, table 1; torchvision's form (stride in a bottleneck's 3x3).

    Projection shortcuts where the shape changes (option B), weights as `he_normal_` draws them. At width 1 and 10
    classes ResNet-18 with the CIFAR stem has 11.2 M parameters; at width 1.25, 17.4 M. Depth 50 with bottleneck 2 is
    WRN-50-2 (Zagoruyko and Komodakis 2016, https://arxiv.org/abs/1605.07146, table 8), 68.9 M with 1,000 classes.

    Use: as the first network for anything from CIFAR to ImageNet; most published comparisons of objectives are of
        ResNet-18.
    Breaks: against a WideResNet under the same attack, by several points of accuracy (RobustBench); the ImageNet
        stem throws away most of an image under 96 pixels.
    """

    depth: Literal[18, 34, 50] = 18
    width: float = 1.0
    """Factor on the channels of every layer."""
    stem: Literal["auto", "cifar", "imagenet"] = "auto"
    """cifar: 3x3 at stride 1; 8-fold downsampling in all. imagenet: 7x7 at stride 2 and max-pooling; 32-fold.
    auto: imagenet where the image's shorter side has 96 pixels or more."""
    activation: Activation = "relu"
    bottleneck: int = 1
    """Factor on the channels inside depth 50's blocks; 2 is WRN-50-2."""

    def __post_init__(self) -> None:
        require(
            self.bottleneck == 1 or (self.bottleneck > 1 and self.depth == 50),
            f"bottleneck: {self.bottleneck} at depth {self.depth}; it is 1, or more at depth 50, whose blocks have one",
        )
        require(round(64 * self.width) >= 1, f"width: {self.width!r} leaves no channels; 1.0 is the published network")

    def build(self, data: DataSpec) -> nn.Module:
        """Images (N, C, H, W) -> logits (N, classes). Raises InputError where the image is too small for the stem."""
        side = min(data.height, data.width)
        stem = self.stem if self.stem != "auto" else "imagenet" if side >= IMAGENET_STEM_FROM else "cifar"
        least, remedy = (32, "take stem cifar") if stem == "imagenet" else (8, "take model resnet_cifar or basic")
        require(
            side >= least,
            f"stem: {stem} needs images of at least {least}x{least}, these are {data.height}x{data.width}; {remedy}",
        )
        return _ResNet(data, self, imagenet=stem == "imagenet")


class _Basic(nn.Module):
    expansion = 1

    def __init__(self, channels_in: int, channels: int, stride: int, name: Activation, _factor: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = _projection(channels_in, channels, stride)
        self.act1, self.act2 = activation(name), activation(name)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act1(self.bn1(self.conv1(x)))
        return self.act2(self.bn2(self.conv2(h)) + self.shortcut(x))  # type: ignore[no-any-return]


class _Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, channels_in: int, channels: int, stride: int, name: Activation, factor: int) -> None:
        super().__init__()
        inner = factor * channels
        self.conv1 = nn.Conv2d(channels_in, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, 4 * channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * channels)
        self.shortcut = _projection(channels_in, 4 * channels, stride)
        self.act1, self.act2, self.act3 = (activation(name) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.act1(self.bn1(self.conv1(x)))
        h = self.act2(self.bn2(self.conv2(h)))
        return self.act3(self.bn3(self.conv3(h)) + self.shortcut(x))  # type: ignore[no-any-return]


def _projection(channels_in: int, channels: int, stride: int) -> nn.Module:
    if stride == 1 and channels_in == channels:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))


_LAYOUTS: dict[int, tuple[type[_Basic] | type[_Bottleneck], tuple[int, ...]]] = {
    18: (_Basic, (2, 2, 2, 2)),
    34: (_Basic, (3, 4, 6, 3)),
    50: (_Bottleneck, (3, 4, 6, 3)),
}
"""Depth -> block, and how many of it in each stage."""


class _ResNet(nn.Module):
    def __init__(self, data: DataSpec, config: ResNet, imagenet: bool) -> None:
        super().__init__()
        block, blocks = _LAYOUTS[config.depth]
        channels = round(64 * config.width)
        kernel, stride = (7, 2) if imagenet else (3, 1)
        self.conv1 = nn.Conv2d(data.channels, channels, kernel, stride, kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.act1 = activation(config.activation)
        self.pool = nn.MaxPool2d(3, 2, 1) if imagenet else nn.Identity()
        stages = []
        wide = channels
        for stage, number in enumerate(blocks):
            for position in range(number):
                stride = 2 if stage > 0 and position == 0 else 1
                stages.append(block(wide, channels * 2**stage, stride, config.activation, config.bottleneck))
                wide = channels * 2**stage * block.expansion
        self.blocks = nn.Sequential(*stages)
        self.fc = nn.Linear(wide, data.classes)
        he_normal_(self)

    def forward(self, x: Tensor) -> Tensor:
        h = self.pool(self.act1(self.bn1(self.conv1(x))))
        return self.fc(self.blocks(h).mean((2, 3)))  # type: ignore[no-any-return]
