"""Keeps the weights of every so many epochs for good."""

from __future__ import annotations

from robustscale.engine.callback import Callback
from robustscale.engine.folder import RunFolder, snapshot
from robustscale.engine.trainer import Trainer
from robustscale.run import Run


class Snapshots(Callback):
    """After the monitor, whose figures go into the file; before checkpointing, so that none is missing after a kill."""

    def __init__(self, run: Run, folder: RunFolder) -> None:
        self.run, self.folder = run, folder

    @classmethod
    def of(cls, run: Run, folder: RunFolder) -> list[Callback]:
        return [] if run.checkpoints.snapshots is None else [cls(run, folder)]

    def on_fit_start(self, trainer: Trainer) -> None:
        # What a tuning forgets is measured against what it began with.
        if trainer.step == 0 and self.run.transfer.weights is not None:
            self._save(trainer)

    def after_epoch(self, trainer: Trainer) -> None:
        every = self.run.checkpoints.snapshots
        if every is not None and trainer.epoch % every == 0:
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        if trainer.backend.rank == 0:
            figures = {f"held_out_{name}": trainer.record[name] for name in ("sa", "ra") if name in trainer.record}
            facts = {"epoch": trainer.epoch, "step": trainer.step, **figures}
            self.folder.save_weights(snapshot(trainer.epoch), trainer.judged, **facts)
