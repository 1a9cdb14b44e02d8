"""Early stopping on held-out robust accuracy."""

from __future__ import annotations

import math

from robustscale.fields import require
from robustscale.types import State


class EarlyStopping:
    """Adversarial training overfits after the first drop of the learning rate: robust test accuracy falls while robust
    training accuracy rises, and the best held-out epoch is the one to keep (Rice et al. 2020,
    https://arxiv.org/abs/2002.11569).
    """

    def __init__(self, patience: int | None) -> None:
        """Stop at the `patience`-th look in a row without a rise; None never stops, and still knows the best."""
        require(patience is None or patience >= 1, f"patience: {patience} is below 1; leave it out for never")
        self.patience = patience
        self.best: float | None = None
        self.since = 0
        """Looks since the best one."""

    def look(self, ra: float) -> tuple[bool, bool]:
        """(whether this is the best so far, whether to stop), for a fraction. A tie is no rise, nor is NaN."""
        require(math.isnan(ra) or 0 <= ra <= 1, f"ra: {ra!r} is outside [0, 1]; it is a fraction")
        better = not math.isnan(ra) and (self.best is None or ra > self.best)
        if better:
            self.best, self.since = ra, 0
        else:
            self.since += 1
        return better, self.patience is not None and self.since >= self.patience

    def state_dict(self) -> State:
        """JSON types. Without `patience`, which may be another one when the run goes on."""
        return {"best": self.best, "since": self.since}

    def load_state_dict(self, state: State) -> None:
        self.best, self.since = state["best"], state["since"]
