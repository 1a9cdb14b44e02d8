"""ImageNet-1k.

Figures are SA / AA, standard accuracy and accuracy under AutoAttack at 4/255, in per cent, of RobustBench's 5,000 test
images; RA under PGD-20, which `result.json` holds, is some points above AA. Costs are estimates from the networks'
FLOPs at a quarter of an H200's bf16 peak, and a quarter more for all else; with 5 to 9 cores a GPU to decode. The
source is a folder with train/ and val/, a folder for each class in them.
"""

from __future__ import annotations

import dataclasses

from robustscale.attacks.apgd import APGD
from robustscale.attacks.fgsm import FGSM
from robustscale.attacks.pgd import PGD
from robustscale.engine.averaging import EMA
from robustscale.engine.mix import Mix
from robustscale.engine.optim import SGD, AdamW
from robustscale.engine.schedule import Cosine, OneCycle, Step
from robustscale.models.convnext import ConvNeXt
from robustscale.models.resnet import ResNet
from robustscale.models.vit import ViT
from robustscale.objectives.eps_warmup import EpsWarmup
from robustscale.objectives.pgd_at import PgdAt
from robustscale.objectives.weak_to_strong import WeakToStrong
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


def imagenet_wrn50_2() -> Run:
    """ImageNet, WRN-50-2, PGD-AT with three steps at 4/255, on eight GPUs.

        python -m robustscale.pretrain imagenet_wrn50_2 --data.source folder:/data/imagenet --data.root /data/beton

    As imagenet, but for the network: ResNet-50 with twice the channels inside its blocks.
    Expected: 68.46 / 38.14 (published, RobustBench: Salman et al. 2020). Not measured here.
    Cost: 4 forward and backward passes an image, 113 million images; 4.2 hours on eight H200 (estimate).
    """
    return dataclasses.replace(imagenet(), name="imagenet_wrn50_2", model=ResNet(50, bottleneck=2))


def imagenet_fgsm_rs() -> Run:
    """ImageNet, ResNet-50, FGSM-RS (Wong et al. 2020) at 4/255, on eight GPUs, in growing images.

        python -m robustscale.pretrain imagenet_fgsm_rs --data.source folder:/data/imagenet --data.root /data/beton

    One step of 1.25 eps from a uniform start; 15 epochs, 6 at 112 pixels, 6 at 160 and 3 at 224, where the authors take
    128, 224 and 288. SGD 0.2 for batches of 512, weight decay 1e-4; the rate rises over 3 epochs and falls to 0, one
    cycle in place of the authors' one a size.
    Expected: 55.62 / 26.24 (published, RobustBench: Wong et al. 2020, in images of 288 pixels). Not measured here.
    Cost: 2 forward and backward passes an image, 19 million images; 5 minutes of computing on eight H200 (estimate), 15
    at 2,700 decoded images a second and GPU.
    """
    run = imagenet()
    return dataclasses.replace(
        run,
        name="imagenet_fgsm_rs",
        data=dataclasses.replace(run.data, progressive=(112, 112, 160, 160, 224)),
        objective=PgdAt(attack=FGSM(Linf(4 / 255), random_start=True)),
        schedule=OneCycle(rise=0.2),
        epochs=15,
    )


