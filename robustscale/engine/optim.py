"""Optimizers of the papers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from robustscale.fields import require


def _groups(parameters: list[nn.Parameter], lr: float) -> list[dict[str, Any]]:
    """Parameters with an attribute `weight_decay` that is False are left out of it; those with an attribute `lr_factor`
    have so many times the rate. The first group is that of the largest rate, with decay."""
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for p in parameters:
        key = (-getattr(p, "lr_factor", 1.0), getattr(p, "weight_decay", True) is False)
        groups.setdefault(key, []).append(p)
    found = []
    for (negative, free), members in sorted(groups.items(), key=lambda item: item[0]):
        rate = {} if negative == -1 else {"lr": -negative * lr}
        found.append({"params": members, **rate, **({"weight_decay": 0.0} if free else {})})
    return found


@dataclass(frozen=True)
class SGD:
    """v ← μ v + g + λ w; w ← w - lr v, or with Nesterov's look-ahead."""

    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    nesterov: bool = False

    def __post_init__(self) -> None:
        require(self.lr > 0, f"lr: {self.lr!r} is not positive; 0.1 is the papers' default")
        require(0 <= self.momentum < 1, f"momentum: {self.momentum!r} is outside [0, 1); 0.9 is usual")
        require(self.weight_decay >= 0, f"weight_decay: {self.weight_decay!r} is negative; 5e-4 is usual")
        require(not self.nesterov or self.momentum > 0, "nesterov: needs momentum above 0; set momentum to 0.9")

    def build(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            _groups(parameters, self.lr), self.lr, self.momentum, weight_decay=self.weight_decay, nesterov=self.nesterov
        )


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay (https://arxiv.org/abs/1711.05101)."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.05

    def __post_init__(self) -> None:
        require(self.lr > 0, f"lr: {self.lr!r} is not positive; 1e-3 is usual")
        require(all(0 <= b < 1 for b in self.betas), f"betas: {self.betas!r} is outside [0, 1); (0.9, 0.999) is usual")
        require(self.eps > 0, f"eps: {self.eps!r} is not positive; 1e-8 is usual")
        require(self.weight_decay >= 0, f"weight_decay: {self.weight_decay!r} is negative; 0.05 is usual")

    def build(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(_groups(parameters, self.lr), self.lr, self.betas, self.eps, self.weight_decay)
