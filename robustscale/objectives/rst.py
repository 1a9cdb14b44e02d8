"""Robust self-training by TRADES."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustscale.attacks.pgd import PGD
from robustscale.errors import InputError
from robustscale.fields import require
from robustscale.losses import cross_entropy, kl
from robustscale.objectives.trades import Trades
from robustscale.threat import Linf
from robustscale.types import Attack, Batch, Loss, Progress, Setting


@dataclass(frozen=True)
class Rst(Trades):
    """1/N Σ_i w_i · [CE(f(x_i), y_i) + β · KL(p(x_i)‖p(x'_i))], w_i = 1 for labelled images and `weight` for
    pseudo-labelled ones (Carmon et al. 2019, https://arxiv.org/abs/1905.13736).

    N counts the images of the batch, both kinds: at weight 1 this is TRADES on the batch, as the authors' code
    (https://github.com/yaircarmon/semisup-adv) computes it. There the paper's weight of unlabelled data in the sum over
    all data stands in no formula; it comes of the half of each batch that is pseudo-labelled. With a labelled share s
    of the batch, n labelled and ñ further images, that weight is `weight` · (1 - s)/s · n/ñ: 0.1 for the paper's 50,000
    and 500,000. Dividing by N, not by Σ w_i, keeps the loss a mean over examples, equal for any number of workers.

    Defaults are the code's: β = 6, ε = 0.031, α = 0.007, K = 10. It takes batches of 256, half of them labelled
    (data.labelled_share), a cosine schedule, weight decay 5e-4 and Nesterov momentum. Its epoch counts 50,000 images of
    both kinds, so its 200 epochs are about 100 passes over the labelled images, which are the epochs here. Its entropy
    term is left out: its weight is 0 by default.

    Use: to raise both accuracies when there are many more unlabelled images of the same kind than labelled ones.
    Breaks: where the unlabelled images are of other classes or another domain, or the pseudo-labels are poor, since
    wrong labels are learnt as robustly as right ones (the paper's section 5 selects its images by a classifier).
    """

    attack: Attack = PGD(Linf(0.031), step_size=0.007, start="gaussian")
    weight: float = 1.0
    """w of a pseudo-labelled image; 0 trains on the labelled ones alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.weight >= 0, f"weight: {self.weight!r} is negative; 1 weighs both kinds of images alike")

    def require(self, setting: Setting) -> None:
        super().require(setting)
        if not setting.unlabelled:
            raise InputError(
                "weight: is of pseudo-labelled images, and the run has none; give data.unlabelled a file by "
                "python -m robustscale.pseudo_label, or take the objective trades"
            )

    def loss(self, model: nn.Module, batch: Batch, x_adv: Tensor, at: Progress) -> Loss:
        clean, adv = model(batch.x), model(x_adv)
        natural = self._mean(cross_entropy(clean, batch.target), batch.labelled)
        robust = self._mean(kl(clean, adv), batch.labelled)
        return Loss(natural + self.beta * robust, {"natural": natural.detach(), "robust": robust.detach()})

    def _mean(self, losses: Tensor, labelled: Tensor) -> Tensor:
        return torch.where(labelled, losses, self.weight * losses).mean()
