"""Wide ResNet, WRN-d-k: the network of most published robust CIFAR results."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from robustscale.fields import require
from robustscale.models.activation import Activation, activation
from robustscale.models.initialization import he_normal_
from robustscale.types import DataSpec


@dataclass(frozen=True)
class WideResNet:
    """Zagoruyko and Komodakis 2016, https://arxiv.org/abs/1605.07146, table 1: pre-activation, depth = 6 n + 4.

    3x3 convolution -> three stages of n blocks (16 k, 32 k, 64 k channels) -> BatchNorm, activation, mean over the
    pixels, linear. Weights as `he_normal_` draws them, and the linear layer's shift 0. Parameters have the names of
    the weights published with TRADES and RobustBench.

    Use: for the best accuracy under attack on CIFAR-sized images; 28-10, 34-10 and 70-16 are what RobustBench's figures
        are of, 16-8 and 40-2 what OAT is measured with.
    Breaks: by its cost (WRN-34-10 does 12 times ResNet-18's multiplications, for each attack step), and by robust
        overfitting, which width does not cure (Rice et al. 2020, https://arxiv.org/abs/2002.11569): stop early.
    """

    depth: int = 28
    widen: int = 10
    """k, the factor on the channels."""
    dropout: float = 0.0
    """Between the two convolutions of a block."""
    activation: Activation = "relu"

    def __post_init__(self) -> None:
        n = max(1, round((self.depth - 4) / 6))
        require(self.depth == 6 * n + 4, f"depth: {self.depth} is not 6 n + 4 with n >= 1; the nearest is {6 * n + 4}")
        require(self.widen >= 1, f"widen: {self.widen} is below 1; it multiplies 16, 32 and 64 channels")
        require(0 <= self.dropout < 1, f"dropout: {self.dropout!r} is outside [0, 1); it is a probability")

    def build(self, data: DataSpec) -> nn.Module:
        """Images (N, C, H, W) -> logits (N, classes). Raises InputError for images under 4x4."""
        require(
            min(data.height, data.width) >= 4,
            f"wide_resnet: needs images of at least 4x4, these are {data.height}x{data.width}; take model basic",
        )
        return _WideResNet(data, (self.depth - 4) // 6, self)


class _Block(nn.Module):
    def __init__(self, channels_in: int, channels: int, stride: int, config: WideResNet) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        self.act1, self.act2 = activation(config.activation), activation(config.activation)
        same = channels_in == channels and stride == 1
        self.convShortcut = None if same else nn.Conv2d(channels_in, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = self.act1(self.bn1(x))
        h = self.conv2(self.dropout(self.act2(self.bn2(self.conv1(active)))))
        # Where the shape changes, the shortcut too starts from the activation.
        return h + (x if self.convShortcut is None else self.convShortcut(active))  # type: ignore[no-any-return]


class _Stage(nn.Module):
    def __init__(self, blocks: int, channels_in: int, channels: int, stride: int, config: WideResNet) -> None:
        super().__init__()
        rest = [_Block(channels, channels, 1, config) for _ in range(blocks - 1)]
        self.layer = nn.Sequential(_Block(channels_in, channels, stride, config), *rest)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)  # type: ignore[no-any-return]


class _WideResNet(nn.Module):
    def __init__(self, data: DataSpec, blocks: int, config: WideResNet) -> None:
        super().__init__()
        widen = config.widen
        self.conv1 = nn.Conv2d(data.channels, 16, 3, 1, 1, bias=False)
        self.block1 = _Stage(blocks, 16, 16 * widen, 1, config)
        self.block2 = _Stage(blocks, 16 * widen, 32 * widen, 2, config)
        self.block3 = _Stage(blocks, 32 * widen, 64 * widen, 2, config)
        self.bn1 = nn.BatchNorm2d(64 * widen)
        self.act1 = activation(config.activation)
        self.fc = nn.Linear(64 * widen, data.classes)
        he_normal_(self)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(self.act1(self.bn1(h)).mean((2, 3)))  # type: ignore[no-any-return]
