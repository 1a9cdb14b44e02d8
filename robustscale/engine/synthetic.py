"""Images for what asks only for their shape."""

from __future__ import annotations

import torch
from torch import nn

from robustscale.noise import Noise
from robustscale.types import Batch, DataSpec


def images_like(network: nn.Module, spec: DataSpec, n: int) -> Batch:
    """Uniform noise with labels by lot; of the network's precision and on its device."""
    weight = next(network.parameters())
    noise = Noise.of(0, torch.arange(n, device=weight.device), "synthetic")
    x = noise.fold("image").uniform(spec.channels, spec.height, spec.width).to(weight.dtype)
    return Batch.of(x, noise.fold("label").below(spec.classes), torch.arange(n, device=weight.device))
