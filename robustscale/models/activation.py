"""The nonlinearity between layers."""

from __future__ import annotations

from typing import Literal

from torch import nn

Activation = Literal["relu", "silu"]
"""relu: max(0, x). silu: x · sigmoid(x), smooth, which Xie et al. 2020 (https://arxiv.org/abs/2006.14536) find to help
adversarial training."""


def activation(name: Activation) -> nn.Module:
    """A module without parameters: one for each place where it is used, so that a wrapper can exchange them."""
    return nn.ReLU() if name == "relu" else nn.SiLU()
