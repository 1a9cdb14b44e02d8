"""What attacks share: the gradient of a score for its input alone, and what a score is built from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from robustscale.fields import require
from robustscale.losses import cross_entropy, dlr, kl, margin, targeted_dlr, targeted_margin
from robustscale.noise import Noise, drawing_rows
from robustscale.types import Attack, Forward, Objective, Score, Setting

BatchNormMode = Literal["eval", "train", "batch"]
"""BatchNorm during the attack. eval: running statistics. train: the batch's, and running ones are updated by
every attack step. batch: the batch's, running ones untouched."""


def input_gradient(score: Score, x: Tensor) -> tuple[Tensor, Tensor]:
    """(d Σ score / dx, score), of shapes (N, C, H, W) and (N,).

    The sum keeps each example's gradient independent of the batch; `autograd.grad` for x alone computes no
    parameter gradient, touches no `.grad` and fires no hook of DDP or DeepSpeed.
    """
    scale = gradient_scale(x)
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        values = score(x)
        (grad,) = torch.autograd.grad(values.sum() * scale, x)
    return grad / scale, values.detach()


def gradient_scale(x: Tensor) -> float:
    """What a score is multiplied by before its gradient for x is taken, and the gradient divided by.

    Not 1 under fp16 autocast: there the gradients of confident examples would vanish below 6e-8, and sign(0) leaves
    an example unattacked.
    """
    half = torch.is_autocast_enabled(x.device.type) and torch.get_autocast_dtype(x.device.type) == torch.float16
    return 512.0 if half else 1.0


@contextmanager
def relaxing(network: Forward) -> Iterator[None]:
    """While the block runs, layers with `relaxed = True` are as soft as in training: an attack's gradient must pass
    through them (backward pass differentiable approximation, Athalye et al. 2018, https://arxiv.org/abs/1802.00420)."""
    modules = network.modules() if isinstance(network, nn.Module) else ()
    before = [(m, m.training) for m in modules if getattr(m, "relaxed", False)]
    for m, _ in before:
        m.training = True
    try:
        yield
    finally:
        for m, training in before:
            m.training = training


