"""Certificates of many images: how they are asked for, and the figures that follow from them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustscale.engine.folder import RunFolder
from robustscale.evaluation.result import Figure
from robustscale.evaluation.smoothing import ABSTAIN, Certificate, largest_radius
from robustscale.fields import Pixels, require

SCHEMA = 1


@dataclass(frozen=True)
class Certification:
    """How images are certified; what Cohen et al. call σ, n₀, n and α. The defaults are theirs."""

    sigma: Pixels
    """Standard deviation of the noise, in [0, 1] pixels; that of training, as a rule. Larger radii, lower accuracy."""
    n0: int = 100
    """Draws that choose the class."""
    n: int = 100_000
    """Draws that bound its probability. The radius an image can reach is sigma * Phi^-1(alpha^(1/n))."""
    alpha: float = 0.001
    """Chance, over the draws, that a certificate is wrong."""
    batch: int = 1000
    """Draws that a worker classifies together. A matter of memory and speed, not of the result."""

    def __post_init__(self) -> None:
        require(
            self.sigma != 0,
            "sigma: 0 is no noise, and without noise the smoothed classifier is the network itself, of which nothing "
            "is proven; take that of training, 0.25 for example",
        )
        require(0 < self.sigma < math.inf, f"sigma: {self.sigma!r} is no standard deviation above 0; 0.25 for example")
        require(self.n0 >= 1, f"n0: {self.n0} is below 1; 100 is the paper's")
        require(self.n >= 1, f"n: {self.n} is below 1; 100000 is the paper's")
        require(0 < self.alpha < 0.5, f"alpha: {self.alpha!r} is outside (0, 0.5); 0.001 is the paper's")
        require(self.batch >= 1, f"batch: {self.batch} is below 1")
        require(
            self.largest_radius > 0,
            f"n: {self.n} draws prove nothing at alpha {self.alpha:g}, even if all agree; "
            f"take at least {math.floor(math.log(self.alpha) / math.log(0.5)) + 1}",
        )

    @property
    def largest_radius(self) -> float:
        return largest_radius(self.sigma, self.n, self.alpha)


@dataclass(frozen=True)
class Certified:
    """Images with their certificates, in order of their ids."""

    index: Sequence[int]
    label: Sequence[int]
    certificate: Sequence[Certificate]
    by: Certification

    @property
    def radius(self) -> Tensor:
        """(N,) float64: as certified for the right class; 0 where that is another, or CERTIFY abstains."""
        own = [c.radius(self.by.sigma, self.by.n, self.by.alpha) for c in self.certificate]
        right = (c.top == y for c, y in zip(self.certificate, self.label, strict=True))
        radii = [r if ok and r is not None else 0.0 for r, ok in zip(own, right, strict=True)]
        return torch.tensor(radii, dtype=torch.float64)

    def accuracy(self, radius: float) -> Figure:
        """The share of images certified for their class at this radius, or a larger one."""
        return Figure.of((self.radius > 0) & (self.radius >= radius))

    @property
    def acr(self) -> float:
        """Average certified radius (Zhai et al. 2020, https://arxiv.org/abs/2001.02378): 0 for an image that is wrong
        or not certified."""
        return float(self.radius.mean())


def certification_folder(folder: RunFolder, sigma: float) -> Path:
    return folder.path / f"certify-{sigma:g}"


def chosen(num_examples: int, every: int | None, images: int | None) -> list[int]:
    """The ids to certify: each `every`-th, by default so that about 500 of them are spread over the test set, as
    the paper takes; of these the first `images`. Raises InputError where that is none."""
    require(every is None or every >= 1, f"every: {every} is below 1; 1 is each image")
    require(images is None or images >= 1, f"images: {images} is below 1")
    step = every or max(1, num_examples // 500)
    return list(range(0, num_examples, step))[:images]


def certification_result(certified: Certified) -> dict[str, Any]:
    """certify.json. The certified accuracy is at multiples of sigma / 2, up to what n draws can prove."""
    by = certified.by
    n = len(certified.index)
    abstained = sum(c.radius(by.sigma, by.n, by.alpha) is None for c in certified.certificate)
    predicted = torch.tensor([c.predicted for c in certified.certificate])
    right = predicted == torch.tensor(certified.label)
    radii = [k * by.sigma / 2 for k in range(math.floor(2 * by.largest_radius / by.sigma) + 1)]
    return {
        "schema": SCHEMA,
        "norm": "l2",
        **dataclasses.asdict(by),
        "images": n,
        "every": certified.index[1] - certified.index[0] if n > 1 else 1,
        "acr": certified.acr,
        "abstained": abstained,
        "largest_radius": by.largest_radius,
        "certified": [{"radius": r, **certified.accuracy(r).named("accuracy")} for r in radii],
        "predict": {**Figure.of(right).named("accuracy"), "abstained": int((predicted == ABSTAIN).sum())},
    }


def write_certificates(certified: Certified, path: Path) -> None:
    """A Parquet table with a row an image: index, label, certified class and radius (both null where CERTIFY abstains),
    the bound p and the hits behind it, and the class by PREDICT (null where that abstains)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    by = certified.by
    radius = [c.radius(by.sigma, by.n, by.alpha) for c in certified.certificate]
    proven = [None if r is None else c.top for c, r in zip(certified.certificate, radius, strict=True)]
    predicted = [None if c.predicted == ABSTAIN else c.predicted for c in certified.certificate]
    columns = {
        "index": pa.array(certified.index, pa.int64()),
        "label": pa.array(certified.label, pa.int64()),
        "certified": pa.array(proven, pa.int64()),
        "radius": pa.array(radius, pa.float64()),
        "top": pa.array([c.top for c in certified.certificate], pa.int64()),
        "hits": pa.array([c.hits for c in certified.certificate], pa.int64()),
        "predicted": pa.array(predicted, pa.int64()),
    }
    part = path.with_name(path.name + ".part")
    pq.write_table(pa.table(columns), part)
    part.replace(path)
