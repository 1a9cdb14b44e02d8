"""What a run has cost so far: operations, counted, and workers' time."""

from __future__ import annotations

from robustscale.engine.callback import Callback
from robustscale.engine.flops import look_flops, step_flops
from robustscale.engine.trainer import Trainer
from robustscale.run import Run
from robustscale.types import DataSpec, State


class Cost(Callback):
    """Adds to each epoch's record, over all epochs and workers: `flops` of training and of the looks at the held-out
    part, and `worker_seconds`, the training's time (looks included) times the workers.

    FLOPs are expected counts of the configuration, equal on any machine (see `engine.flops`); BatchNorm's statistics
    that an average of weights estimates anew are not counted. Counting, before the first attempt's first step, takes
    about as long as two steps on three images, for each of the objective's outcomes. Comes after the monitor and before
    the log.
    """

    def __init__(self, run: Run, spec: DataSpec, num_held_out: int) -> None:
        self.run, self.spec, self.num_held_out = run, spec, num_held_out
        self.saved: State = {}

    def on_fit_start(self, trainer: Trainer) -> None:
        self.trainer = trainer
        # Not counted again on resuming: an attack that drops images drops others of a trained network.
        self.per_image = self.saved.get("step_flops") or step_flops(self.run, trainer.network, self.spec)
        self.per_held_out = self.saved.get("look_flops") or self._look_flops(trainer)
        self.before = self.saved.get("worker_seconds", trainer.seconds * trainer.backend.world)

    def after_epoch(self, trainer: Trainer) -> None:
        evaluation = self.run.evaluation
        looks = sum(evaluation.looks_after(epoch, self.run.epochs) for epoch in range(1, trainer.epoch + 1))
        trained = self.per_image * trainer.loader.num_examples * trainer.epoch
        looked = self.per_held_out * self.num_held_out * looks
        trainer.record |= {"flops": trained + looked, "worker_seconds": self._worker_seconds()}

    def state_dict(self) -> State:
        return {
            "step_flops": self.per_image,
            "look_flops": self.per_held_out,
            "worker_seconds": self._worker_seconds(),
        }

    def load_state_dict(self, state: State) -> None:
        self.saved = state

    def _look_flops(self, trainer: Trainer) -> float:
        return look_flops(self.run, trainer.network, self.spec) if self.num_held_out else 0.0

    def _worker_seconds(self) -> float:
        """An attempt may have other workers than the one before."""
        spent = self.trainer.timer.seconds - self.trainer.seconds
        return float(self.before + spent * self.trainer.backend.world)
