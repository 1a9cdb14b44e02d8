"""Several runs of one attack."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from robustscale.attacks.combining import Combined, highest
from robustscale.attacks.pgd import PGD
from robustscale.fields import require
from robustscale.noise import Noise
from robustscale.types import Attack, Score


@dataclass(frozen=True)
class Restarts(Combined):
    """The attack several times with draws of its own; each example keeps the run that ends with the highest score.

    x' = argmax_r score(x'_r). As PGD's own `restarts` (the same draws and the same images), for attacks without such a
    field. Evaluation judges restarts one by one instead. Costs that many times the attack, and as many forwards more.

    Use: in evaluation, to give an attack with a random start more than one chance.
    Breaks: an attack without random draws ends at the same image every time; and five restarts of one attack are
    weaker than five different ones (Croce and Hein 2020, https://arxiv.org/abs/2003.01690).
    """

    attack: Attack = PGD()
    restarts: int = 5

    def __post_init__(self) -> None:
        require(self.restarts >= 1, f"restarts: {self.restarts} is below 1; 1 is a single run")
        own = getattr(self.attack, "restarts", 1)
        # Two such counters would draw some of the starts twice.
        require(own == 1, f"attack: has {own} restarts of its own; set attack.restarts to 1")

    def __call__(
        self, score: Score, x: Tensor, *, noise: Noise, on_step: Callable[[Tensor], None] | None = None
    ) -> Tensor:
        streams = (noise.fold("restart", r) if r else noise for r in range(self.restarts))
        return highest(score, (self.attack(score, x, noise=own, on_step=on_step) for own in streams))
