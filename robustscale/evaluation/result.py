"""Figures from examples: SA, RA, their intervals, and the table of every image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustscale.config import encode
from robustscale.evaluation.accuracy import NONFINITE, Examples
from robustscale.evaluation.words import Attacker, threat_of, threat_text

SCHEMA = 1


def wilson(correct: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The score interval of a proportion (Wilson 1927, https://doi.org/10.2307/2276774); 95 % by default.

    It is about the images drawn, not about the seed of training. Unlike p ± z·se it stays in [0, 1] and has a width
    at 0 of n.
    """
    p, z2 = correct / n, z * z
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * (p * (1 - p) / n + z2 / (4 * n * n)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True)
class Figure:
    """A share of images."""

    correct: int
    n: int

    @classmethod
    def of(cls, correct: Tensor) -> Figure:
        return cls(int(correct.sum()), len(correct))

    @property
    def value(self) -> float:
        return self.correct / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson, 95 %."""
        return wilson(self.correct, self.n)

    def named(self, name: str) -> dict[str, Any]:
        return {name: self.value, f"{name}_interval": list(self.interval)}


def standard(examples: Examples) -> Figure:
    """SA: the share of clean images that are classified correctly."""
    return Figure.of(examples.right)


def robust(examples: Examples, *names: str) -> Figure:
    """RA: the share that is correct clean and under every one of these attacks, image by image. Several attacks
    within one ball give their worst case, a tighter upper bound than any of them."""
    return Figure.of(examples.robust(*names))


def num_nonfinite(examples: Examples) -> int:
    """Images where anything was not finite, clean or attacked. They count as wrong."""
    columns = torch.stack([examples.predicted, *examples.adversarial.values()])
    return int((columns == NONFINITE).any(0).sum())


def run_result(
    examples: Examples, name: str, attacker: Attacker, *, weights: str, step: int, epoch: int
) -> dict[str, Any]:
    """result.json: what a run scored on the test set under its own evaluation attack, named `name` in `examples`."""
    return {
        "schema": SCHEMA,
        **standard(examples).named("sa"),
        **robust(examples, name).named("ra"),
        "n": len(examples.index),
        "nonfinite": num_nonfinite(examples),
        "attack": encode(attacker.attack),
        "goal": encode(attacker.goal),
        "weights": weights,
        "step": step,
        "epoch": epoch,
    }


def attack_results(examples: Examples, attacks: Mapping[str, Attacker]) -> dict[str, Any]:
    """SA, RA under each attack, and the worst case over the attacks of each threat model that has several."""
    balls: dict[str, list[str]] = {}
    for name, attacker in attacks.items():
        balls.setdefault(threat_text(threat_of(attacker.attack)), []).append(name)
    return {
        "schema": SCHEMA,
        **standard(examples).named("sa"),
        "n": len(examples.index),
        "nonfinite": num_nonfinite(examples),
        "attacks": {
            name: {
                **robust(examples, name).named("ra"),
                "attack": encode(attacker.attack),
                "goal": encode(attacker.goal),
            }
            for name, attacker in attacks.items()
        },
        "worst": {
            ball: {**robust(examples, *names).named("ra"), "attacks": names}
            for ball, names in balls.items()
            if len(names) > 1
        },
    }


def write_examples(examples: Examples, path: Path) -> None:
    """A Parquet table with a row an image: index, label, clean, and the class predicted under each attack; null
    where a logit was not finite. Appears whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def column(predicted: Tensor) -> Any:
        return pa.array(predicted.numpy(), mask=(predicted == NONFINITE).numpy())

    columns = {"index": examples.index, "label": examples.label, "clean": examples.predicted, **examples.adversarial}
    table = pa.table({name: column(predicted) for name, predicted in columns.items()})
    part = path.with_name(path.name + ".part")
    pq.write_table(table, part)
    part.replace(path)
