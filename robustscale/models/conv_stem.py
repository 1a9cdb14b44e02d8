"""The convolutional stem of Singh et al. 2023 (https://arxiv.org/abs/2303.01870), in the place of a patch stem."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from robustscale.torchvision_guard import ensure_torchvision


class ConvStem(nn.Module):
    """A 3x3 convolution at stride 2, LayerNorm over the channels and GELU for each of `channels`, so that the image is
    halved as often; then, with `projected`, a convolution of 1x1. Weights as torch draws them, as in the authors' code.
    """

    def __init__(self, channels_in: int, channels: Sequence[int], projected: bool = False) -> None:
        super().__init__()
        norm = ensure_torchvision().models.convnext.LayerNorm2d
        layers: list[nn.Module] = []
        for before, after in pairwise((channels_in, *channels)):
            layers += [nn.Conv2d(before, after, 3, 2, 1), norm(after, eps=1e-6), nn.GELU()]
        # Not a Sequential itself, whose every layer would be a stage of the network.
        self.layers = nn.Sequential(*layers, *([nn.Conv2d(channels[-1], channels[-1], 1)] if projected else []))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)  # type: ignore[no-any-return]
