"""Once-for-all adversarial training and slimming."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from robustscale.fields import require
from robustscale.models.conditional import Conditional
from robustscale.models.slimmable import Slimmable, at_width, slimmable_part
from robustscale.models.wrapping import inside
from robustscale.objectives.oat import Found, Oat
from robustscale.types import Batch, Loss, Progress, Setting


@dataclass(frozen=True)
class Oats(Oat):
    """OAT's loss summed over the widths of a slimmable network, each width attacked by itself: OATS.

    Wang et al. 2020, https://arxiv.org/abs/2010.11828; the authors' code has the network but no
    training. As Yu et al. 2019 (https://arxiv.org/abs/1812.08928, algorithm 1) accumulate the gradients of all widths
    before a step, the losses are added, not averaged. An image keeps its λ and its attack's start at every width. All
    of them run in every step, the full one among them, so no parameter is ever unused.

    Use: to choose accuracy, robustness and cost after training, with model conditional around model slimmable.
    Breaks: a step costs as much as all widths together, 1.8 times OAT for 0.5, 0.75 and 1; the sum scales the gradient
    with the number of widths, so other widths want another learning rate.
    """

    def require(self, setting: Setting) -> None:
        """Raise InputError also for a network that has one width only."""
        model = inside(setting.model, Conditional)
        require(
            model is not None and inside(model.model, Slimmable) is not None,
            "lambdas: oats trains several widths of a network that is told its λ; take --model conditional "
            "--model.model slimmable, or the objective oat",
        )
        super().require(setting)

    def perturb(self, model: nn.Module, batch: Batch, at: Progress) -> tuple[Found, ...]:  # type: ignore[override]
        """Of every width, in their order."""
        found = []
        for width in slimmable_part(model).width.widths:
            with at_width(model, width):
                found.append(super().perturb(model, batch, at))
        return tuple(found)

    def loss(self, model: nn.Module, batch: Batch, found: tuple[Found, ...], at: Progress) -> Loss:  # type: ignore[override]
        losses = []
        for width, of_width in zip(slimmable_part(model).width.widths, found, strict=True):
            with at_width(model, width):
                losses.append(super().loss(model, batch, of_width, at))
        value = torch.stack([loss.value for loss in losses]).sum()
        metrics = {name: torch.stack([loss.metrics[name] for loss in losses]).sum() for name in losses[0].metrics}
        return Loss(value, metrics)
