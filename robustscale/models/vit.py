"""The vision transformer, with the stem that makes it robust."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustscale.fields import require
from robustscale.models.conv_stem import ConvStem
from robustscale.models.initialization import no_decay_
from robustscale.torchvision_guard import ensure_torchvision
from robustscale.types import DataSpec


@dataclass(frozen=True)
class ViT:
    """Dosovitskiy et al. 2021, https://arxiv.org/abs/2010.11929, with the convolutional stem of Singh et al. 2023
    (https://arxiv.org/abs/2303.01870).

    The defaults are ViT-S/16: four 3x3 convolutions at stride 2 (48, 96, 192, 384 channels), each with LayerNorm and
    GELU, and one of 1x1 make the tokens; 22.8 M parameters with 1,000 classes. `stem` patch is the 16x16 convolution at
    stride 16, 22.1 M. Blocks are torchvision's, normalised first. Weights are truncated normals of 0.02, as in timm's
    ViT-S, which the authors take, the last layer's too: from torchvision's zeros no gradient would reach an image at
    the first steps. Biases and scales are free of weight decay. For images of another size than the data's, as in
    progressive training, the table of positions is resized (bicubic).

    Use: on ImageNet; a little below ConvNeXt in ℓ∞ and above it against unseen ℓ1 and ℓ2 (their abstract): 48.08
        under AutoAttack at 4/255, where PGD-AT's ResNet-50 has 34.96 (RobustBench).
    Breaks: from scratch without heavy augmentation or a slow start (eps_warmup); on small data sets; where a second
        derivative is asked for (llr), which fused attention does not have.
    """

    dimension: int = 384
    depth: int = 12
    heads: int = 6
    patch: int = 16
    """Side of a token's patch, in pixels; a power of 2."""
    stem: Literal["conv", "patch"] = "conv"

    def __post_init__(self) -> None:
        require(self.depth >= 1, f"depth: {self.depth} is below 1; it counts blocks")
        require(
            self.heads >= 1 and self.dimension >= 1 and self.dimension % self.heads == 0,
            f"heads: {self.heads} do not divide dimension {self.dimension}; 64 a head is usual",
        )
        require(
            self.patch >= 2 and self.patch.bit_count() == 1,
            f"patch: {self.patch} is not 2, 4, 8, 16, ...; each convolution of the stem halves the image",
        )
        require(
            self.stem == "patch" or 2 * self.dimension % self.patch == 0,
            f"dimension: {self.dimension} is not a multiple of {self.patch // 2}: the stem doubles its channels up to "
            "it at each convolution",
        )

    def build(self, data: DataSpec) -> nn.Module:
        """Images (N, C, H, W) -> logits (N, classes). Raises InputError where patches do not fill the image."""
        require(
            data.height % self.patch == data.width % self.patch == 0,
            f"patch: {self.patch} does not divide images of {data.height}x{data.width}; take a smaller one, or another "
            "data.image_size",
        )
        return _ViT(data, self)


class _ViT(nn.Module):
    def __init__(self, data: DataSpec, config: ViT) -> None:
        super().__init__()
        block = ensure_torchvision().models.vision_transformer.EncoderBlock
        wide = config.dimension
        self.grid = data.height // config.patch, data.width // config.patch
        self.stem = _stem(data.channels, config)
        self.class_token = nn.Parameter(torch.empty(1, 1, wide))
        self.positions = nn.Parameter(torch.empty(1, 1 + self.grid[0] * self.grid[1], wide))
        self.blocks = nn.Sequential(
            *(block(config.heads, wide, 4 * wide, dropout=0.0, attention_dropout=0.0) for _ in range(config.depth))
        )
        self.norm = nn.LayerNorm(wide, eps=1e-6)
        self.head = nn.Linear(wide, data.classes)
        _truncated_normal_(self)
        no_decay_(self)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        positions = self._positions_of((h.shape[2], h.shape[3]))
        tokens = torch.cat([self.class_token.expand(len(h), -1, -1), h.flatten(2).transpose(1, 2)], 1)
        return self.head(self.norm(self.blocks(tokens + positions)[:, 0]))  # type: ignore[no-any-return]

    def _positions_of(self, grid: tuple[int, int]) -> Tensor:
        """(1, 1 + rows x columns, dimension)."""
        if grid == self.grid:
            return self.positions
        own, places = self.positions[:, :1], self.positions[:, 1:]
        table = places.transpose(1, 2).unflatten(2, self.grid)
        table = F.interpolate(table, grid, mode="bicubic", align_corners=False)
        return torch.cat([own, table.flatten(2).transpose(1, 2)], 1)


def _stem(channels_in: int, config: ViT) -> nn.Module:
    wide = config.dimension
    if config.stem == "patch":
        return nn.Conv2d(channels_in, wide, config.patch, config.patch)
    halvings = config.patch.bit_length() - 1
    return ConvStem(channels_in, [wide >> k for k in reversed(range(halvings))], projected=True)


def _truncated_normal_(network: _ViT) -> None:
    nn.init.normal_(network.class_token, std=1e-6)
    nn.init.trunc_normal_(network.positions, std=0.02)
    for module in network.modules():
        if isinstance(module, nn.MultiheadAttention):
            nn.init.trunc_normal_(module.in_proj_weight, std=0.02)
        elif isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
