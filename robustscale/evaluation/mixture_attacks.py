"""What an `OutputMixture` is attacked with: the whole of it, and its parts, so that neither hides behind the other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustscale.attacks.apgd import APGD
from robustscale.attacks.base import Goal, LabelScore
from robustscale.evaluation.words import Attacker
from robustscale.losses import targeted_dlr, targeted_margin
from robustscale.models.output_mixture import OutputMixture
from robustscale.noise import Noise
from robustscale.threat import Threat
from robustscale.types import Forward, Score


@dataclass(frozen=True)
class PartsGoal(Goal):
    """score(x') = Σ DLR(f_i(x'), y, t) over the networks f_i that the mixture asks, t the target (of 2 or 3 classes the
    margin in place of DLR).

    Where g is sure of itself its probabilities are 0 and 1 in float32, and the gradient of any loss of the mixture is
    that of h alone, so that APGD goes where h falls and leaves g standing. DLR does not know the scale of the logits:
    each network has the gradient that it has alone. The mixture is asked all the same, so that `judge` sees what it
    makes of every point. Measured on the digits at α = 0.3, with logits of g ten times as large: APGD on the cross
    entropy and on the targeted DLR of the mixture left 76 % right, this 37 %, and g alone, which decides there, 35 %.
    """

    mixture: OutputMixture | None = None
    """None has no parts to attack."""

    def score(self, f: Forward, x: Tensor, y: Tensor, noise: Noise) -> Score:
        assert self.mixture is not None
        with torch.no_grad():
            clean = f(x)
        loss = targeted_dlr if clean.shape[1] >= 4 else _margin

        def summed(logits: Tensor, y: Tensor, t: Tensor) -> Tensor:
            return torch.stack([loss(z, y, t) for z in logits.unbind(1)]).sum(0)

        return LabelScore(_Parts(f, self.mixture), summed, (y, self._target(clean, y, noise)))


def _margin(logits: Tensor, y: Tensor, t: Tensor) -> Tensor:
    return targeted_margin(logits, t)


class _Parts:
    """x -> (N, parts, classes): the logits of each network that f, which asks the mixture, asks on its way."""

    def __init__(self, f: Forward, mixture: OutputMixture) -> None:
        self.f, self.parts = f, (mixture.accurate, mixture.robust)

    def __call__(self, x: Tensor) -> Tensor:
        seen: list[Tensor] = []

        def see(_part: nn.Module, _inputs: tuple[Tensor, ...], logits: Tensor) -> None:
            seen.append(logits)

        handles = [part.register_forward_hook(see) for part in self.parts]
        try:
            self.f(x)
        finally:
            for handle in handles:
                handle.remove()
        return torch.stack(seen, 1)


def mixture_attackers(mixture: OutputMixture, threat: Threat, classes: int, steps: int, targets: int) -> list[Attacker]:
    """APGD on the mixture's cross entropy and targeted DLR, and on its parts, each for so many of the likeliest other
    classes in turn, on the images still standing. The worst of all counts."""
    apgd, targets = APGD(threat, steps), min(targets, classes - 1)
    attackers = [Attacker(apgd), Attacker(apgd, PartsGoal(mixture=mixture), targets)]
    return attackers if classes < 4 else [*attackers, Attacker(apgd, Goal(loss="dlr"), targets)]
