"""CINIC-10 (Darlow et al. 2018, https://arxiv.org/abs/1810.03505): CIFAR-10's classes, with images of ImageNet.

The source is the unpacked archive, a folder with train, valid and test of 90,000 images each; training reads train
alone. The MIT thesis pretrains on 180,000, train and valid: `cp -rs /data/CINIC-10/valid/. /data/CINIC-10/train/` puts
both there, by links. The test split holds CIFAR-10's test images, so that figures on it say nothing of what is then
tuned on CIFAR-10, and it must not be trained on. Settings are the thesis', but for the weight decay, which is not known
of it: 2e-4 is of TRADES' authors. Costs are estimates, as in `cifar10.py`, for 180,000 images.

Train and valid hold 40,000 of CIFAR-10's training images. Some look like its test images: of all 50,000, 599 do
(`benchmarks/leaks.md`). So `finetune` is expected to refuse to tune these networks on CIFAR-10 (inferred: CINIC-10 was
not at hand). It writes leaks.json into the tuned run's folder; pretrain without them, by --data.leaks that file, under
another --run-name, and tune from that. `reproduce` refuses before it pretrains: data.leaks= the file that it names.
"""

from __future__ import annotations

import dataclasses

from robustscale.attacks.pgd import PGD
from robustscale.engine.optim import SGD
from robustscale.engine.schedule import Piecewise
from robustscale.models.resnet import ResNet
from robustscale.objectives.pgd_at import PgdAt
from robustscale.objectives.trades import Trades
from robustscale.run import Data, Evaluation, Run
from robustscale.threat import Linf


def cinic10_pgd_at() -> Run:
    """CINIC-10, ResNet-18, PGD-AT (robust optimisation in the MIT thesis, 2019) at 0.03.

        python -m robustscale.pretrain cinic10_pgd_at --data.source folder:/data/CINIC-10

    eps 0.03 (not 8/255), K 10, alpha 0.007; RA is by PGD-20 with alpha 0.003; 0.1, 100 epochs of batches of 100. The
    thesis does not say when the learning rate falls; here at 75 and 90 epochs.
    Expected: tuned on CIFAR-10 by PGD-AT for 100 epochs at 0.001, SA 86.25, RA 52.2 (published, the thesis' section 5).
    Not measured here.
    Cost: 11 forward and backward passes an image; 40 minutes on one H200 (estimate).
    """
    threat = Linf(0.03)
    return Run(
        name="cinic10_pgd_at",
        data=Data(source="folder:CINIC-10", augmentation="pad_crop_flip"),
        model=ResNet(18),
        objective=PgdAt(attack=PGD(threat, steps=10, step_size=0.007)),
        optimizer=SGD(lr=0.1, weight_decay=2e-4),
        schedule=Piecewise(milestones=(0.75, 0.9)),
        evaluation=Evaluation(attack=PGD(threat, steps=20, step_size=0.003), monitor=PGD(threat, step_size=0.003)),
        epochs=100,
        batch_size=100,
    )


def cinic10_trades() -> Run:
    """CINIC-10, ResNet-18, TRADES (Zhang et al. 2019) with beta 3 at 0.03, as the MIT thesis pretrains.

        python -m robustscale.pretrain cinic10_trades --data.source folder:/data/CINIC-10

    As cinic10_pgd_at, but for the objective.
    Expected: tuned on CIFAR-10 by TRADES with beta 5 for 100 epochs at 0.001, SA 85.5, RA 55.75, the thesis' best
    (published, its section 5). Not measured here.
    Cost: 13 forward and 12 backward passes an image; 45 minutes on one H200 (estimate).
    """
    attack = PGD(Linf(0.03), steps=10, step_size=0.007, start="gaussian")
    return dataclasses.replace(cinic10_pgd_at(), name="cinic10_trades", objective=Trades(attack=attack, beta=3.0))
