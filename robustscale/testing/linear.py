"""A linear model, whose strongest attack is known in closed form.

logits(x) = W x + b. The gap between two classes, (w_j - w_i) · x' + b_j - b_i, is linear in x', so its greatest value
over a ball cut to the box is a convex problem with one multiplier; here it is solved in float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from robustscale.noise import Noise
from robustscale.threat import L2, Linf, Threat


class Linear(nn.Module):
    """logits (N, C) = x.flatten(1) Wᵀ + b."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    @classmethod
    def random(cls, classes: int, shape: tuple[int, ...], seed: int = 0) -> Linear:
        """Weights are N(0, 1 / numel): logits of order one, so that no softmax saturates."""
        noise = Noise.of(seed, torch.arange(classes), "linear")
        weight = noise.fold("weight").normal(math.prod(shape)) / math.prod(shape) ** 0.5
        return cls(weight, noise.fold("bias").normal())

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.T + self.bias

    def gap(self, x: Tensor, own: Tensor, other: Tensor) -> Tensor:
        """(N,) float64: logit of `other` minus logit of `own`; x may be of any precision."""
        weight, bias = self.weight.detach().double(), self.bias.detach().double()
        rows = x.detach().double().flatten(1)
        return ((weight[other] - weight[own]) * rows).sum(1) + bias[other] - bias[own]

    def worst(self, x: Tensor, own: Tensor, other: Tensor, threat: Threat) -> Tensor:
        """(N, ...) float64: the point of ball and box at which `gap` is greatest."""
        weight = self.weight.detach().double()
        return worst_case((weight[other] - weight[own]).view_as(x), x.detach().double(), threat)


def worst_case(direction: Tensor, x: Tensor, threat: Threat) -> Tensor:
    """argmax of direction · x' over ‖x' - x‖ <= eps, x' in [0, 1]; all float64, shapes (N, ...).

    ℓ∞: every pixel goes as far as eps and the box allow. ℓ2: by stationarity δ = clip(t · direction, -x, 1 - x) with
    the largest t that keeps the norm; the norm grows with t, so t is found by bisection.
    """
    if isinstance(threat, Linf):
        return x + (threat.eps * direction.sign()).clamp(-x, 1 - x)
    if isinstance(threat, L2):
        return x + _stretch(direction, x, threat.eps, t_max=1e9)
    raise TypeError(f"no closed form for {type(threat).__name__}")


def nearest(x_adv: Tensor, x: Tensor, eps: float) -> Tensor:
    """The Euclidean projection of x_adv on ‖x' - x‖₂ <= eps and the box, float64.

    Stationarity of ‖x' - x_adv‖² + μ ‖x' - x‖² gives δ' = clip(δ / (1 + μ), -x, 1 - x), μ >= 0.
    """
    return x + _stretch(x_adv - x, x, eps, t_max=1.0)


def _stretch(direction: Tensor, x: Tensor, eps: float, t_max: float) -> Tensor:
    """clip(t · direction, -x, 1 - x) for the largest t <= t_max at which the norm is at most eps."""

    def delta(t: Tensor) -> Tensor:
        return (t.view(-1, *(1,) * (x.dim() - 1)) * direction).clamp(-x, 1 - x)

    def fits(t: Tensor) -> Tensor:
        return delta(t).flatten(1).square().sum(1) <= eps**2

    low, high = x.new_zeros(len(x)), x.new_full((len(x),), t_max)
    done = fits(high)
    for _ in range(200):
        middle = (low + high) / 2
        inside = fits(middle)
        low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
    return delta(torch.where(done, t_max, low))
