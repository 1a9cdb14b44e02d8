"""What a network makes of a batch, clean and attacked: the predictions behind every figure."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from robustscale.attacks.base import Goal, relaxing, score_of
from robustscale.errors import InputError
from robustscale.evaluation.words import Attacker, threat_of
from robustscale.noise import Noise, drawing
from robustscale.threat import Threat
from robustscale.types import Attack, Batch, Forward, Score

NONFINITE = -1
"""The predicted class where a logit, a score or an input gradient was NaN or infinite: never equal to a label.
argmax of NaN logits is class 0, and sign(NaN) is 0, so that a broken network would look right and robust."""


class Asked(NamedTuple):
    """A network, and how it is asked."""

    f: Forward
    seed: int
    draws: int = 1
    """Predictions of each image."""
    randomised: bool = False

    def predictions(self, x: Tensor, index: Tensor) -> Tensor:
        """(N, draws) predicted classes. A draw is one network without randomness: its noise depends on (seed, id, draw)
        alone, so that the clean and every attacked image of an example meet the same one."""
        every = []
        for draw in range(self.draws):
            with drawing(Noise.of(self.seed, index, "predict", draw)):
                every.append(classify(self.f, x))
        return torch.stack(every, 1)


def classify(f: Forward, x: Tensor) -> Tensor:
    """(N,) predicted classes; NONFINITE where a logit is not finite."""
    with torch.no_grad():
        logits = f(x)
    return torch.where(logits.isfinite().all(1), logits.argmax(1), NONFINITE)


class _Attempt(NamedTuple):
    """One run of an attack after one goal."""

    attack: Attack
    goal: Goal
    noise: Noise
    """The attack's; `goal_noise` is one for all restarts, and so is a target drawn from it."""
    goal_noise: Noise


def attacked(asked: Asked, batch: Batch, name: str, attacker: Attacker) -> Tensor:
    """(N, draws) predicted classes under the worst of the attacker's restarts and targets.

    They are judged one by one, since the one with the highest score may be right where another fooled the network; each
    is run on the images still standing: those right in some draw. An image keeps the attempt that leaves the fewest
    draws right, the first among equals. An attacker does not see the draw that it will meet, so that it cannot choose
    for each.
    """
    right = batch.y[:, None].expand(-1, asked.draws)
    verdict = right.clone()
    for attempt in _attempts(attacker, Noise.of(asked.seed, batch.index, "evaluate", name)):
        standing = (verdict == right).any(1).nonzero().squeeze(1)
        if len(standing) == 0:
            break
        found = _attempted(asked, batch.rows(standing), name, attempt, standing)
        own, before = right[standing], verdict[standing]
        worse = (found == own).sum(1) < (before == own).sum(1)
        verdict[standing] = torch.where(worse[:, None], found, before)
    return verdict


def _attempts(attacker: Attacker, noise: Noise) -> Iterator[_Attempt]:
    restarts = getattr(attacker.attack, "restarts", 1)
    once = attacker.attack
    if restarts > 1:
        once = dataclasses.replace(attacker.attack, restarts=1)  # type: ignore[type-var]
    for rank in range(1, max(attacker.targets, 1) + 1):
        goal, streams = attacker.goal, noise
        if attacker.targets:
            goal, streams = dataclasses.replace(goal, target="ranked", rank=rank), noise.fold("rank", rank)
        for restart in range(restarts):
            yield _Attempt(once, goal, streams.fold("restart", restart) if restart else streams, noise)


