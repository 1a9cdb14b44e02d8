"""Progressive resolution: what follows from it beside the loader's images."""

from __future__ import annotations

from robustscale.engine.callback import Callback
from robustscale.engine.statistics import reestimate_on
from robustscale.engine.trainer import Trainer
from robustscale.run import Run


class Resolution(Callback):
    """Before the first step on images of another size BatchNorm's statistics are estimated anew, on the clean images of
    the epoch to come (Touvron et al. 2019, https://arxiv.org/abs/1906.06423: a network's activations change with the
    size of what is in its images).

    Of the network, and of the average that is judged. Training images grow in stages, as in Howard's DAWNBench entry
    of 2018 and in Tan and Le 2021 (https://arxiv.org/abs/2104.00298), who also raise augmentation with the size; here
    it stays. Held-out part and test set are read at the last size throughout, so looks in the early stages are low.
    After what looks at the network as it was trained, and before the checkpoint, so that a resumed run begins the stage
    with these statistics.
    """

    @classmethod
    def of(cls, run: Run) -> list[Callback]:
        """None where images stay as they are."""
        return [cls()] if run.data.progressive else []

    def after_epoch(self, trainer: Trainer) -> None:
        run, epoch = trainer.run, trainer.epoch
        if trainer.stop or epoch == run.epochs or run.image_size_at(epoch) == run.image_size_at(epoch - 1):
            return
        reestimate_on(trainer, trainer.network, epoch)
        if trainer.judged is not trainer.network:
            reestimate_on(trainer, trainer.judged, epoch)
