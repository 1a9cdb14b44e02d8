"""What attacks that are made of other attacks share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor

from robustscale.attacks.base import attacks_in, score_of
from robustscale.noise import Noise, key_of
from robustscale.threat import Threat
from robustscale.types import Attack, Score


class Combined:
    """An attack that is made of others, which are among its fields."""

    @property
    def threat(self) -> Threat | None:
        """The attacks' common one; None where they differ, or one has none: no single ball holds x' then."""
        threats = {getattr(attack, "threat", None) for _field, attack in attacks_in(self)}
        threat = threats.pop()
        return threat if not threats and isinstance(threat, Threat) else None


def chance(noise: Noise, *path: str) -> float:
    """A draw from [0, 1) that is equal for all examples, in every shard and on every worker; without the device."""
    return key_of(noise.common, *path) % 2**32 / 2**32


def highest(score: Score, candidates: Iterable[Tensor]) -> Tensor:
    """(N, ...): of several x', each example's with the highest score, the first among equals.

    One forward a candidate; none if there is only one. Candidates are computed without gradients.
    """
    top = None
    with torch.no_grad():
        rest = iter(candidates)
        best = next(rest)
        for x_adv in rest:
            top = score(best) if top is None else top
            value = score(x_adv)
            best = torch.where((value > top).view(-1, *(1,) * (x_adv.dim() - 1)), x_adv, best)
            top = torch.maximum(value, top)
    return best


def on_rows(
    attacks: Sequence[Attack],
    rows: Sequence[Tensor],
    score: Score,
    x: Tensor,
    noise: Noise,
    on_step: Callable[[Tensor], None] | None,
) -> Tensor:
    """Each attack on its rows (indices) of the batch, one after another; meanwhile the other examples stand still,
    and so `on_step` sees them."""
    x_adv = x
    for number, (attack, mine) in enumerate(zip(attacks, rows, strict=True)):
        if len(mine) == 0:
            continue
        moved = partial(x_adv.index_copy, 0, mine)
        found = attack(
            score_of(score, x_adv, mine),
            x[mine],
            noise=noise.rows(mine).fold("attack", number),
            on_step=None if on_step is None else partial(_forward_step, on_step, moved),
        )
        x_adv = moved(found)
    return x_adv


def _forward_step(on_step: Callable[[Tensor], None], moved: Callable[[Tensor], Tensor], part: Tensor) -> None:
    on_step(moved(part))
