"""What a training is doing, for Prometheus, at Ray's own endpoint on every node."""

from __future__ import annotations

import threading
import time

import torch

from robustscale.engine.callback import Callback
from robustscale.engine.trainer import Trainer
from robustscale.run import Run

OF_WORKER = {
    "images_per_second": "Images this worker trains on a second; their sum is the run's.",
    "step_seconds": "Seconds of a step, all in all.",
    "attack_seconds": "Seconds of a step in the attack, where this worker waits for no other.",
    "data_wait_ratio": "Share of the time that this worker waits for its loader.",
    "gpu_memory_peak_bytes": "The most that tensors have held of this worker's GPU; not there without one.",
}
"""Of every worker, by name without the prefix."""

OF_RUN = {
    "step": "Optimizer steps taken.",
    "total_steps": "Optimizer steps of the whole run.",
    "epoch": "Epochs done, with the part of the one that is going on.",
    "loss": "Training loss, the mean since the last report.",
    "grad_norm": "Norm of the gradient before clipping, the mean since the last report.",
    "learning_rate": "Learning rate of the newest step.",
    "held_out_sa": "Accuracy on the held-out part of the training data, in [0, 1].",
    "held_out_ra": "Accuracy there under the monitor's attack, in [0, 1].",
    "skipped_steps": "Steps whose loss or gradient was not finite, over the whole run.",
    "checkpoint_age_seconds": "Work that a failure would cost: since the newest checkpoint, or this attempt's start.",
    "workers": "Workers of this attempt.",
    "restarts": "Attempts before this one, since the command was given.",
}
"""Of rank 0 alone."""

REFRESH = 1.0
"""Seconds. Ray passes on a gauge once each time that it is set, and forgets it 20 s later: held-out figures, set once
an epoch, would be gone most of the time."""


class Gauges(Callback):
    """`robustscale_*` with the tags run and rank; at the endpoint their names begin with `ray_`. What the trainer
    reports is taken as it is: no collective, and no wait for the device. After the monitor, whose figures it takes."""

    def __init__(self, run: Run, restarts: int) -> None:
        self.run, self.restarts = run, restarts
        self.values: dict[str, float] = {}
        self.done = threading.Event()
        self.thread: threading.Thread | None = None

    def on_fit_start(self, trainer: Trainer) -> None:
        from ray.util.metrics import Gauge

        tags = {"run": self.run.name, "rank": str(trainer.backend.rank)}
        self.gauges = {
            name: Gauge(f"robustscale_{name}", text, tuple(tags)).set_default_tags(tags)
            for name, text in (OF_WORKER | (OF_RUN if trainer.backend.rank == 0 else {})).items()
        }
        self.values = {
            "workers": trainer.backend.world,
            "restarts": self.restarts,
            "total_steps": trainer.total_steps,
            **_position(trainer),
        }
        self.thread = threading.Thread(target=self._refresh, args=(trainer, time.monotonic()), daemon=True)
        self.thread.start()

    def after_step(self, trainer: Trainer) -> None:
        if trainer.reported:
            self.values = self.values | _position(trainer) | _figures(trainer)

    def after_epoch(self, trainer: Trainer) -> None:
        looks = {f"held_out_{name}": trainer.record[name] for name in ("sa", "ra") if name in trainer.record}
        self.values = self.values | looks

    def close(self) -> None:
        """However training ended: a process may live on, and its figures would stand there as if they were new."""
        self.done.set()
        if self.thread is not None:
            self.thread.join()

    def _refresh(self, trainer: Trainer, started: float) -> None:
        while True:
            last = self.done.wait(REFRESH)
            saved = trainer.saved_at
            age = {"checkpoint_age_seconds": time.monotonic() - (started if saved is None else saved)}
            for name, value in (self.values | age).items():
                if name in self.gauges:
                    self.gauges[name].set(value)
            if last:
                return


def _position(trainer: Trainer) -> dict[str, float]:
    return {
        "step": trainer.step,
        "epoch": trainer.step / trainer.loader.num_batches,
        "skipped_steps": trainer.skipped,
    }


def _figures(trainer: Trainer) -> dict[str, float]:
    record, own, device = trainer.record, trainer.timer.own, trainer.backend.device
    figures = {
        "images_per_second": record["images_per_second"] / trainer.backend.world,
        "step_seconds": own["step_seconds"],
        "attack_seconds": own["attack_seconds"],
        "data_wait_ratio": own["wait"],
        "learning_rate": record["lr"],
    }
    # Not there where every step since the last report was skipped.
    figures |= {name: record[name] for name in ("loss", "grad_norm") if name in record}
    if device.type == "cuda":
        figures["gpu_memory_peak_bytes"] = torch.cuda.max_memory_allocated(device)
    return figures
