"""Threat models: what an adversary may change. All geometry lives here and nowhere else.

eps and every step are in units of pixels in [0, 1]. An image x may become any x' with ‖x' - x‖ <= eps and
x' in [0, 1]. Shapes: images (N, ...).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from robustscale.fields import Pixels, require
from robustscale.noise import Noise


@dataclass(frozen=True)
class Threat(ABC):
    eps: Pixels

    @abstractmethod
    def start(self, x: Tensor, noise: Noise) -> Tensor:
        """A point drawn uniformly from the ball around x, cut to the box."""

    @abstractmethod
    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """The nearest point of ball and box."""

    @abstractmethod
    def ascend(self, grad: Tensor) -> Tensor:
        """The unit step of this norm along which a linear score grows fastest."""

    @abstractmethod
    def size(self, delta: Tensor) -> Tensor:
        """(N,): the norm of each example's perturbation."""


def _rows(v: Tensor, like: Tensor) -> Tensor:
    return v.view(-1, *(1,) * (like.dim() - 1))


@dataclass(frozen=True)
class Linf(Threat):
    """max |x' - x| <= eps."""

    eps: Pixels = 8 / 255

    def __post_init__(self) -> None:
        require(0 <= self.eps <= 1, f"eps: {self.eps!r} is outside [0, 1]; write it in [0, 1] pixels, as in 8/255")

    def start(self, x: Tensor, noise: Noise) -> Tensor:
        return self.project(x + self.eps * (2 * noise.uniform(*x.shape[1:]) - 1), x)

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        # Rounding of x ± eps may leave the ball by half a unit in the last place; `size` is judged with that slack.
        return torch.minimum(torch.maximum(x_adv, x - self.eps), x + self.eps).clamp(0, 1)

    def ascend(self, grad: Tensor) -> Tensor:
        return grad.sign()

    def size(self, delta: Tensor) -> Tensor:
        return delta.flatten(1).abs().amax(1)


@dataclass(frozen=True)
class L2(Threat):
    """‖x' - x‖₂ <= eps, over all pixels and channels of the image. 128/255 by CIFAR-10's convention."""

    eps: Pixels = 128 / 255

    def __post_init__(self) -> None:
        require(
            0 <= self.eps <= 100, f"eps: {self.eps!r} is outside [0, 100]; write it in [0, 1] pixels, as in 128/255"
        )

    def start(self, x: Tensor, noise: Noise) -> Tensor:
        direction = noise.fold("direction").normal(*x.shape[1:])
        radius = noise.fold("radius").uniform() ** (1 / x[0].numel())
        scale = self.eps * radius / self.size(direction).clamp_min(1e-12)
        return self.project(x + _rows(scale, x) * direction, x)

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """The Euclidean projection on ball ∩ box, exact up to rounding where ‖x_adv - x‖ <= 10 eps.

        No attack's step goes as far as 4 eps; from farther away the result lies in ball and box, maybe not nearest.
        It is x + clip(s·δ, -x, 1 - x) for the largest s <= 1 that keeps the norm: s² = (eps² - Σ clipped²) / Σ free²,
        solved by growing the clipped set. Public PGD code scales to the ball and then clips, which leaves part of
        the budget unused wherever the box binds.
        """
        delta, low, high = x_adv - x, -x, 1 - x
        scale = torch.ones_like(self.size(delta))
        for _ in range(8):
            clipped = (_rows(scale, x) * delta).clamp(low, high)
            free = clipped == _rows(scale, x) * delta
            fixed = torch.where(free, 0, clipped).flatten(1).square().sum(1)
            norm = torch.where(free, delta, 0).flatten(1).square().sum(1)
            scale = ((self.eps**2 - fixed).clamp_min(0) / norm.clamp_min(1e-24)).sqrt().clamp_max(1)
        clipped = (_rows(scale, x) * delta).clamp(low, high)
        shrink = (self.eps / self.size(clipped).clamp_min(1e-12)).clamp_max(1)
        return (x + _rows(shrink, x) * clipped).clamp(0, 1)

    def ascend(self, grad: Tensor) -> Tensor:
        # Scaled twice: the square of a confident network's gradient, 1e-20 and less, would vanish in float32.
        grad = grad / _rows(grad.flatten(1).abs().amax(1).clamp_min(1e-37), grad)
        return grad / _rows(self.size(grad).clamp_min(1e-12), grad)

    def size(self, delta: Tensor) -> Tensor:
        return delta.flatten(1).square().sum(1).sqrt()
