"""Figures from examples: SA, RA, their intervals, and the table of every image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustscale.config import encode
from robustscale.engine.folder import publish
from robustscale.evaluation.accuracy import NONFINITE, Examples
from robustscale.evaluation.words import Attacker, threat_of, threat_text

SCHEMA = 1


def wilson(correct: float, n: int, z: float = 1.959964) -> tuple[float, float]:
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
    """A share of images, or the mean of that of several draws of a randomised network."""

    correct: float
    n: int
    spread: float | None = None
    """The standard deviation of the share over the draws; of one more draw, not of their mean."""

    @classmethod
    def of(cls, correct: Tensor) -> Figure:
        """Of (N,) or (N, draws) bool."""
        if correct.dim() == 1:
            return cls(int(correct.sum()), len(correct))
        shares = correct.double().mean(0)
        return cls(shares.mean().item() * len(correct), len(correct), shares.std().item())

    @property
    def value(self) -> float:
        return self.correct / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson, 95 %: about the images drawn; of a mean over draws it is on the wide side."""
        return wilson(self.correct, self.n)

    def named(self, name: str) -> dict[str, Any]:
        spread = {} if self.spread is None else {f"{name}_spread": self.spread}
        return {name: self.value, f"{name}_interval": list(self.interval), **spread}


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
    return int((columns == NONFINITE).any(0).view(len(examples.index), -1).any(1).sum())


def asked_of(examples: Examples) -> dict[str, int]:
    """{"draws": ...} where a randomised network was asked several times."""
    return {"draws": examples.predicted.shape[1]} if examples.predicted.dim() == 2 else {}


def encoded(attacker: Attacker) -> dict[str, Any]:
    """What rebuilds an attacker: see `reports.tables.attacker_of`."""
    targets = {"targets": attacker.targets} if attacker.targets else {}
    return {"attack": encode(attacker.attack), "goal": encode(attacker.goal), **targets}


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
        **asked_of(examples),
        **encoded(attacker),
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
        **asked_of(examples),
        "attacks": {
            name: {**robust(examples, name).named("ra"), **encoded(attacker)} for name, attacker in attacks.items()
        },
        "worst": {
            ball: {**robust(examples, *names).named("ra"), "attacks": names}
            for ball, names in balls.items()
            if len(names) > 1
        },
    }


def write_examples(examples: Examples, path: Path) -> None:
    """A Parquet table with a row an image: index, label, clean, and the class predicted under each attack; null
    where a logit was not finite. Of several draws, a list of classes. Appears whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def column(predicted: Tensor) -> Any:
        flat = predicted.flatten()
        values = pa.array(flat.numpy(), mask=(flat == NONFINITE).numpy())
        return values if predicted.dim() == 1 else pa.FixedSizeListArray.from_arrays(values, predicted.shape[1])

    columns = {"index": examples.index, "label": examples.label, "clean": examples.predicted, **examples.adversarial}
    table = pa.table({name: column(predicted) for name, predicted in columns.items()})
    content = pa.BufferOutputStream()
    pq.write_table(table, content)
    publish(path, content.getvalue().to_pybytes())
