"""CIFAR-100: the recipes of CIFAR-10 on other data. Its docstring says what the figures and costs are."""

from __future__ import annotations

import dataclasses

from robustscale.recipes import cifar10
from robustscale.run import Run


def _on_cifar100(run: Run) -> Run:
    data = dataclasses.replace(run.data, source="cifar100")
    return dataclasses.replace(run, name=run.name.replace("cifar10", "cifar100"), data=data)


def cifar100() -> Run:
    """CIFAR-100, ResNet-18, PGD-AT at 8/255: cifar100_pgd_at by a shorter name.

        python -m robustscale.pretrain cifar100

    Expected: as cifar100_pgd_at, 53.83 / 18.95 (published, RobustBench).
    Cost: as cifar100_pgd_at.
    """
    return _on_cifar100(cifar10.cifar10())


def cifar100_pgd_at() -> Run:
    """CIFAR-100, ResNet-18, PGD-AT (Madry et al. 2018) at 8/255.

        python -m robustscale.pretrain cifar100_pgd_at

    As cifar10_pgd_at, but for the data.
    Expected: 53.83 / 18.95 (published, RobustBench: Rice et al. 2020, pre-activation ResNet-18). Not measured here.
    Cost: 11 forward and backward passes an image; 20 minutes on one H200 (estimate).
    """
    return _on_cifar100(cifar10.cifar10_pgd_at())


def cifar100_pgd_at_wrn28_10() -> Run:
    """CIFAR-100, WRN-28-10, PGD-AT (Madry et al. 2018) at 8/255.

        python -m robustscale.pretrain cifar100_pgd_at_wrn28_10 --precision bf16

    As cifar10_pgd_at_wrn28_10, but for the data.
    Expected: no published figure for this network without further data; 53.83 / 18.95 for ResNet-18 (published,
    RobustBench). Not measured here.
    Cost: 11 forward and backward passes an image; 3.1 hours on one H200 (estimate).
    """
    return _on_cifar100(cifar10.cifar10_pgd_at_wrn28_10())


def cifar100_trades() -> Run:
    """CIFAR-100, ResNet-18, TRADES (Zhang et al. 2019) with beta 6 at 0.031.

        python -m robustscale.pretrain cifar100_trades

    As cifar10_trades, but for the data: eps 0.031, not 8/255.
    Expected: no published figure is at hand for TRADES alone; 53.83 / 18.95 for PGD-AT at 8/255 (published,
    RobustBench). Not measured here.
    Cost: 13 forward and 12 backward passes an image; 11 minutes on one H200 (estimate).
    """
    return _on_cifar100(cifar10.cifar10_trades())


def cifar100_trades_wrn28_10() -> Run:
    """CIFAR-100, WRN-28-10, TRADES (Zhang et al. 2019) with beta 6 at 0.031.

        python -m robustscale.pretrain cifar100_trades_wrn28_10 --precision bf16

    As cifar10_trades_wrn28_10, but for the data: eps 0.031, not 8/255.
    Expected: no published figure is at hand for TRADES alone; 53.83 / 18.95 for PGD-AT and ResNet-18 at 8/255
    (published, RobustBench). Not measured here.
    Cost: 13 forward and 12 backward passes an image; 1.8 hours on one H200 (estimate).
    """
    return _on_cifar100(cifar10.cifar10_trades_wrn28_10())


def cifar100_adversarial_regularization() -> Run:
    """CIFAR-100, ResNet-18, Adversarial Regularization (MIT thesis, 2019) with lambda 5 at 0.03.

        python -m robustscale.pretrain cifar100_adversarial_regularization

    As cifar10_adversarial_regularization, but for the data: eps 0.03, not 8/255.
    Expected: none published; the thesis has no CIFAR-100. Not measured here.
    Cost: 13 forward and 12 backward passes an image; 11 minutes on one H200 (estimate).
    """
    return _on_cifar100(cifar10.cifar10_adversarial_regularization())


def cifar100_adversarial_regularization_wrn28_10() -> Run:
    """CIFAR-100, WRN-28-10, Adversarial Regularization (MIT thesis, 2019) with lambda 5 at 0.03.

        python -m robustscale.pretrain cifar100_adversarial_regularization_wrn28_10 --precision bf16

    As cifar10_adversarial_regularization_wrn28_10, but for the data: eps 0.03, not 8/255.
    Expected: none published; the thesis has no CIFAR-100. Not measured here.
    Cost: 13 forward and 12 backward passes an image; 1.8 hours on one H200 (estimate).
    """
    return _on_cifar100(cifar10.cifar10_adversarial_regularization_wrn28_10())
