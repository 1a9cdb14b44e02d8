"""Any classifier of torchvision, by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from robustscale.config import unknown
from robustscale.errors import InputError
from robustscale.torchvision_guard import ensure_torchvision
from robustscale.types import DataSpec


@dataclass(frozen=True)
class TorchvisionZoo:
    """https://docs.pytorch.org/vision/stable/models.html#classification, untrained, initialised as torchvision does.

    The last layer gets the data's classes. For images without 3 channels the first convolution is replaced by one
    with theirs. Auxiliary heads (googlenet, inception_v3) are left out.
    """

    arch: str = "resnet50"
    """As torchvision.models.list_models names it."""

    def build(self, data: DataSpec) -> nn.Module:
        """Images (N, C, H, W) -> logits (N, classes). Raises InputError for an unknown name, and where the
        architecture cannot take images of this size."""
        models = ensure_torchvision().models
        known = models.list_models(module=models)
        if self.arch not in known:
            raise unknown("arch", self.arch, known)
        try:
            network: nn.Module = models.get_model(self.arch, num_classes=data.classes, **_options(self.arch, data))
            _take_channels(network, data.channels)
            _try(network, data)
        except (RuntimeError, ValueError, AssertionError) as error:
            size, reason = f"{data.channels}x{data.height}x{data.width}", " ".join(str(error).split())[:200]
            raise InputError(f"arch: {self.arch} cannot take {size} images ({reason}); 224x224 suits all") from None
        return network


def _options(arch: str, data: DataSpec) -> dict[str, Any]:
    """What a family must be told to fit the images, and to give logits alone without a warning."""
    if arch.startswith("vit_"):
        return {"image_size": data.height}
    if arch.startswith("maxvit_"):
        return {"input_size": (data.height, data.width)}
    if arch in ("googlenet", "inception_v3"):
        return {"aux_logits": False, "init_weights": True}
    return {}


def _take_channels(network: nn.Module, channels: int) -> None:
    name, first = next((n, m) for n, m in network.named_modules() if isinstance(m, nn.Conv2d))
    if first.in_channels == channels:
        return
    parent, _, attribute = name.rpartition(".")
    new = nn.Conv2d(
        channels,
        first.out_channels,
        (first.kernel_size[0], first.kernel_size[1]),
        (first.stride[0], first.stride[1]),
        first.padding if isinstance(first.padding, str) else (first.padding[0], first.padding[1]),
        bias=first.bias is not None,
    )
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    if new.bias is not None:
        nn.init.zeros_(new.bias)
    setattr(network.get_submodule(parent), attribute, new)


@torch.no_grad()
def _try(network: nn.Module, data: DataSpec) -> None:
    """Send one image through: the only test of size that holds for every architecture."""
    network.eval()
    network(torch.zeros(1, data.channels, data.height, data.width))
    network.train()
