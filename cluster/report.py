"""Ray's own view of a run: its dashboard, and what runs on top of Ray Train."""

from __future__ import annotations

import ray.train

from robustscale.engine.callback import Callback
from robustscale.engine.trainer import Trainer


class Report(Callback):
    """Reports each epoch's figures to Ray Train.

    Without a checkpoint, on purpose: Ray learns of a report up to 2 s late, so a checkpoint that only Ray knows of can
    be lost; ours exists from its rename on. Every rank calls this equally often: it is a barrier.
    """

    def after_epoch(self, trainer: Trainer) -> None:
        ray.train.report({k: v for k, v in trainer.record.items() if isinstance(v, (int, float))})
