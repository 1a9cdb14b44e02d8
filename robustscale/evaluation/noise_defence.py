"""Noise at inference: log p̄(x), p̄(x) = 1/n Σ softmax f(x + η_k), η_k ~ N(0, σ² I), averaged (n > 1) or single.
https://arxiv.org/abs/1906.04584, https://arxiv.org/abs/2003.10804. `python -m robustscale.evaluate RUN --noise 0.1`.

Use: on a network that was trained with noise (RAT), or to see what noise alone is worth.
Breaks: its gain is mostly the attacker's blindness: an attack whose gradient is averaged over draws (EOT) takes it
back.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from robustscale.engine.folder import RunFolder
from robustscale.evaluation.words import pixels
from robustscale.fields import require
from robustscale.noise import next_draw


class Noisy(nn.Module):
    """log p̄(x), p̄(x) = 1/n Σ softmax f(x + η_k), η_k ~ N(0, σ² I): the network f behind fresh noise at every call.

    Probabilities are averaged, not logits: p̄ is the soft smoothed classifier of Salman et al. 2019
    (https://arxiv.org/abs/1906.04584), so that cross-entropy of what is returned is -log p̄_y, the loss that their
    attack ascends. With n = 1, the single draw of Araujo et al. 2020 (https://arxiv.org/abs/2003.10804), it is f's
    own logits up to a constant. The noise is in [0, 1] pixels and is not clipped; f sees values outside the box.

    An attack on a single draw of it follows a gradient that the next draw does not have: judge it with EOT
    (Athalye et al. 2018, https://arxiv.org/abs/1802.00420). Costs n forwards of f. Raises InputError for σ <= 0.
    """

    randomised = True

    def __init__(self, network: nn.Module, sigma: float, draws: int = 1) -> None:
        super().__init__()
        require_noise(sigma, draws)
        self.network, self.sigma, self.draws = network, sigma, draws

    def forward(self, x: Tensor, *condition: Tensor) -> Tensor:
        log_p = []
        for _ in range(self.draws):
            eta = self.sigma * next_draw(x).normal(*x.shape[1:])
            log_p.append(self.network(x + eta.to(x.dtype), *condition).log_softmax(1))
        return torch.stack(log_p).logsumexp(0) - math.log(self.draws)


class Defence(NamedTuple):
    """What a network is read behind; none by default."""

    noise: float | None = None
    """σ of `Noisy`."""
    noise_draws: int = 1

    def require(self) -> None:
        """Raise InputError where the noise is none."""
        if self.noise is not None:
            require_noise(self.noise, self.noise_draws)
        require(self.noise is not None or self.noise_draws == 1, "noise_draws: says nothing without noise; give both")

    def protect(self, network: nn.Module) -> nn.Module:
        return network if self.noise is None else Noisy(network, self.noise, self.noise_draws)

    def results(self, folder: RunFolder, point: str = "") -> Path:
        """Where an evaluation behind it is kept: beside that of the network alone, never over it; `point` is the
        `point_name` of a network that is read at another λ or width."""
        draws = f"-draws-{self.noise_draws}" if self.noise_draws > 1 else ""
        noise = "" if self.noise is None else f"-noise-{self.noise:g}{draws}"
        return folder.path / f"{folder.evaluation.name}{point}{noise}"

    def notes(self, blind: str) -> list[str]:
        """For the result; `blind` is the name of the attack without EOT."""
        if self.noise is None:
            return []
        mean = f", the mean of {self.noise_draws} draws" if self.noise_draws > 1 else ""
        return [
            f"Gaussian noise at inference, sigma {pixels(self.noise)}{mean}.",
            f"noise without EOT: {blind} follows the gradient of one draw; what it leaves right and the same attack "
            "averaged over draws does not is no robustness, only an attack led astray.",
        ]


def require_noise(sigma: float, draws: int) -> None:
    """Raise InputError where the noise is none."""
    require(
        0 < sigma < math.inf, f"noise: {sigma!r} is no standard deviation above 0; leave it out for the plain network"
    )
    require(draws >= 1, f"noise_draws: {draws} is below 1; 1 is a single draw a prediction")
