"""BasicNet, the small network of first experiments."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from robustscale.fields import require
from robustscale.types import DataSpec


@dataclass(frozen=True)
class Basic:
    """Two convolutions (3x3, ReLU, max-pooling) and two linear layers; no BatchNorm. Weights as torch draws them.

    The second pooling leaves a map of at least 4x4 and at most 7x7 whatever the image's size (less for images under
    8 pixels), so that the linear layers stay small.
    """

    channels: int = 32
    """Of the first convolution; the second has twice as many."""
    hidden: int = 128
    """Units of the first linear layer."""

    def __post_init__(self) -> None:
        require(self.channels >= 1, f"channels: {self.channels} is below 1; 32 is usual")
        require(self.hidden >= 1, f"hidden: {self.hidden} is below 1; 128 is usual")

    def build(self, data: DataSpec) -> nn.Module:
        """Images (N, C, H, W) -> logits (N, classes). Raises InputError for images under 2x2."""
        require(
            min(data.height, data.width) >= 2,
            f"basic: needs images of at least 2x2, these are {data.height}x{data.width}; enlarge the images",
        )
        return _Basic(data, self.channels, self.hidden)


class _Basic(nn.Module):
    def __init__(self, data: DataSpec, channels: int, hidden: int) -> None:
        super().__init__()
        half = (data.height // 2, data.width // 2)
        pool = tuple(max(1, side // 4) for side in half)
        features = 2 * channels * (half[0] // pool[0]) * (half[1] // pool[1])
        self.conv1 = nn.Conv2d(data.channels, channels, 3, padding=1)
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(channels, 2 * channels, 3, padding=1)
        self.pool2 = nn.MaxPool2d((pool[0], pool[1]))
        self.fc1 = nn.Linear(features, hidden)
        self.fc2 = nn.Linear(hidden, data.classes)

    def forward(self, x: Tensor) -> Tensor:
        h = self.pool1(F.relu(self.conv1(x)))
        h = self.pool2(F.relu(self.conv2(h)))
        return self.fc2(F.relu(self.fc1(h.flatten(1))))  # type: ignore[no-any-return]
