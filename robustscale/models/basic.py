"""BasicNet, the small network of first experiments."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from robustscale.fields import require
from robustscale.models.activation import Activation, activation
from robustscale.types import DataSpec


@dataclass(frozen=True)
class Basic:
    """Two convolutions (3x3, activation, max-pooling) and two linear layers; no BatchNorm. Weights as torch draws them.

    The second pooling leaves a map of at least 4x4 and at most 7x7 whatever the image's size (less for images under
    8 pixels), so that the linear layers stay small.

    Use: to try a method out within seconds, and for the first experiments on small images.
    Breaks: where robustness needs capacity (Madry et al. 2018, section 4): against a strong attack so small a network
        may fall back on one class for every image.
    """

    channels: int = 32
    """Of the first convolution; the second has twice as many."""
    hidden: int = 128
    """Units of the first linear layer."""
    activation: Activation = "relu"

    def __post_init__(self) -> None:
        require(self.channels >= 1, f"channels: {self.channels} is below 1; 32 is usual")
        require(self.hidden >= 1, f"hidden: {self.hidden} is below 1; 128 is usual")

    def build(self, data: DataSpec) -> nn.Module:
        """Images (N, C, H, W) -> logits (N, classes). Raises InputError for images under 2x2."""
        require(
            min(data.height, data.width) >= 2,
            f"basic: needs images of at least 2x2, these are {data.height}x{data.width}; enlarge the images",
        )
        return _Basic(data, self)


class _Basic(nn.Module):
    def __init__(self, data: DataSpec, config: Basic) -> None:
        super().__init__()
        channels, hidden = config.channels, config.hidden
        half = (data.height // 2, data.width // 2)
        pool = tuple(max(1, side // 4) for side in half)
        features = 2 * channels * (half[0] // pool[0]) * (half[1] // pool[1])
        self.conv1 = nn.Conv2d(data.channels, channels, 3, padding=1)
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(channels, 2 * channels, 3, padding=1)
        self.pool2 = nn.MaxPool2d((pool[0], pool[1]))
        self.fc1 = nn.Linear(features, hidden)
        self.fc2 = nn.Linear(hidden, data.classes)
        self.act1, self.act2, self.act3 = (activation(config.activation) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.pool1(self.act1(self.conv1(x)))
        h = self.pool2(self.act2(self.conv2(h)))
        return self.fc2(self.act3(self.fc1(h.flatten(1))))  # type: ignore[no-any-return]
