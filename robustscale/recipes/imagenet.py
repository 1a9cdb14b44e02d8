"""ImageNet-1k."""

from __future__ import annotations

from robustscale.attacks.pgd import PGD
from robustscale.engine.optim import SGD
from robustscale.engine.schedule import Step
from robustscale.models.resnet import ResNet
from robustscale.objectives.pgd_at import PgdAt
from robustscale.run import Checkpoints, Cluster, Data, Evaluation, Run
from robustscale.threat import Linf


def imagenet() -> Run:
    """ImageNet, ResNet-50, PGD-AT with three steps at 4/255, on eight GPUs.

        python -m robustscale.pretrain imagenet --data.source folder:/data/imagenet --data.root /data/beton

    eps 4/255, K 3, alpha 8/765 = 2/3 eps; random resized crops of 224; SGD 0.2 for batches of 512, weight decay 1e-4,
    x 0.1 every 30 of 90 epochs after a warm-up of 5; trained in bf16, judged in float32. 2 % of the training images are
    held out. The source is a folder with train/ and val/, a folder for each class in them.
    Expected: 64.02 / 34.96 standard accuracy and AutoAttack (published, RobustBench: Salman et al. 2020). Not measured
    here; PGD-20's RA is some points above AutoAttack's.
    Cost: 4 forward and backward passes an image, 113 million images; 1.5 hours on eight H200 (estimate from FLOPs at a
    quarter of their bf16 peak), with 5 to 9 cores a GPU to decode 2,700 images a second.
    """
    threat = Linf(4 / 255)
    step_size = 8 / 3 / 255
    return Run(
        name="imagenet",
        data=Data(source="imagenet", augmentation="random_resized_crop", image_size=224, held_out=0.02, workers=8),
        model=ResNet(50),
        objective=PgdAt(attack=PGD(threat, steps=3, step_size=step_size)),
        optimizer=SGD(lr=0.2, weight_decay=1e-4),
        schedule=Step(warmup_epochs=5, every=30),
        evaluation=Evaluation(
            attack=PGD(threat, steps=20, step_size=1 / 255), monitor=PGD(threat, steps=3, step_size=step_size)
        ),
        checkpoints=Checkpoints(every_steps=500),
        cluster=Cluster(workers=8, cpus_per_worker=8),
        epochs=90,
        batch_size=512,
        precision="bf16",
    )
