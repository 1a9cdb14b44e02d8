"""Once-for-all adversarial training (Wang et al. 2020, https://arxiv.org/abs/2010.11828): one network for every λ.

Settings are the defaults of the authors' code, which are the same for all data sets: SGD 0.1, momentum 0.9, weight
decay 5e-4, cosine, 200 epochs, batches of 128, λ from {0, 0.1, 0.2, 0.3, 0.4, 1}, PGD-7 at 8/255 with α 10/7/255, dual
BatchNorm, 128 dimensions of random orthonormal encoding. `result.json` holds SA and RA (PGD-20) at the model's `lam`,
1; `python -m robustscale.evaluate RUN --lam 0.2` reads the same weights at another λ. The paper draws its results as
curves and prints no table of them to quote. Costs are estimates, as in `cifar10.py`.
"""

from __future__ import annotations

from robustscale.attacks.pgd import PGD
from robustscale.engine.optim import SGD
from robustscale.engine.schedule import Cosine
from robustscale.models.conditional import Conditional
from robustscale.models.resnet import ResNet
from robustscale.models.wide_resnet import WideResNet
from robustscale.objectives.oat import Oat
from robustscale.run import Data, Evaluation, Run
from robustscale.threat import Linf
from robustscale.types import Model


def _oat(name: str, data: Data, model: Model) -> Run:
    threat = Linf(8 / 255)
    return Run(
        name=name,
        data=data,
        model=model,
        objective=Oat(attack=PGD(threat, steps=7, step_size=10 / 7 / 255)),
        optimizer=SGD(lr=0.1, momentum=0.9, weight_decay=5e-4),
        schedule=Cosine(),
        evaluation=Evaluation(
            attack=PGD(threat, steps=20, step_size=2 / 255), monitor=PGD(threat, steps=10, step_size=2 / 255)
        ),
        epochs=200,
        batch_size=128,
    )


def _wide(depth: int, widen: int) -> Conditional:
    """With the authors' dropout, and without FiLM after the last BatchNorm, as theirs."""
    return Conditional(WideResNet(depth, widen, dropout=0.3), without_film=("bn1",))


def cifar10_oat() -> Run:
    """CIFAR-10, ResNet-34, OAT (Wang et al. 2020) at 8/255: one network for every lambda.

        python -m robustscale.pretrain cifar10_oat

    Expected: SA and RA along lambda as PGD-AT trained for each lambda by itself, or better (published, as a figure
    without numbers). Not measured here.
    Cost: 7.7 forward and backward passes an image; 30 minutes on one H200 (estimate).
    """
    return _oat("cifar10_oat", Data(source="cifar10", augmentation="pad_crop_flip"), Conditional(ResNet(34)))


def svhn_oat() -> Run:
    """SVHN, WRN-16-8, OAT (Wang et al. 2020) at 8/255: one network for every lambda.

        python -m robustscale.pretrain svhn_oat

    No augmentation, as the authors' code; dropout 0.3.
    Expected: SA and RA along lambda as PGD-AT trained for each lambda by itself, or better (published, as a figure
    without numbers). Not measured here.
    Cost: 7.7 forward and backward passes an image; 60 minutes on one H200 (estimate).
    """
    return _oat("svhn_oat", Data(source="svhn"), _wide(16, 8))


def stl10_oat() -> Run:
    """STL-10, WRN-40-2, OAT (Wang et al. 2020) at 8/255: one network for every lambda.

        python -m robustscale.pretrain stl10_oat

    Crops of 96x96 padded by 4, and flips; dropout 0.3. A tenth of the 5,000 training images is held out, where the
    authors select on the test set.
    Expected: SA and RA along lambda as PGD-AT trained for each lambda by itself, or better (published, as a figure
    without numbers). Not measured here.
    Cost: 7.7 forward and backward passes an image; 8 minutes on one H200 (estimate).
    """
    return _oat("stl10_oat", Data(source="stl10", augmentation="pad_crop_flip"), _wide(40, 2))
