"""BatchNorm's statistics of a network in training, estimated anew on the training images."""

from __future__ import annotations

from torch import Tensor, nn

from robustscale.engine.step import shards_of
from robustscale.engine.trainer import Trainer
from robustscale.models.statistics import reestimate
from robustscale.noise import Noise


def reestimate_on(trainer: Trainer, network: nn.Module, epoch: int) -> None:
    """On the clean images of an epoch, counted from 0: batch by batch, or shard by shard with deterministic reduction.
    A collective. Leaves the network in eval mode."""
    by_shard = trainer.run.reduction == "deterministic"
    parts = (shards_of(share) if by_shard else [share.batch] for share in trainer.loader.epoch(epoch))

    def noise(index: Tensor) -> Noise:
        return Noise.of(trainer.run.seed, index, "statistics", trainer.epoch)

    reestimate(network, parts, trainer.backend, noise)
