"""The diverse inputs iterative fast gradient sign method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from robustscale.attacks.mi_fgsm import MIFGSM
from robustscale.fields import Pixels, require
from robustscale.noise import Noise
from robustscale.threat import Linf, Threat
from robustscale.types import Score


@dataclass(frozen=True)
class DIFGSM:
    """x ← Π(x + α · ascend(∇ score(T(x)))), K times from the clean image: DI²-FGSM.

    Xie et al. 2019, https://arxiv.org/abs/1803.06978, equations 5 and 6. T leaves an image as it is, or with
    probability p resizes it and pads it with zeros at random; drawn anew for each example and step.

    The authors' code (cihangxie/DI-2-FGSM) enlarges 299 pixels to 299..329 by nearest neighbour and pads to 330, so
    the network must take another size. torchattacks 3.5.1 shrinks, bilinearly, to floor(0.9 s)..s - 1 of s pixels and
    pads back to s; this is followed, as the network then sees its own size. In both, one draw is for the whole
    batch, the padding on the left and above is below s - r, never all of it, and so most images sit a little
    high and left; here every example has a draw of its own and all places are equally likely.
    Paper: ε = 15/255 (16 in the code), α = 1/255, min(ε + 4, 1.25 ε) steps; here K = 10 and α = ε / K as in MI-FGSM.
    Costs K forwards and K input gradients.

    Use: to make images on one network that fool others too, more of them than plain iterated FGSM.
    Breaks: against the network that it is computed on PGD is the better choice, as this ascends the score of other
    images than the one it returns; small images leave T few sizes and places (of 28 pixels, 25 to 27).
    """

    threat: Threat = Linf()
    steps: int = 10
    step_size: Pixels | None = None
    """α. By default eps / steps."""
    p: float = 0.5
    """Probability that an image is transformed."""
    resize_rate: float = 0.9
    """Smallest side after the resize, as a share of the image's."""

    def __post_init__(self) -> None:
        require(0 <= self.p <= 1, f"p: {self.p!r} is outside [0, 1]; it is a probability")
        require(0 < self.resize_rate < 1, f"resize_rate: {self.resize_rate!r} is outside (0, 1); 0.9 is usual")
        self._ascent()

    def __call__(
        self, score: Score, x: Tensor, *, noise: Noise, on_step: Callable[[Tensor], None] | None = None
    ) -> Tensor:
        diverse = Diverse(score, noise, self.p, self.resize_rate)
        return self._ascent()(diverse, x, noise=noise, on_step=on_step)

    def _ascent(self) -> MIFGSM:
        """Its checks are ours as well."""
        return MIFGSM(self.threat, self.steps, self.step_size, mu=0.0)


class Diverse:
    """score(T(x)), T drawn for each example at each call."""

    def __init__(self, score: Score, noise: Noise, p: float, resize_rate: float) -> None:
        self.score, self.noise, self.p, self.resize_rate = score, noise, p, resize_rate
        self.calls = 0

    def __call__(self, x: Tensor) -> Tensor:
        noise = self.noise.fold("diversity", self.calls)
        self.calls += 1
        height, width = x.shape[-2:]
        least = max(int(self.resize_rate * height), 1)
        rows = least + noise.fold("size").below(max(height - least, 1))
        columns = (rows * width / height).round().clamp(1, width)
        top = _up_to(height - rows, noise.fold("top"))
        left = _up_to(width - columns, noise.fold("left"))
        chosen = (noise.fold("coin").uniform() < self.p).view(-1, 1, 1, 1)
        return self.score(torch.where(chosen, placed(x, rows, columns, top, left), x))


def _up_to(most: Tensor, noise: Noise) -> Tensor:
    """(N,): a whole number from 0 to `most`, all equally likely."""
    return (noise.uniform() * (most + 1)).floor()


def placed(x: Tensor, rows: Tensor, columns: Tensor, top: Tensor, left: Tensor) -> Tensor:
    """Each image (C, H, W) resized bilinearly to rows x columns, its corner at (top, left), zeros around; all (N,).

    By two products with interpolation matrices: unlike `grid_sample`'s, their gradient is the same on every run.
    """
    # Under autocast the images would lose digits here that the network still sees where T leaves them alone.
    with torch.autocast(x.device.type, enabled=False):
        down = _interpolation(x.shape[-2], rows, top).to(x.dtype)
        across = _interpolation(x.shape[-1], columns, left).to(x.dtype)
        return torch.einsum("nuh,nchw,nvw->ncuv", down, x, across)


def _interpolation(side: int, length: Tensor, offset: Tensor) -> Tensor:
    """(N, side, side) float64: row u holds what of each pixel comes to place u, as `F.interpolate` without
    align_corners; zeros outside of offset .. offset + length - 1."""
    pixels = torch.arange(side, device=length.device, dtype=torch.float64)
    place = pixels - offset.double()[:, None]
    length = length.double()[:, None]
    source = ((place + 0.5) * side / length - 0.5).clamp(0, side - 1)
    weights = (1 - (source[:, :, None] - pixels).abs()).clamp_min(0)
    return weights * ((place >= 0) & (place < length))[:, :, None]
