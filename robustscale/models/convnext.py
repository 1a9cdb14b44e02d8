"""ConvNeXt, with the stem that makes it robust."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Literal

from torch import nn

from robustscale.fields import require
from robustscale.models.conv_stem import ConvStem
from robustscale.models.initialization import no_decay_
from robustscale.torchvision_guard import ensure_torchvision
from robustscale.types import DataSpec


@dataclass(frozen=True)
class ConvNeXt:
    """Liu et al. 2022, https://arxiv.org/abs/2201.03545, with the convolutional stem of Singh et al. 2023
    (https://arxiv.org/abs/2303.01870).

    The defaults are ConvNeXt-T: torchvision's network, whose 4x4 convolution at stride 4 gives way to two of 3x3 at
    stride 2 (48 and 96 channels), each with LayerNorm and GELU; 28.6 M parameters with 1,000 classes. `stem` patch is
    torchvision's. As in Singh et al., there is no stochastic depth, and biases are free of weight decay; so are the
    scales of LayerNorm, which their code decays.

    Use: on ImageNet, as the most robust of networks this size in ℓ∞ (their abstract): 49.46 under AutoAttack at 4/255,
        where PGD-AT's ResNet-50 has 34.96 (RobustBench).
    Breaks: from scratch in short trainings; Singh et al. start from natural weights and train 300 epochs. Images need
        32 pixels, 4 times as many for each stage but the first halved.
    """

    blocks: tuple[int, ...] = (3, 3, 9, 3)
    """In each stage."""
    channels: tuple[int, ...] = (96, 192, 384, 768)
    """Of each stage; each halves the image of the one before."""
    stem: Literal["conv", "patch"] = "conv"
    stochastic_depth: float = 0.0
    """Chance that the last block is left out of a step; it falls to 0 at the first (Huang et al. 2016)."""
    layer_scale: float = 1e-6
    """What a block's branch is multiplied by at the start, learnt for each channel; larger for a short training."""

    def __post_init__(self) -> None:
        require(
            len(self.blocks) >= 1 and min(self.blocks) >= 1 and sum(self.blocks) >= 2,
            f"blocks: {self.blocks!r}; give each stage at least 1, and 2 in all",
        )
        require(
            len(self.channels) == len(self.blocks) and min(self.channels) >= 2 and self.channels[0] % 2 == 0,
            f"channels: {self.channels!r}; give one number to each of the {len(self.blocks)} stages, the first even",
        )
        require(
            0 <= self.stochastic_depth < 1,
            f"stochastic_depth: {self.stochastic_depth!r} is outside [0, 1); it is a probability",
        )
        require(self.layer_scale > 0, f"layer_scale: {self.layer_scale!r} is not positive; 1e-6 is the paper's")

    def build(self, data: DataSpec) -> nn.Module:
        """Images (N, C, H, W) -> logits (N, classes). Raises InputError for images that are too small."""
        least = 4 * 2 ** (len(self.blocks) - 1)
        require(
            min(data.height, data.width) >= least,
            f"convnext: needs images of at least {least}x{least}, these are {data.height}x{data.width}; give fewer "
            "stages, or take model resnet",
        )
        parts = ensure_torchvision().models.convnext
        stages = [
            parts.CNBlockConfig(own, following, number)
            for own, following, number in zip_longest(self.channels, self.channels[1:], self.blocks)
        ]
        network: Any = parts.ConvNeXt(stages, self.stochastic_depth, self.layer_scale, num_classes=data.classes)
        network.features[0] = self._stem(data.channels)
        no_decay_(network)
        return network  # type: ignore[no-any-return]

    def _stem(self, channels_in: int) -> nn.Module:
        first = self.channels[0]
        if self.stem == "conv":
            return ConvStem(channels_in, (first // 2, first))
        convolution = nn.Conv2d(channels_in, first, 4, 4)
        nn.init.trunc_normal_(convolution.weight, std=0.02)
        nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]
        return nn.Sequential(convolution, ensure_torchvision().models.convnext.LayerNorm2d(first, eps=1e-6))
