"""LLR, the local linearity regulariser."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustscale.attacks.base import BatchNormMode, attacking, gradient_scale, input_gradient, require_random_start
from robustscale.attacks.pgd import PGD
from robustscale.fields import require
from robustscale.losses import cross_entropy
from robustscale.noise import Noise, drawing
from robustscale.types import Attack, Batch, DataSpec, Loss, Objective, Progress, Setting


@dataclass(frozen=True)
class Llr(Objective):
    """CE(f(x), y) + λ · γ(δ) + μ · |δᵀ∇L(x)|, γ(δ) = |L(x + δ) - L(x) - δᵀ∇L(x)|, L = CE(f(·), y), δ ascending γ
    (Qin et al. 2019, https://arxiv.org/abs/1907.02610).

    The paper takes 10 inner steps on CIFAR-10 and 2 on ImageNet. During the attack L(x) and ∇L(x) are constant and cost
    one forward and one input gradient; K + 3 forwards in all. At δ = 0 γ is 0 and has no gradient, so the attack has
    to start elsewhere. In the loss ∇L(x) is differentiated once more, so that the graph of a backward pass is
    kept beside that of the forward.

    ∇L(x) is the gradient of the sum of the batch's losses. While BatchNorm normalises by the batch (in the loss,
    always) an image changes the losses of the others too, and that is part of its gradient, as wherever this is done
    by automatic differentiation of a batch. Labels may be soft in CE(f(x), y); γ is of y alone, as the attack is. Under
    fp16 ∇L(x) is scaled for its own backward pass as in the attacks, yet with the loss scaler on top second derivatives
    overflow early; prefer bf16.

    Use: for a smooth loss surface in few attack steps, where PGD-AT with so few overfits to its own attack.
    Breaks: every layer needs a second derivative, which fused attention (vit_*) does not have; and the gain is in cost
        alone: CIFAR-10's 52.8 under AutoAttack (WRN-40-8, https://github.com/fra31/auto-attack) is what PGD-AT stopped
        early reaches, 53.4 with WRN-34-20.
    """

    attack: Attack = PGD()
    lam: float = 4.0
    """λ."""
    mu: float = 3.0
    """μ."""
    batchnorm: BatchNormMode = "eval"
    """During the attack. eval: running statistics; train: the batch's, and running ones follow every attack step;
    batch: the batch's, running ones untouched."""

    def __post_init__(self) -> None:
        require(self.lam >= 0, f"lam: {self.lam!r} is negative; 4 is the paper's default")
        require(self.mu >= 0, f"mu: {self.mu!r} is negative; 3 is the paper's default")

    def require(self, setting: Setting) -> None:
        """Raise InputError where the attack could not move, and where the network has no second derivative."""
        require_random_start(self.attack, "gamma is 0")
        if setting.data is not None and setting.network is not None:
            _require_second_derivative(setting.network, setting.data)

    def perturb(self, model: nn.Module, batch: Batch, at: Progress) -> Tensor:
        noise = Noise.of(at.seed, batch.index, "attack", at.step)
        with attacking(model, self.batchnorm) as f:
            grad, clean = input_gradient(lambda x: cross_entropy(f(x), batch.y), batch.x)

            def gamma(x: Tensor) -> Tensor:
                return (cross_entropy(f(x), batch.y) - clean - _dot(x - batch.x, grad)).abs()

            return self.attack(gamma, batch.x, noise=noise)

    def loss(self, model: nn.Module, batch: Batch, x_adv: Tensor, at: Progress) -> Loss:
        x = batch.x.detach().requires_grad_()
        logits = model(x)
        clean, adv = cross_entropy(logits, batch.y), cross_entropy(model(x_adv), batch.y)
        linear = _dot(x_adv - batch.x, _differentiable_gradient(clean, x))
        natural = cross_entropy(logits, batch.target).mean()
        gamma, slope = (adv - clean - linear).abs().mean(), linear.abs().mean()
        metrics = {"natural": natural.detach(), "gamma": gamma.detach(), "slope": slope.detach()}
        return Loss(natural + self.lam * gamma + self.mu * slope, metrics)


def _dot(delta: Tensor, grad: Tensor) -> Tensor:
    return (delta * grad).flatten(1).sum(1)


def _differentiable_gradient(losses: Tensor, x: Tensor) -> Tensor:
    """∇ Σ losses for x, with a graph. For x alone: no parameter's hook is fired, so DDP does not see it."""
    scale = gradient_scale(x)
    # A backward pass takes the precision of its forward; autocast on top would cast the second derivative's operands.
    with torch.autocast(x.device.type, enabled=False):
        (grad,) = torch.autograd.grad(losses.sum() * scale, x, create_graph=True)
    return grad / scale


def _require_second_derivative(network: nn.Module, data: DataSpec) -> None:
    noise = Noise.of(0, torch.arange(2), "second_derivative")
    x = noise.uniform(data.channels, data.height, data.width).requires_grad_()
    parameters = [p for p in network.parameters() if p.requires_grad]
    try:
        with attacking(network) as f, drawing(noise):
            losses = cross_entropy(f(x), noise.fold("y").below(data.classes))
            grad = _differentiable_gradient(losses, x)
            torch.autograd.grad(grad.square().sum(), parameters, allow_unused=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        require(False, f"lam, mu: need second derivatives, which this network has not ({reason}); take another model")
