"""Training whose attack grows to its full strength."""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar, cast

from torch import nn

from robustscale.fields import require
from robustscale.objectives.pgd_at import PgdAt
from robustscale.threat import Threat
from robustscale.types import Batch, Loss, Objective, Progress

T = TypeVar("T")


@dataclass(frozen=True)
class EpsWarmup(Objective):
    """Any objective with ε · min(1, (t + 1) / (w T)) in the place of ε, at step t of T (Debenedetti et al. 2022,
    https://arxiv.org/abs/2209.07399, "ε-warmup").

    Every threat model of the objective is scaled, and step sizes with it, so that an attack keeps its shape. The
    authors' code leaves the step size as it is, which is the ball's for their one step, and raises ε from epoch to
    epoch, the first without an attack. Costs what the objective costs.

    Use: to train transformers, or at a large ε, from scratch, where the full attack leaves nothing to learn from at
        first; the authors take 20 epochs of 110.
    Breaks: a short training, by leaving few epochs at the full ε; held-out RA is measured at the full ε all along, and
    low until then.
    """

    objective: Objective = PgdAt()
    """What is trained, with its attack at full strength."""
    share: float = 0.1
    """w: share of training after which ε is whole."""

    def __post_init__(self) -> None:
        require(
            0 < self.share <= 1, f"share: {self.share!r} is outside (0, 1]; it is a share of training, 0.1 is usual"
        )
        require(
            not isinstance(self.objective, EpsWarmup),
            "objective: eps_warmup inside eps_warmup; give one of them the longer share",
        )

    def perturb(self, model: nn.Module, batch: Batch, at: Progress) -> Any:
        return self.now(at).perturb(model, batch, at)

    def loss(self, model: nn.Module, batch: Batch, found: Any, at: Progress) -> Loss:
        return self.now(at).loss(model, batch, found, at)

    def now(self, at: Progress) -> Objective:
        """The objective of this step."""
        factor = (at.step + 1) / max(1.0, self.share * at.total_steps)
        return self.objective if factor >= 1 else scaled(self.objective, factor)


def scaled(part: T, factor: float) -> T:
    """A component with every ε in it, and every step size beside one, times the factor."""
    if isinstance(part, tuple) and not hasattr(part, "_fields"):
        return cast(T, tuple(scaled(item, factor) for item in part))
    if not is_dataclass(part) or isinstance(part, type):
        return part
    if isinstance(part, Threat):
        return cast(T, replace(part, eps=part.eps * factor))
    changes = {field.name: scaled(getattr(part, field.name), factor) for field in fields(part)}
    if isinstance(changes.get("threat"), Threat) and changes.get("step_size") is not None:
        changes["step_size"] *= factor
    return replace(part, **changes)
