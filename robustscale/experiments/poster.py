"""The poster: PGD-AT against Carlini and Wagner's margin, against randomised training, and against several norms.

Throughout: CIFAR-10, ResNet-18, as `cifar10_pgd_at`: eps 8/255, K 10, alpha 2/255, RA by PGD-20; 128/255 and alpha
15/255 in l2; 200 epochs. The poster's own settings and figures are not known to us. "PGD-AT" is one training for all.
"""

from __future__ import annotations

import dataclasses

from robustscale import recipes
from robustscale.attacks.base import Goal
from robustscale.attacks.pgd import PGD
from robustscale.attacks.random_of import RandomOf
from robustscale.attacks.worst_of import WorstOf
from robustscale.experiments.base import (
    Experiment,
    Figure,
    Scale,
    Training,
    attacked,
    compared,
    evaluated,
    result,
    sa_and_ra,
)
from robustscale.models.resnet import ResNet
from robustscale.models.spectral_norm import SpectralNorm
from robustscale.objectives.cw_pgd import CwPgd
from robustscale.objectives.mat_max import MatMax
from robustscale.objectives.mat_rand import MatRand
from robustscale.objectives.pgd_at import PgdAt
from robustscale.objectives.rat import Rat
from robustscale.threat import L2, Linf

_LINF = PGD(Linf(8 / 255), steps=10, step_size=2 / 255)
_L2 = PGD(L2(128 / 255), steps=10, step_size=15 / 255)
_LINF_TEST = dataclasses.replace(_LINF, steps=20)
_L2_TEST = dataclasses.replace(_L2, steps=20)
_SPECTRAL = SpectralNorm(ResNet(18))
_SIGMA = 0.25
_NOTES = ("The poster's settings and figures are not known; these are usual of PGD-AT.",)


def _trained(scale: Scale, name: str, **changes: object) -> Training:
    run = dataclasses.replace(recipes.get("cifar10_pgd_at"), name=f"poster-{name}", **changes)  # type: ignore[arg-type]
    return Training(scale.shrink(run))


def _pgd(scale: Scale) -> Training:
    return _trained(scale, "pgd")


def poster_table_1(scale: Scale) -> Experiment:
    """Poster, table 1: PGD-AT against C&W and PGD 50 / 50, with smoothing and spectral norm.

    Varies the objective (half of each batch by the margin of Carlini and Wagner, half by PGD), label smoothing of 0.1,
    and spectral normalisation. RA under PGD on the cross entropy, and on the margin.
    Differs: "smoothing" is read as label smoothing. What the poster concludes is not known to us.
    Cost: 5 trainings, 1,000 epochs.
    """
    half = CwPgd(attack=_LINF)
    rows = {
        "PGD-AT": _pgd(scale),
        "C&W 50 / 50": _trained(scale, "cw", objective=half),
        "… with smoothing": _trained(scale, "cw-smooth", objective=half, label_smoothing=0.1),
        "… with spectral norm": _trained(scale, "cw-spectral", objective=half, model=_SPECTRAL),
        "… with both": _trained(scale, "cw-both", objective=half, model=_SPECTRAL, label_smoothing=0.1),
    }
    figures: list[Figure] = []
    for row, training in rows.items():
        margin = attacked(training, _LINF_TEST, Goal(loss="margin"))
        figures += [*sa_and_ra(row, training), Figure(row, "RA, margin", margin, "ra")]
    return Experiment(
        title="PGD-AT against C&W 50 / 50",
        report="Poster, table 1",
        claim="Training on C&W and PGD by halves withstands the margin attack better than PGD-AT.",
        figures=tuple(figures),
        verdict=lambda found: compared(found, [(("C&W 50 / 50", "RA, margin"), ("PGD-AT", "RA, margin"))]),
        notes=(*_NOTES, "Smoothing is label smoothing of 0.1.", "What the poster concludes is not known."),
    )


def poster_table_2(scale: Scale) -> Experiment:
    """Poster, table 2: adversarial training (AT) against randomised adversarial training (RAT).

    Varies the objective; RAT is judged behind the noise that it is trained with, sigma 0.25, by an attack averaged over
    20 draws, and AT without noise and behind it.
    Differs: sigma is that of the methods' authors. What the poster concludes is not known to us.
    Cost: 2 trainings, 400 epochs.
    """
    at, rat = _pgd(scale), _trained(scale, "rat", objective=Rat(attack=_LINF, sigma=_SIGMA))
    figures = list(sa_and_ra("AT", at))
    for row, training in (("AT behind noise", at), ("RAT behind noise", rat)):
        read = evaluated(training, noise=_SIGMA)
        keys = (("SA", "sa"), ("RA", "ra"), ("RA, blind attack", "blind_ra"))
        figures += [Figure(row, column, read, key) for column, key in keys]
    return Experiment(
        title="AT against RAT",
        report="Poster, table 2",
        claim="RAT is more robust than AT, each behind the noise or each as it was trained.",
        figures=tuple(figures),
        verdict=lambda found: compared(
            found, [(("RAT behind noise", "RA"), (row, "RA")) for row in ("AT", "AT behind noise")]
        ),
        notes=(
            *_NOTES,
            "RA behind noise is by an attack averaged over 20 draws; a blind one overrates it.",
            "RAT's weights are chosen by held-out RA without noise.",
            "What the poster concludes is not known.",
        ),
    )


def poster_table_3(scale: Scale) -> Experiment:
    """Poster, table 3: PGD-AT in one norm against MAT in two: MAT is robust in both.

    Varies the objective: PGD-AT in l-infinity and in l2, MAT-Rand, MAT-Max.
    Differs: weights are chosen by held-out RA in l-infinity, whatever they were trained on. What the poster concludes
    is not known to us.
    Cost: 4 trainings, 800 epochs.
    """
    rows = {
        "PGD-AT ℓ∞": _pgd(scale),
        "PGD-AT ℓ2": _trained(scale, "pgd-l2", objective=PgdAt(attack=_L2)),
        "MAT-Rand": _trained(scale, "mat-rand", objective=MatRand(attack=RandomOf((_LINF, _L2)))),
        "MAT-Max": _trained(scale, "mat-max", objective=MatMax(attack=WorstOf((_LINF, _L2)))),
    }
    figures = []
    for row, training in rows.items():
        own = result(training)
        figures += [Figure(row, "SA", own, "sa"), Figure(row, "RA ℓ∞", own, "ra")]
        figures.append(Figure(row, "RA ℓ2", attacked(training, _L2_TEST), "ra"))
    gains = [((mat, "RA ℓ2"), ("PGD-AT ℓ∞", "RA ℓ2")) for mat in ("MAT-Rand", "MAT-Max")]
    gains += [((mat, "RA ℓ∞"), ("PGD-AT ℓ2", "RA ℓ∞")) for mat in ("MAT-Rand", "MAT-Max")]
    return Experiment(
        title="PGD-AT against MAT",
        report="Poster, table 3",
        claim="MAT is more robust than PGD-AT in the norm that PGD-AT was not trained on.",
        figures=tuple(figures),
        verdict=lambda found: compared(found, gains),
        notes=(
            *_NOTES,
            "What the poster concludes is not known: asked is what MAT's authors claim.",
            "All weights are those with the best held-out RA in ℓ∞, whatever they were trained on.",
        ),
    )
