"""Adversarial weight perturbation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from robustscale.attacks.base import gradient_scale
from robustscale.fields import require
from robustscale.objectives.pgd_at import PgdAt
from robustscale.parallel import mean_
from robustscale.types import Batch, Loss, Objective, Progress


@dataclass(frozen=True)
class Awp(Objective):
    """L(w + v; x'), v_l = γ ‖w_l‖ g_l / ‖g_l‖, g = ∇_w L(w; x') (Wu et al. 2020, https://arxiv.org/abs/2004.05884).

    L and x' are any objective's; x' is found at w. γ = 0.01 from the start for AT, 0.005 from epoch 10 of 200
    (`start` 0.05) for TRADES. As in the authors' code, v is one normalised step for each tensor of more than one
    dimension; biases and BatchNorm stay. The running statistics see the pass at w + v alone. Costs a second pass of the
    loss, forward and backward: K + 2n forwards for an objective of K + n.

    The weights are never moved. The loss is computed by `torch.func.functional_call` with w + v in the place of w, so
    its gradient arrives at w itself, through DDP's hooks too, and there is nothing to restore after the step or after
    an exception. The authors add v and subtract it again, which leaves w an ulp off. They also do so around the
    optimizer's step, so that weight decay pulls at w + v: a difference of lr · decay · γ ‖w_l‖ a step, 5e-7 of a weight
    at most at the defaults, and the paper's equation has no weight decay. They take g from a proxy network's float32
    step of SGD; here it is g itself. Memory: one more copy of the weights until the backward pass, two while v is made.

    g is averaged over the workers, each counting alike, so every worker takes the same v; with `reduction:
    deterministic` every logical shard takes its own.

    Use: on top of PgdAt or Trades, against robust overfitting; the gain grows with the length of training.
    Breaks: underfits where γ is large or the network small: it bounds by relative length alone, and accuracy falls as
    γ grows; it adds nothing against attacks that the inner one misses.
    """

    objective: Objective = PgdAt()
    """What is trained at the moved weights."""
    gamma: float = 0.01
    """γ: length of the move of a tensor, in units of the tensor's own norm."""
    start: float = 0.0
    """Share of training before which the weights are not perturbed."""

    def __post_init__(self) -> None:
        require(self.gamma > 0, f"gamma: {self.gamma!r} is not positive; 0.01 for AT, 0.005 for TRADES")
        require(0 <= self.start < 1, f"start: {self.start!r} is outside [0, 1); it is a share of training")
        require(not isinstance(self.objective, Awp), "objective: awp inside awp; raise gamma for a larger perturbation")

    def outcomes(self) -> tuple[tuple[float, Objective], ...]:
        """(share of training, what is then descended)."""
        return ((self.start, self.objective), (1 - self.start, replace(self, start=0.0))) if self.start > 0 else ()

    def perturb(self, model: nn.Module, batch: Batch, at: Progress) -> Any:
        return self.objective.perturb(model, batch, at)

    def loss(self, model: nn.Module, batch: Batch, found: Any, at: Progress) -> Loss:
        if at.step < round(self.start * at.total_steps):
            return self.objective.loss(model, batch, found, at)
        loss_of = _LossOf(self.objective, model)
        inputs = (batch, found, at)
        weights = {name: w for name, w in loss_of.named_parameters() if w.requires_grad and w.dim() > 1}
        gradients = _gradients(loss_of, weights, inputs)
        moved = {name: w + self._step(w.detach(), gradients.pop(name)) for name, w in weights.items()}
        result: Loss = functional_call(loss_of, moved, inputs)
        return result

    def _step(self, w: Tensor, g: Tensor) -> Tensor:
        # Scaled twice: the square of a confident network's gradient would vanish in float32.
        largest = g.abs().amax()
        g = g / largest
        v = (self.gamma * w.norm() / g.norm()) * g
        # fp16 may overflow, and a NaN in the statistics of BatchNorm would stay when the scaler skips the step.
        return torch.where((largest > 0) & largest.isfinite(), v, 0)


class _LossOf(nn.Module):
    """An objective's loss as a module, so that parameters and buffers can be given to it for one call."""

    def __init__(self, objective: Objective, model: nn.Module) -> None:
        super().__init__()
        self.objective, self.model = objective, model

    def forward(self, batch: Batch, found: Any, at: Progress) -> Loss:
        return self.objective.loss(self.model, batch, found, at)


def _gradients(
    loss_of: _LossOf, weights: dict[str, nn.Parameter], inputs: tuple[Batch, Any, Progress]
) -> dict[str, Tensor]:
    """The loss's gradients by name, up to a common factor; averaged over the workers. Buffers and `.grad` stay."""
    copies = {name: buffer.clone() for name, buffer in loss_of.named_buffers()}
    value = functional_call(loss_of, copies, inputs).value
    with torch.autocast(value.device.type, enabled=False):
        # Not `backward`, on whose accumulation into `.grad` engines hang their own averaging.
        scaled = value * gradient_scale(value)
        found = torch.autograd.grad(scaled, list(weights.values()), allow_unused=True, materialize_grads=True)
    gradients = [g.contiguous() for g in found]
    mean_(gradients)
    return dict(zip(weights, gradients, strict=True))