def imagenet_weak_to_strong() -> Run:
    """ImageNet, ResNet-50, FGSM-RS on small images, then PGD-3 on whole ones, at 4/255, on eight GPUs.

        python -m robustscale.pretrain imagenet_weak_to_strong --data.source folder:/data/imagenet

    90 epochs: 30 at 112 pixels and 30 at 160 with one step of 1.25 eps from a uniform start, 30 at 224 with three steps
    of 2/3 eps, after AdvXL's coarse-to-fine, weak-to-strong training (Wang et al. 2024). SGD 0.2 for batches of 512,
    weight decay 1e-4, cosine after a warm-up of 5 epochs; EMA 0.9998, label smoothing 0.1, MixUp 0.2, which is its
    paper's for ImageNet.
    Expected: no published figure for this training; 64.02 / 34.96 for PGD-3 throughout (published, RobustBench: Salman
    et al. 2020). Not measured here.
    Cost: 2 forward and backward passes an image, then 4, 113 million images; 45 minutes of computing on eight H200
    (estimate), 90 at 2,700 decoded images a second and GPU.
    """
    run = imagenet()
    weak = PgdAt(attack=FGSM(Linf(4 / 255), random_start=True))
    return dataclasses.replace(
        run,
        name="imagenet_weak_to_strong",
        data=dataclasses.replace(run.data, progressive=(112, 160, 224)),
        objective=WeakToStrong((weak, run.objective), until=(2 / 3,)),
        schedule=Cosine(warmup_epochs=5),
        averaging=EMA(0.9998),
        label_smoothing=0.1,
        mix=Mix(mixup=0.2),
    )


def imagenet_convnext_t() -> Run:
    """ImageNet, ConvNeXt-T with a convolutional stem, APGD-2 (Singh et al. 2023) at 4/255, on eight GPUs.

        python -m robustscale.pretrain imagenet_convnext_t --data.source folder:/data/imagenet --data.root /data/beton

    APGD with two steps from the image; AdamW 1e-3 for batches of 640, betas 0.9 and 0.95, weight decay 0.05, cosine
    after a warm-up of 20 of 300 epochs; label smoothing 0.1, MixUp 0.8 or CutMix 1 for every image, RandAugment 2 at 9.
    EMA is 0.9998, theirs 0.9999; their colour jitter and random erasing are left out. They start from naturally trained
    weights: train such by --objective natural, then python -m robustscale.finetune THAT_RUN imagenet_convnext_t.
    Expected: 72.72 / 49.46 (published, RobustBench: Singh et al. 2023, from natural weights). Not measured here.
    Cost: 4 forward and 3 backward passes an image, 377 million images; 5 hours on eight H200 (estimate).
    """
    threat = Linf(4 / 255)
    attack = APGD(threat, steps=2, start="none")
    return Run(
        name="imagenet_convnext_t",
        data=dataclasses.replace(imagenet().data, rand_augment=2, magnitude=9),
        model=ConvNeXt(),
        objective=PgdAt(attack=attack),
        optimizer=AdamW(lr=1e-3, betas=(0.9, 0.95), weight_decay=0.05),
        schedule=Cosine(warmup_epochs=20),
        averaging=EMA(0.9998),
        label_smoothing=0.1,
        mix=Mix(mixup=0.8, cutmix=1.0),
        evaluation=Evaluation(attack=PGD(threat, steps=20, step_size=1 / 255), monitor=attack, every=5),
        checkpoints=Checkpoints(every_steps=500),
        cluster=Cluster(workers=8, cpus_per_worker=8),
        epochs=300,
        batch_size=640,
        precision="bf16",
    )


def imagenet_vit_s() -> Run:
    """ImageNet, ViT-S with a convolutional stem, APGD-2 (Singh et al. 2023) at 4/255, on eight GPUs.

        python -m robustscale.pretrain imagenet_vit_s --data.source folder:/data/imagenet --data.root /data/beton

    As imagenet_convnext_t, but for the network, and eps that grows over the first 20 epochs (Debenedetti et al. 2022),
    in the place of the authors' naturally trained weights: without either a transformer may learn nothing at first.
    Expected: 72.56 / 48.08 (published, RobustBench: Singh et al. 2023, from natural weights). Not measured here.
    Cost: 4 forward and 3 backward passes an image, 377 million images; 5.4 hours on eight H200 (estimate).
    """
    run = imagenet_convnext_t()
    return dataclasses.replace(
        run,
        name="imagenet_vit_s",
        model=ViT(),
        objective=EpsWarmup(run.objective, share=20 / 300),
    )
