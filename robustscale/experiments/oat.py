"""OAT's frontiers (Wang et al. 2020, https://arxiv.org/abs/2010.11828): one network for every λ against one for each.

Throughout: the recipes cifar10_oat, svhn_oat and stl10_oat; eps 8/255, trained by PGD-7, judged by PGD-20. A dedicated
network is PGD-AT mixed with λ: (1 - λ) CE(x) + λ CE(x'), on the network without FiLM and with plain BatchNorm; at
λ = 0 that is natural training. The paper draws its frontiers and prints no table of them.

Reported are the last weights, of OAT and dedicated networks alike: those with the best held-out RA would be chosen for
another λ than they are read at. The paper's authors select on the test set.
"""

from __future__ import annotations

import dataclasses

from robustscale import recipes
from robustscale.experiments.base import (
    Cell,
    Experiment,
    Figure,
    Plot,
    Scale,
    Training,
    compared,
    curve,
    point,
    sa_and_ra,
)
from robustscale.models.conditional import Conditional
from robustscale.objectives.oat import Oat
from robustscale.objectives.pgd_at import PgdAt
from robustscale.run import Run

MARGIN = 0.02
"""By how much a point of one network may stay below the dedicated one's and still be called as good: two points."""


def _last(run: Run) -> Run:
    return dataclasses.replace(run, evaluation=dataclasses.replace(run.evaluation, report="last"))


def _dedicated(run: Run, lam: float) -> Run:
    assert isinstance(run.model, Conditional)
    assert isinstance(run.objective, Oat)
    objective = PgdAt(attack=run.objective.attack, beta=1 - lam)
    return dataclasses.replace(run, name=f"{run.name}-dedicated-{lam:g}", model=run.model.model, objective=objective)


def _frontier(scale: Scale, recipe: str, data: str, network: str) -> Experiment:
    run = _last(recipes.get(recipe))
    assert isinstance(run.objective, Oat)
    lambdas = run.objective.lambdas
    once = curve(Training(scale.shrink(run)), [{"lam": lam} for lam in lambdas])
    figures: list[Figure] = []
    pairs: list[tuple[Cell, Cell]] = []
    for lam in lambdas:
        ours, theirs = f"OAT, λ {lam:g}", f"dedicated, λ {lam:g}"
        figures += [Figure(ours, name.upper(), once, (point(lam=lam), name)) for name in ("sa", "ra")]
        figures += sa_and_ra(theirs, Training(scale.shrink(_dedicated(run, lam))))
        pairs += [((ours, column), (theirs, column)) for column in ("SA", "RA")]
    return Experiment(
        title=f"OAT's frontier, {data}, {network}",
        report=f"OAT (Wang et al. 2020), frontier on {data}",
        claim="One network that is told λ is nowhere below the networks that were trained for each λ, to two points.",
        figures=tuple(figures),
        verdict=lambda found: compared(found, pairs, margin=MARGIN),
        plot=Plot("RA, %", "SA, %", "frontier"),
        notes=(
            "Dedicated: PGD-AT on (1 - λ) CE(x) + λ CE(x'); λ 0 is natural training.",
            "Reported are the last weights of all networks, not those with the best held-out RA.",
        ),
    )


def oat_cifar10(scale: Scale) -> Experiment:
    """OAT on CIFAR-10, ResNet-34: one network for every lambda, as good as one for each.

    Varies lambda: 0, 0.1, 0.2, 0.3, 0.4, 1; one OAT network, and six by PGD-AT mixed with lambda.
    Differs: the last weights are reported, where the authors select on the test set.
    Cost: 7 trainings, 1,400 epochs.
    """
    return _frontier(scale, "cifar10_oat", "CIFAR-10", "ResNet-34")


def oat_svhn(scale: Scale) -> Experiment:
    """OAT on SVHN, WRN-16-8: one network for every lambda, as good as one for each.

    Varies lambda, as oat_cifar10.
    Differs: as oat_cifar10.
    Cost: 7 trainings, 1,400 epochs.
    """
    return _frontier(scale, "svhn_oat", "SVHN", "WRN-16-8")


def oat_stl10(scale: Scale) -> Experiment:
    """OAT on STL-10, WRN-40-2: one network for every lambda, as good as one for each.

    Varies lambda, as oat_cifar10.
    Differs: as oat_cifar10; a tenth of the 5,000 training images is held out.
    Cost: 7 trainings, 1,400 epochs.
    """
    return _frontier(scale, "stl10_oat", "STL-10", "WRN-40-2")