def _attempted(asked: Asked, batch: Batch, name: str, attempt: _Attempt, rows: Tensor) -> Tensor:
    """`rows` are the batch's places among the examples of the attempt's streams."""
    noise, goal_noise = attempt.noise.rows(rows), attempt.goal_noise.rows(rows)
    threat = threat_of(attempt.attack)
    broken = torch.zeros(len(batch.y), dtype=torch.bool, device=batch.x.device)
    visited = _Visited(asked.f, threat, batch)
    looks = getattr(attempt.attack, "visited", False) and not asked.randomised
    with drawing(goal_noise.fold("goal")):
        # The same draws for every rank, or two of them might be one class.
        score = attempt.goal.score(visited if looks else asked.f, batch.x, batch.y, goal_noise)
    with drawing(noise.fold("network")), relaxing(asked.f):
        x_adv = attempt.attack(_Watched(score, broken, batch.x), batch.x, noise=noise)
    broken |= ~x_adv.isfinite().flatten(1).all(1)
    x_adv = torch.where(broken.view(-1, *(1,) * (x_adv.dim() - 1)), batch.x, x_adv)
    _check_inside(name, threat, x_adv, batch)
    predicted = asked.predictions(x_adv, batch.index)
    predicted = torch.where(predicted == batch.y[:, None], visited.predicted[:, None], predicted)
    return torch.where(broken[:, None], NONFINITE, predicted)


class _Visited:
    """The network, which keeps for each example the first wrong class met within ball and box.

    For attacks that name themselves `visited`: such an attack breaks an image by any point it looks at, as AutoAttack
    has it, though it returns but one.
    """

    def __init__(self, f: Forward, threat: Threat, batch: Batch) -> None:
        self.f, self.threat, self.batch = f, threat, batch
        self.predicted = batch.y

    def __call__(self, x: Tensor) -> Tensor:
        logits: Tensor = self.f(x)
        with torch.no_grad():
            inside = ~(_outside(self.threat, x, self.batch.x) | _off_box(x))
            news = inside & (self.predicted == self.batch.y)
            self.predicted = torch.where(news, logits.argmax(1), self.predicted)
        return logits


class _Watched:
    """The same score, which marks in `broken` each example whose score or input gradient is not finite."""

    def __init__(self, score: Score, broken: Tensor, x: Tensor, which: Tensor | None = None) -> None:
        self.score, self.broken, self.x = score, broken, x
        self.which = torch.arange(len(broken), device=broken.device) if which is None else which

    def __call__(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            x.register_hook(self._mark)
        values = self.score(x)
        self._mark(values[:, None])
        return values

    def rows(self, rows: Tensor) -> Score:
        return _Watched(score_of(self.score, self.x, rows), self.broken, self.x[rows], self.which[rows])

    def _mark(self, values: Tensor) -> None:
        bad = ~values.detach().isfinite().flatten(1).all(1)
        self.broken.index_copy_(0, self.which, self.broken[self.which] | bad)


def _outside(threat: Threat, x_adv: Tensor, x: Tensor) -> Tensor:
    """(N,) bool. The slack: x + δ was rounded to float32, by up to 3e-8 a pixel, and `project` computed its norm in
    float32, good to about 1e-6. The difference taken here, in float64, is exact."""
    return threat.size(x_adv.double() - x.double()) > threat.eps * (1 + 1e-5) + 1e-7


def _off_box(x: Tensor) -> Tensor:
    return ((x < 0) | (x > 1)).flatten(1).any(1)


def _check_inside(name: str, threat: Threat, x_adv: Tensor, batch: Batch) -> None:
    if x_adv.shape != batch.x.shape or x_adv.dtype != batch.x.dtype:
        raise InputError(
            f"attack {name}: gave {x_adv.dtype} {tuple(x_adv.shape)}; it must keep the images' type and shape"
        )
    off_box = _off_box(x_adv)
    if bool((_outside(threat, x_adv, batch.x) | off_box).any()):
        size = threat.size(x_adv.double() - batch.x.double())
        worst = int(torch.argmax(size + off_box * 1e9))
        what = (
            "is outside [0, 1]"
            if bool(off_box[worst])
            else f"is {float(size[worst]):.6g} away, over eps {threat.eps:.6g}"
        )
        raise InputError(
            f"attack {name}: its image {int(batch.index[worst])} {what}; end the attack with threat.project"
        )
