"""What attacks share: the gradient of a score for its input alone, and what a score is built from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from robustscale.fields import require
from robustscale.losses import cross_entropy
from robustscale.noise import Noise
from robustscale.types import Forward, Score

BatchNormMode = Literal["eval", "train", "batch"]
"""BatchNorm during the attack. eval: running statistics. train: the batch's, and running ones are updated by
every attack step. batch: the batch's, running ones untouched."""


def input_gradient(score: Score, x: Tensor) -> tuple[Tensor, Tensor]:
    """(d Σ score / dx, score), of shapes (N, C, H, W) and (N,).

    The sum keeps each example's gradient independent of the batch; `autograd.grad` for x alone computes no
    parameter gradient, touches no `.grad` and fires no hook of DDP or DeepSpeed. Under fp16 autocast the sum is scaled:
    the gradients of confident examples would vanish below 6e-8, and sign(0) leaves an example unattacked.
    """
    half = torch.is_autocast_enabled(x.device.type) and torch.get_autocast_dtype(x.device.type) == torch.float16
    scale = 512.0 if half else 1.0
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        values = score(x)
        (grad,) = torch.autograd.grad(values.sum() * scale, x)
    return grad / scale, values.detach()


@contextmanager
def attacking(model: nn.Module, batchnorm: BatchNormMode = "eval") -> Iterator[Forward]:
    """The bare module, as an attack may differentiate it, with BatchNorm and dropout in the named mode.

    An attack through DDP's wrapper would broadcast buffers at every forward. Modes are restored on leaving.
    """
    inner = getattr(model, "module", None)
    bare = inner if isinstance(inner, nn.Module) else model
    before = [(m, m.training) for m in bare.modules()]
    untracked = []
    if batchnorm == "eval":
        bare.eval()
    elif batchnorm == "batch":
        untracked = [m for m in bare.modules() if getattr(m, "track_running_stats", False)]
        for m in untracked:
            m.track_running_stats = False  # type: ignore[assignment]
    try:
        yield bare
    finally:
        for m in untracked:
            m.track_running_stats = True  # type: ignore[assignment]
        for m, training in before:
            m.training = training
        # In torch before https://github.com/pytorch/pytorch/pull/165068, a weight cast under no_grad stayed in
        # autocast's cache without a graph, and the loss that follows gave it no gradient and no warning.
        torch.clear_autocast_cache()


@dataclass(frozen=True)
class Goal:
    """What the attacker wants: which label's loss goes up, or which target's goes down.

    score(x') = CE(f(x'), label), or -CE(f(x'), target) if there is a target.
    """

    label: Literal["true", "predicted"] = "true"
    """Whose loss goes up: the true label's, or the model's own prediction on the clean image, which leaks nothing
    of the true label (Kurakin et al. 2017, https://arxiv.org/abs/1611.01236)."""
    target: Literal["none", "random", "least_likely"] | int = "none"
    """none: untargeted. random: another class, drawn per example. least_likely: the class with the smallest
    clean logit. A number: that class, for every image."""

    def __post_init__(self) -> None:
        # cross_entropy takes -100 for "leave this one out", which would be an attack without a gradient.
        require(
            isinstance(self.target, str) or self.target >= 0,
            f"target: {self.target} is no class; they are counted from 0",
        )

    def score(self, f: Forward, x: Tensor, y: Tensor, noise: Noise) -> Score:
        clean = None
        if self.label == "predicted" or self.target in ("random", "least_likely"):
            with torch.no_grad():
                clean = f(x)
        if self.label == "predicted" and clean is not None:
            y = clean.argmax(1)
        if self.target == "none":
            return lambda x_adv: cross_entropy(f(x_adv), y)
        if self.target == "least_likely" and clean is not None:
            t = clean.argmin(1)
        elif self.target == "random" and clean is not None:
            t = (y + 1 + noise.fold("target").below(clean.shape[1] - 1)) % clean.shape[1]
        else:
            t = torch.full_like(y, int(self.target))
        return lambda x_adv: -cross_entropy(f(x_adv), t)
