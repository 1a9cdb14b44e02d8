"""Downsampled ImageNet (Chrabaszcz et al. 2017, https://arxiv.org/abs/1707.08819), to pretrain for small images.

The source is a folder with image-net.org's npz archives of one size, unpacked; 2 % of the training images are held out,
and the 50,000 of validation are the test set. Settings are those of Hendrycks et al. 2019
(https://arxiv.org/abs/1901.09960), whose normalisation, 2 x - 1, what is tuned from it takes over. Costs are estimates,
as in `imagenet.py`.
"""

from __future__ import annotations

import dataclasses

from robustscale.attacks.pgd import PGD
from robustscale.engine.optim import SGD
from robustscale.engine.schedule import Cosine
from robustscale.models.resnet import ResNet
from robustscale.models.wide_resnet import WideResNet
from robustscale.objectives.pgd_at import PgdAt
from robustscale.run import Checkpoints, Cluster, Data, Evaluation, Run
from robustscale.threat import Linf


def imagenet32() -> Run:
    """Downsampled ImageNet, 32x32, WRN-28-10, PGD-AT (Hendrycks et al. 2019) at 8/255, on eight GPUs.

        python -m robustscale.pretrain imagenet32 --data.source downsampled_imagenet:/data/imagenet32

    eps 8/255, K 10, alpha 2/255; SGD 0.1 with Nesterov's momentum, weight decay 5e-4, cosine, 100 epochs of batches of
    256; crops padded by 4, and flips.
    Expected: tuned on CIFAR-10 for 5 epochs at 0.001, 87.11 / 54.92 standard accuracy and AutoAttack (published,
    RobustBench: Hendrycks et al. 2019); on ImageNet itself they give none. Not measured here.
    Cost: 11 forward and backward passes an image, 126 million images; 5.4 hours on eight H200 (estimate).
    """
    threat = Linf(8 / 255)
    return Run(
        name="imagenet32",
        data=Data(
            source="downsampled_imagenet",
            augmentation="pad_crop_flip",
            held_out=0.02,
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
            workers=4,
        ),
        model=WideResNet(28, 10),
        objective=PgdAt(attack=PGD(threat, steps=10, step_size=2 / 255)),
        optimizer=SGD(lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True),
        schedule=Cosine(),
        evaluation=Evaluation(
            attack=PGD(threat, steps=20, step_size=2 / 255), monitor=PGD(threat, steps=10, step_size=2 / 255)
        ),
        checkpoints=Checkpoints(every_steps=1000),
        cluster=Cluster(workers=8, cpus_per_worker=4),
        epochs=100,
        batch_size=256,
        precision="bf16",
    )


def imagenet64() -> Run:
    """Downsampled ImageNet, 64x64, ResNet-50, PGD-AT (Madry et al. 2018) at 8/255, on eight GPUs.

        python -m robustscale.pretrain imagenet64 --data.source downsampled_imagenet:/data/imagenet64

    As imagenet32, but for the network, with its 3x3 stem; crops are padded by 8. No paper's settings.
    Expected: no published figure is known to us. Not measured here.
    Cost: 11 forward and backward passes an image, 126 million images; 5.4 hours on eight H200 (estimate).
    """
    run = imagenet32()
    return dataclasses.replace(run, name="imagenet64", data=dataclasses.replace(run.data, padding=8), model=ResNet(50))
