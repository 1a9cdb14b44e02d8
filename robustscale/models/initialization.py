"""Starting weights, and which of them decay."""

from __future__ import annotations

from torch import nn


def he_normal_(network: nn.Module) -> None:
    """Convolutions from N(0, 2 / (k^2 * output channels)), BatchNorm at scale 1 and shift 0.

    He et al. 2015, https://arxiv.org/abs/1502.01852, equation 14 (the backward form, "fan out"), as ResNet and
    Wide ResNet were published. Linear layers keep torch's default. The factor 2 is ReLU's; networks with SiLU start the
    same.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


def no_decay_(network: nn.Module) -> None:
    """Leave biases and the scales of norms, all that has one dimension, out of weight decay, as transformers' recipes
    do."""
    for parameter in network.parameters():
        if parameter.dim() <= 1:
            parameter.weight_decay = False  # type: ignore[attr-defined]