@contextmanager
def attacking(model: nn.Module, batchnorm: BatchNormMode = "eval", relax: bool = True) -> Iterator[Forward]:
    """The bare module, as an attack may differentiate it, with BatchNorm and dropout in the named mode.

    `relax`: as in `relaxing`; not where the network's own predictions are asked for.

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
        with relaxing(bare) if relax else nullcontext():
            yield bare
    finally:
        for m in untracked:
            m.track_running_stats = True  # type: ignore[assignment]
        for m, training in before:
            m.training = training
        # In torch before https://github.com/pytorch/pytorch/pull/165068, a weight cast under no_grad stayed in
        # autocast's cache without a graph, and the loss that follows gave it no gradient and no warning.
        torch.clear_autocast_cache()


class LabelScore:
    """loss(f(x), *labels), a score that can be asked of some of the examples; labels have a row for each."""

    def __init__(self, f: Forward, loss: Callable[..., Tensor], labels: tuple[Tensor, ...]) -> None:
        self.f, self.loss, self.labels = f, loss, labels

    def __call__(self, x: Tensor) -> Tensor:
        return self.loss(self.f(x), *self.labels)

    def rows(self, rows: Tensor) -> Score:
        part = LabelScore(self.f, self.loss, tuple(y[rows] for y in self.labels))

        def score(x: Tensor) -> Tensor:
            with drawing_rows(rows):
                return part(x)

        return score


def score_of(score: Score, x: Tensor, rows: Tensor) -> Score:
    """The score of examples `rows` (indices) of the batch x alone: (n, C, H, W) -> (n,).

    A score with a method `rows`, such as `LabelScore`, forwards these rows only. Any other is given the whole batch:
    right, but no cheaper.
    """
    of_rows: Callable[[Tensor], Score] | None = getattr(score, "rows", None)
    if of_rows is not None:
        return of_rows(rows)
    return lambda part: score(x.index_copy(0, rows, part))[rows]


@dataclass(frozen=True)
class Goal:
    """What the attacker wants: which label's loss goes up, or which target's goes down.

    score(x') = L(f(x'), label), or -L(f(x'), target) if there is a target, L the `loss`.
    """

    label: Literal["true", "predicted"] = "true"
    """Whose loss goes up: the true label's, or the model's own prediction on the clean image, which leaks nothing
    of the true label (Kurakin et al. 2017, https://arxiv.org/abs/1611.01236)."""
    target: Literal["none", "random", "least_likely", "ranked"] | int = "none"
    """none: untargeted. random: another class, drawn per example. least_likely: the class with the smallest
    clean logit. ranked: the `rank`-th of the other classes by clean logit. A number: that class, for every image."""
    rank: int = 1
    """Of target `ranked`: 1 is the likeliest of the other classes."""
    loss: Literal["cross_entropy", "margin", "dlr", "kl"] = "cross_entropy"
    """margin: max_{i≠y} z_i - z_y (Carlini and Wagner 2017), positive where the attack has succeeded. dlr: the same
    over the spread of the largest logits (Croce and Hein 2020). kl: KL(p(x)‖p(x')), which knows no label (Zhang et al.
    2019); with pgd and start gaussian that is KL-PGD, the attack that TRADES trains on."""

    def __post_init__(self) -> None:
        # cross_entropy takes -100 for "leave this one out", which would be an attack without a gradient.
        require(
            isinstance(self.target, str) or self.target >= 0,
            f"target: {self.target} is no class; they are counted from 0",
        )
        require(self.rank >= 1, f"rank: {self.rank} is below 1, the likeliest of the other classes")
        require(self.rank == 1 or self.target == "ranked", f"rank: {self.rank} says nothing without target ranked")
        require(
            self.loss != "kl" or (self.label == "true" and self.target == "none"),
            f"loss: kl is the distance from the clean prediction, and takes no target ({self.target!r}) nor label "
            f"({self.label!r}); leave both out, or take cross_entropy",
        )

    def require(self, setting: Setting) -> None:
        """Raise InputError where the data has too few classes."""
        if setting.data is None:
            return
        classes = setting.data.classes
        require(
            not isinstance(self.target, int) or self.target < classes,
            f"target: {self.target} is not one of the {classes} classes; the last is {classes - 1}",
        )
        require(
            self.rank < classes, f"rank: {self.rank} of {classes} classes; there are {classes - 1} other than the label"
        )
        least = 3 if self.target == "none" else 4
        require(
            self.loss != "dlr" or classes >= least,
            f"loss: dlr divides by the spread of the {least} largest logits, and the data has {classes} classes; "
            "take margin",
        )

    def score(self, f: Forward, x: Tensor, y: Tensor, noise: Noise) -> Score:
        clean = None
        if self.loss == "kl" or self.label == "predicted" or self.target in ("random", "least_likely", "ranked"):
            with torch.no_grad():
                clean = f(x)
        if self.loss == "kl" and clean is not None:
            return LabelScore(f, lambda logits, reference: kl(reference, logits), (clean,))
        if self.label == "predicted" and clean is not None:
            y = clean.argmax(1)
        if self.target == "none":
            return LabelScore(f, {"cross_entropy": cross_entropy, "margin": margin, "dlr": dlr}[self.loss], (y,))
        t = self._target(clean, y, noise)
        if self.loss == "dlr":
            return LabelScore(f, targeted_dlr, (y, t))
        return LabelScore(f, targeted_margin if self.loss == "margin" else _towards, (t,))

    def _target(self, clean: Tensor | None, y: Tensor, noise: Noise) -> Tensor:
        if clean is None:
            return torch.full_like(y, int(self.target))
        if self.target == "least_likely":
            return clean.argmin(1)
        if self.target == "random":
            return (y + 1 + noise.fold("target").below(clean.shape[1] - 1)) % clean.shape[1]
        if self.target == "ranked":
            others = clean.scatter(1, y[:, None], -torch.inf)
            return others.sort(stable=True, dim=1, descending=True).indices[:, self.rank - 1]
        return torch.full_like(y, int(self.target))


def is_attack(part: Any) -> bool:
    """By its being called, as an objective is too; and an attack's configuration is a dataclass."""
    return is_dataclass(part) and callable(part) and not isinstance(part, (Objective, type))


def attacks_in(part: Any) -> Iterator[tuple[str, Attack]]:
    """The attacks among the fields of a dataclass, by field; those of a tuple one by one."""
    for field in fields(part) if is_dataclass(part) else ():
        value = getattr(part, field.name)
        for item in value if isinstance(value, tuple) else (value,):
            if is_attack(item):
                yield field.name, item


def boundary_attack(attack: Attack) -> Attack | None:
    """It, or the first that it is made of, with `boundary = True`: one that takes a positive score for a success."""
    if getattr(attack, "boundary", False):
        return attack
    found = (boundary_attack(part) for _field, part in attacks_in(attack))
    return next((part for part in found if part is not None), None)


def require_random_start(attack: Attack, reason: str, field: str = "attack") -> None:
    """Raise InputError, which names `field`, where the attack, or one that it is made of, takes its first gradient at
    the image itself.

    For scores that are least there: their gradient is zero, or of rounding's size, whose sign is a step into nowhere.
    """
    at_image = getattr(attack, "from_image", False) or getattr(attack, "start", None) == "none"
    starts = not at_image and getattr(attack, "random_start", True)
    require(starts, f"{field}: starts from the image, where {reason} and has no gradient; give it a random start")
    for _field, part in attacks_in(attack):
        require_random_start(part, reason, field)


def require_pair(attack: Attack, goal: Goal | None, field: str = "attack") -> None:
    """Raise InputError, which names `field`, where the attack seeks the boundary of a score that has none, or starts
    where the score has no gradient.

    None for the goal is a score of another kind, such as TRADES' KL.
    """
    if goal is not None and goal.loss == "kl":
        require_random_start(attack, "the kl is 0", field)
    seeker = boundary_attack(attack)
    told = "no goal" if goal is None else f"no {goal.loss}"
    remedy = "take pgd" if goal is None else "set goal.loss to margin"
    require(
        seeker is None or (goal is not None and goal.loss == "margin"),
        f"{field}: {type(seeker).__name__} looks for where the network turns wrong, which {told} tells; {remedy}",
    )


def _towards(logits: Tensor, t: Tensor) -> Tensor:
    return -cross_entropy(logits, t)
