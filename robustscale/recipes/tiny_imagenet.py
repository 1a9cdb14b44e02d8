"""Tiny ImageNet: 200 classes of 500 training images of 64x64, and 10,000 validation images, which are the test set.

The source is the unpacked archive, tiny-imagenet-200. Settings are CIFAR-10's, for want of a paper that states all of
its own; so no published figure is quoted. Costs are estimates, as in `cifar10.py`.
"""

from __future__ import annotations

import dataclasses

from robustscale.recipes import cifar10
from robustscale.run import Run


def _on_tiny_imagenet(run: Run) -> Run:
    data = dataclasses.replace(run.data, source="tiny_imagenet", padding=8)
    return dataclasses.replace(run, name=run.name.replace("cifar10", "tiny_imagenet"), data=data, epochs=100)


def tiny_imagenet_pgd_at() -> Run:
    """Tiny ImageNet, ResNet-18, PGD-AT (Madry et al. 2018) at 8/255.

        python -m robustscale.pretrain tiny_imagenet_pgd_at --data.source tiny_imagenet:/data/tiny-imagenet-200

    As cifar10_pgd_at, but for the data, crops padded by 8, and 100 epochs.
    Expected: no published figure to quote. Not measured here.
    Cost: 11 forward and backward passes an image; 1.3 hours on one H200 (estimate, with --precision bf16).
    """
    return _on_tiny_imagenet(cifar10.cifar10_pgd_at())


def tiny_imagenet_trades() -> Run:
    """Tiny ImageNet, ResNet-18, TRADES (Zhang et al. 2019) with beta 6 at 0.031.

        python -m robustscale.pretrain tiny_imagenet_trades --data.source tiny_imagenet:/data/tiny-imagenet-200

    As cifar10_trades, but for the data and crops padded by 8.
    Expected: no published figure to quote. Not measured here.
    Cost: 13 forward and 12 backward passes an image; 1.5 hours on one H200 (estimate, with --precision bf16).
    """
    return _on_tiny_imagenet(cifar10.cifar10_trades())
