"""What can be seen of an attack without the image it began from: traces in the pixels, and the network's responses.

The defender has the image as a file holds it (8 bits a value), the reference network, and clean images like those it
was trained on. The perturbation itself is not observable; what is left of an image once a median filter is subtracted
stands in for it, edges and all.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from robustscale.attacks.base import input_gradient
from robustscale.losses import kl, margin
from robustscale.noise import Noise
from robustscale.types import Forward

Clues = dict[str, Tensor]
"""By name, (N,) each."""
BANDS = 4
DRAWS = 4


def eight_bits(x: Tensor) -> Tensor:
    """The image as it comes back from a file: attacks leave values between the 256 levels, and files do not."""
    return (255 * x).round() / 255


def median(x: Tensor) -> Tensor:
    """The median of the 3 x 3 pixels around each, channel by channel; edges are repeated."""
    n, c, h, w = x.shape
    patches = F.unfold(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3).view(n, c, 9, h, w)
    return patches.median(2).values


def level_frequencies(images: list[Tensor]) -> Tensor:
    """(256,) float32: how frequent each 8-bit value is among clean images; digits, scans and renderings leave out
    most, and a perturbation does not."""
    values = torch.cat([(255 * x).round().flatten().to(torch.int64).cpu() for x in images])
    counts = torch.bincount(values, minlength=256).double()
    return (counts / counts.sum()).float()


def clues_of(f: Forward, x: Tensor, noise: Noise, eps: float, levels: Tensor) -> Clues:
    """All clues of images (N, C, H, W) of 8-bit values; `eps` (ℓ∞) is the scale of the probes, `noise` their draws."""
    r = x - median(x)
    return {**_of_pixels(x, levels), **_of_residual(r), **_of_network(f, x, r), **_of_probes(f, x, noise, eps)}


def _of_pixels(x: Tensor, levels: Tensor) -> Clues:
    share = levels.to(x.device)[(255 * x).round().to(torch.int64)]
    return {
        "black": (x == 0).flatten(1).float().mean(1),
        "white": (x == 1).flatten(1).float().mean(1),
        "surprise of the levels": -(share + 1e-4).log().flatten(1).mean(1),
        "rare levels": (share < 1e-3).flatten(1).float().mean(1),
    }


def _of_residual(r: Tensor) -> Clues:
    size = r.abs().flatten(1)
    mean, square = size.mean(1), size.square().mean(1)
    sign = r.sign()
    across = (sign[..., :, 1:] * sign[..., :, :-1]).flatten(1).mean(1)
    down = (sign[..., 1:, :] * sign[..., :-1, :]).flatten(1).mean(1)
    clues = {
        "residual mean": (mean + 1e-4).log(),
        "residual largest": size.amax(1),
        "residual median": size.median(1).values,
        "residual at rest": (size == 0).float().mean(1),
        # 1 where every pixel is moved equally far, as by a signed step.
        "residual flatness": mean.square() / (square + 1e-8),
        "residual signs": sign.flatten(1).mean(1),
        "residual neighbours": across + down,
    }
    return {**clues, **_spectrum(r)}


def _spectrum(r: Tensor) -> Clues:
    """The share of the residual's energy in rings of spatial frequency, from the lowest up."""
    energy = torch.fft.fft2(r).abs().square().sum(1)
    rows, columns = (torch.fft.fftfreq(n, device=r.device).abs() for n in r.shape[-2:])
    ring = (torch.maximum(rows[:, None], columns) * 2 * BANDS).long().clamp_max(BANDS - 1)
    total = energy.flatten(1).sum(1) + 1e-8
    return {f"spectrum {k}": (energy * (ring == k)).flatten(1).sum(1) / total for k in range(BANDS)}


def _of_network(f: Forward, x: Tensor, r: Tensor) -> Clues:
    with torch.no_grad():
        logits, squeezed = f(x), f(median(x))
    predicted = logits.argmax(1)
    log_p = logits.log_softmax(1)
    g = _towards_runner_up(f, x, predicted)
    size = g.abs().flatten(1)
    unit, residual = _unit(g), _unit(r)
    return {
        "margin": -margin(logits, predicted),
        "entropy": -(log_p.exp() * log_p).sum(1),
        "evidence": logits.logsumexp(1),
        "gradient l1": (size.sum(1) + 1e-12).log(),
        "gradient l2": (g.flatten(1).norm(dim=1) + 1e-12).log(),
        "gradient flatness": size.mean(1).square() / (size.square().mean(1) + 1e-24),
        # What pushed the image to its class points against the way back.
        "residual along gradient": (unit * residual).sum(1),
        "signs along gradient": (g.sign() * r.sign()).flatten(1).mean(1),
        # Feature squeezing (Xu et al. 2018, https://arxiv.org/abs/1704.01155).
        "squeezed kl": (kl(logits, squeezed) + 1e-6).log(),
        "squeezed kept": (squeezed.argmax(1) == predicted).float(),
    }


def _of_probes(f: Forward, x: Tensor, noise: Noise, eps: float) -> Clues:
    """How the class stands a little noise, and a step towards its nearest competitor."""
    with torch.no_grad():
        logits = f(x)
    predicted = logits.argmax(1)
    before = margin(logits, predicted)
    g = _towards_runner_up(f, x, predicted)
    clues: Clues = {}
    for scale in (0.5, 1.0, 2.0):
        draws = [x + scale * eps * noise.fold("probe", k).normal(*x.shape[1:]) for k in range(DRAWS)]
        clues |= _response(f, draws, predicted, before, f"noise {scale:g}")
    for scale in (0.25, 0.5, 1.0):
        clues |= _response(f, [(x + scale * eps * g.sign()).clamp(0, 1)], predicted, before, f"step {scale:g}")
    return clues


def _response(f: Forward, images: list[Tensor], predicted: Tensor, before: Tensor, name: str) -> Clues:
    with torch.no_grad():
        logits = [f(image) for image in images]
    kept = torch.stack([(z.argmax(1) == predicted).float() for z in logits]).mean(0)
    fall = torch.stack([margin(z, predicted) - before for z in logits]).mean(0)
    return {f"{name} kept": kept, f"{name} fall": fall}


def _towards_runner_up(f: Forward, x: Tensor, predicted: Tensor) -> Tensor:
    grad, _values = input_gradient(lambda x: margin(f(x), predicted), x)
    return grad


def _unit(v: Tensor) -> Tensor:
    flat = v.flatten(1)
    return flat / (flat.square().sum(1, keepdim=True).sqrt() + 1e-12)
