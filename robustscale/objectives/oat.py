"""Once-for-all adversarial training."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from robustscale.attacks.base import BatchNormMode, LabelScore, attacking
from robustscale.attacks.pgd import PGD
from robustscale.fields import require
from robustscale.losses import cross_entropy
from robustscale.models.conditional import Conditional
from robustscale.models.wrapping import inside
from robustscale.noise import Noise, drawing_rows
from robustscale.threat import Linf
from robustscale.types import Attack, Batch, Loss, Objective, Progress, Setting


class Found(NamedTuple):
    lam: Tensor
    """(N,)."""
    rows: Tensor
    """(n,) int64: the images that were attacked, which are those with λ > 0."""
    x_adv: Tensor
    """(n, C, H, W)."""


@dataclass(frozen=True)
class Oat(Objective):
    """(1 - λ) · CE(f(x, λ), y) + λ · CE(f(x', λ), y), λ drawn for each image, x' ascending CE(f(x', λ), y).

    Wang et al. 2020, https://arxiv.org/abs/2010.11828, and the authors' code: PGD-7 at 8/255 with
    α = min(1.25 eps, eps + 4/255) / 7, which is 10/7/255, BatchNorm in eval mode. Where λ = 0 there is nothing to
    attack: all images go forward clean, and those with λ > 0 once more attacked. So the BatchNorm for λ > 0 sees clean
    and attacked images, in a forward each, and that for λ = 0 clean ones alone. An image costs K + 2 forwards where
    λ > 0, and 1 where λ = 0.

    λ is uniform over `lambdas`. The authors' code gives λ = 0 to exactly ceil(N / 6) images, the first of each batch,
    and draws the others; here every image draws for itself, so that its λ depends on no worker and no batch.

    Use: to get the whole trade-off between accuracy and robustness from one training, with model conditional.
    Breaks: no λ is drawn between 0.4 and 1, so the curve there is what the network makes of an interpolated encoding.
    """

    attack: Attack = PGD(Linf(8 / 255), steps=7, step_size=10 / 7 / 255)
    lambdas: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 1.0)
    """What λ is drawn from; a value given twice is drawn twice as often."""
    batchnorm: BatchNormMode = "eval"
    """During the attack. eval: running statistics; train: the batch's, and running ones follow every attack step;
    batch: the batch's, running ones untouched."""

    def __post_init__(self) -> None:
        require(
            len(self.lambdas) > 0 and all(0 <= lam <= 1 for lam in self.lambdas),
            f"lambdas: {self.lambdas!r} must be values within [0, 1]; the paper's are (0, 0.1, 0.2, 0.3, 0.4, 1)",
        )

    def require(self, setting: Setting) -> None:
        """Raise InputError for a network that is not told λ, or whose encoding does not reach these λ."""
        model = inside(setting.model, Conditional)
        if model is None:
            require(False, "lambdas: the network is not told its λ; take --model conditional, around any network")
            return
        low, high = model.lambdas[0], model.lambdas[-1]
        require(
            model.encoding == "none" or all(low <= lam <= high for lam in self.lambdas),
            f"lambdas: {self.lambdas!r} reach beyond {low:g} to {high:g}, which the network encodes; "
            "set model.lambdas to the same values",
        )

    def outcomes(self) -> tuple[tuple[float, Oat], ...]:
        """(probability, the objective whose every image has drawn alike), as far as the cost differs: λ = 0 or not.

        Where it is 0 the batch's first image alone is attacked, which no further one pays for: one step will do.
        """
        positive = tuple(lam for lam in self.lambdas if lam > 0)
        share = len(positive) / len(self.lambdas)
        if share in (0, 1):
            return ()
        return (share, replace(self, lambdas=positive)), (1 - share, replace(self, lambdas=(0.0,), attack=PGD(steps=1)))

    def perturb(self, model: nn.Module, batch: Batch, at: Progress) -> Found:
        lam = self._draw(batch, at)
        rows = attacked_rows(lam)
        return Found(lam, rows, self._attack(model, batch.rows(rows), _told(lam[rows]), rows, at))

    def loss(self, model: nn.Module, batch: Batch, found: Found, at: Progress) -> Loss:
        lam, rows, x_adv = found
        clean = cross_entropy(model(batch.x, lam), batch.target)
        with drawing_rows(rows):
            adversarial = cross_entropy(model(x_adv, _told(lam[rows])), batch.target[rows])
        natural = ((1 - lam) * clean).mean()
        robust = (lam[rows] * adversarial).sum() / len(lam)
        return Loss(natural + robust, {"natural": natural.detach(), "robust": robust.detach()})

    def _draw(self, batch: Batch, at: Progress) -> Tensor:
        choice = Noise.of(at.seed, batch.index, "lambda", at.step).below(len(self.lambdas))
        lam = torch.zeros(choice.shape, device=choice.device)
        # Not a table of the values: to copy one to the device would wait for it.
        for number, value in enumerate(self.lambdas):
            lam = torch.where(choice == number, value, lam)
        return lam

    def _attack(self, model: nn.Module, batch: Batch, lam: Tensor, rows: Tensor, at: Progress) -> Tensor:
        noise = Noise.of(at.seed, batch.index, "attack", at.step)
        with attacking(model, self.batchnorm) as f, drawing_rows(rows):
            # λ goes with the labels, so that an attack may ask for the score of some of the images.
            def loss(x: Tensor, y: Tensor, lam: Tensor) -> Tensor:
                return cross_entropy(f(x, lam), y)

            return self.attack(LabelScore(lambda x: x, loss, (batch.y, lam)), batch.x, noise=noise)


def _told(lam: Tensor) -> Tensor:
    """The λ that the network is told of an attacked image: 1 for one of weight 0, which is to leave the BatchNorm of
    λ = 0 alone."""
    return torch.where(lam > 0, lam, 1.0)


def attacked_rows(lam: Tensor) -> Tensor:
    """Where λ > 0: the one wait for the device in a step, against an attack on one image in six for nothing.

    Never empty: a batch of λ = 0 alone gives its first image, whose attacked loss weighs λ = 0, so that every worker
    makes equally many forwards.
    """
    rows = lam.nonzero().squeeze(1)
    return rows if len(rows) > 0 else torch.zeros_like(lam[:1], dtype=torch.int64)
