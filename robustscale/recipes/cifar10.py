"""CIFAR-10 by each objective, for ResNet-18 and WRN-28-10.

Figures are SA / AA, standard accuracy and accuracy under AutoAttack, on the test set in per cent, unless said; RA under
PGD-20, which `result.json` holds, is some points above AA. RobustBench means its snapshot of 2025-03. Costs are
estimates from the networks' FLOPs at a quarter of an H200's bf16 peak (`--precision bf16`, data on the device).
"""

from __future__ import annotations

import dataclasses

from robustscale.attacks.pgd import PGD
from robustscale.engine.optim import SGD
from robustscale.engine.schedule import Piecewise
from robustscale.models.resnet import ResNet
from robustscale.models.wide_resnet import WideResNet
from robustscale.objectives.adversarial_regularization import AdversarialRegularization
from robustscale.objectives.pgd_at import PgdAt
from robustscale.objectives.trades import Trades
from robustscale.run import Data, Evaluation, Run
from robustscale.threat import Linf

_DATA = Data(source="cifar10", augmentation="pad_crop_flip")


def _judged(eps: float, step_size: float) -> Evaluation:
    threat = Linf(eps)
    return Evaluation(attack=PGD(threat, steps=20, step_size=step_size), monitor=PGD(threat, step_size=step_size))


def _wide(run: Run) -> Run:
    return dataclasses.replace(run, name=f"{run.name}_wrn28_10", model=WideResNet(depth=28, widen=10))


def cifar10() -> Run:
    """CIFAR-10, ResNet-18, PGD-AT at 8/255: cifar10_pgd_at by a shorter name.

        python -m robustscale.pretrain cifar10

    Expected: as cifar10_pgd_at, AA 48.7 (published, RobustBench).
    Cost: as cifar10_pgd_at.
    """
    return dataclasses.replace(cifar10_pgd_at(), name="cifar10")


def cifar10_pgd_at() -> Run:
    """CIFAR-10, ResNet-18, PGD-AT (Madry et al. 2018) at 8/255.

        python -m robustscale.pretrain cifar10_pgd_at

    eps 8/255, K 10, alpha 2/255; SGD 0.1, weight decay 5e-4, x 0.1 at 100 and 150 of 200 epochs; the weights with the
    best held-out RA are reported, which is early stopping (Rice et al. 2020).
    Expected: AA 48.7 (published, RobustBench: AT, ResNet-18 without further data). Not measured here.
    Cost: 11 forward and backward passes an image; 20 minutes on one H200 (estimate).
    """
    threat = Linf(8 / 255)
    return Run(
        name="cifar10_pgd_at",
        data=_DATA,
        model=ResNet(18),
        objective=PgdAt(attack=PGD(threat, steps=10, step_size=2 / 255)),
        optimizer=SGD(lr=0.1, weight_decay=5e-4),
        schedule=Piecewise(milestones=(0.5, 0.75)),
        evaluation=_judged(8 / 255, 2 / 255),
        epochs=200,
        batch_size=128,
    )


def cifar10_pgd_at_wrn28_10() -> Run:
    """CIFAR-10, WRN-28-10, PGD-AT (Madry et al. 2018) at 8/255.

        python -m robustscale.pretrain cifar10_pgd_at_wrn28_10 --precision bf16

    As cifar10_pgd_at, but for the network.
    Expected: no published figure for this network without further data; nearest, 85.34 / 53.42 for WRN-34-20
    (published, RobustBench: Rice et al. 2020). Not measured here.
    Cost: 11 forward and backward passes an image; 3.1 hours on one H200 (estimate).
    """
    return _wide(cifar10_pgd_at())


def cifar10_trades() -> Run:
    """CIFAR-10, ResNet-18, TRADES (Zhang et al. 2019) with beta 6 at 0.031.

        python -m robustscale.pretrain cifar10_trades

    eps 0.031 (not 8/255), K 10, alpha 0.007; weight decay 2e-4, x 0.1 at 75 and 90 of 100 epochs, as the authors' code.
    RA is by PGD-20 with alpha 0.003.
    Expected: AA 49.5 (published, RobustBench: TRADES, ResNet-18 without further data). Not measured here.
    Cost: 13 forward and 12 backward passes an image; 11 minutes on one H200 (estimate).
    """
    return Run(
        name="cifar10_trades",
        data=_DATA,
        model=ResNet(18),
        objective=Trades(attack=PGD(Linf(0.031), steps=10, step_size=0.007, start="gaussian"), beta=6.0),
        optimizer=SGD(lr=0.1, weight_decay=2e-4),
        schedule=Piecewise(milestones=(0.75, 0.9)),
        evaluation=_judged(0.031, 0.003),
        epochs=100,
        batch_size=128,
    )


def cifar10_trades_wrn28_10() -> Run:
    """CIFAR-10, WRN-28-10, TRADES (Zhang et al. 2019) with beta 6 at 0.031.

        python -m robustscale.pretrain cifar10_trades_wrn28_10 --precision bf16

    As cifar10_trades, but for the network.
    Expected: no published figure for this network without further data; nearest, 84.92 / 53.08 for WRN-34-10
    (published, RobustBench). Not measured here.
    Cost: 13 forward and 12 backward passes an image; 1.8 hours on one H200 (estimate).
    """
    return _wide(cifar10_trades())


def cifar10_adversarial_regularization() -> Run:
    """CIFAR-10, ResNet-18, Adversarial Regularization (MIT thesis, 2019) with lambda 5 at 0.03.

        python -m robustscale.pretrain cifar10_adversarial_regularization

    eps 0.03 (not 8/255), K 10, alpha 0.007; RA is by PGD-20 with alpha 0.003; 100 epochs of batches of 100. When the
    thesis' learning rate falls is not known, nor its weight decay: here as in cifar10_trades, at 75 and 90, and 2e-4.
    Expected: SA 76.5, RA 53.9 (published, the thesis' sections 4.1 and 4.2; lambda 0 gives 82.9 and 48.0). Not measured
    here.
    Cost: 13 forward and 12 backward passes an image; 11 minutes on one H200 (estimate).
    """
    return Run(
        name="cifar10_adversarial_regularization",
        data=_DATA,
        model=ResNet(18),
        objective=AdversarialRegularization(attack=PGD(Linf(0.03), steps=10, step_size=0.007), lam=5.0),
        optimizer=SGD(lr=0.1, weight_decay=2e-4),
        schedule=Piecewise(milestones=(0.75, 0.9)),
        evaluation=_judged(0.03, 0.003),
        epochs=100,
        batch_size=100,
    )


def cifar10_adversarial_regularization_wrn28_10() -> Run:
    """CIFAR-10, WRN-28-10, Adversarial Regularization (MIT thesis, 2019) with lambda 5 at 0.03.

        python -m robustscale.pretrain cifar10_adversarial_regularization_wrn28_10 --precision bf16

    As cifar10_adversarial_regularization, but for the network.
    Expected: no published figure for this network; 76.5 SA, 53.9 RA for ResNet-18 (published, the thesis' sections 4.1
    and 4.2). Not measured here.
    Cost: 13 forward and 12 backward passes an image; 1.8 hours on one H200 (estimate).
    """
    return _wide(cifar10_adversarial_regularization())
