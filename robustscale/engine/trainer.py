"""The training loop."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from robustscale.engine.callback import Callback
from robustscale.engine.metrics import Metrics
from robustscale.engine.step import TrainStep
from robustscale.run import Run
from robustscale.types import Backend, Loader, Progress, Share


class Trainer:
    """Epochs over a loader, with callbacks. All state that a resumed run needs is `position`, the weights, the
    optimizer, the scaler, and what metrics and callbacks keep; there is no random state."""

    def __init__(
        self, run: Run, network: nn.Module, loader: Loader, backend: Backend, callbacks: Sequence[Callback]
    ) -> None:
        self.run, self.loader, self.backend, self.callbacks = run, loader, backend, callbacks
        self.train_step = TrainStep(run, network, backend)
        self.network = self.train_step.network
        self.judged: nn.Module = self.network
        """What the monitor looks at and whose weights are kept: the averaged network, where there is one."""
        self.metrics = Metrics(backend)
        self.total_steps = run.epochs * loader.num_batches
        self.epoch = self.batch = self.step = 0
        self.stop = False
        self.record: dict[str, Any] = {}
        """The newest report: of the last `log_every` steps, or of the epoch just finished."""
        self.reported = False
        """Whether `record` was made at this step."""
        self.seconds = 0.0
        """Of training before this attempt began."""
        self.timer = Timer()

    def fit(self) -> None:
        # The last one resumes, and the others start from what it restored.
        for callback in reversed(self.callbacks):
            callback.on_fit_start(self)
        self.timer = Timer(self.seconds)
        while self.epoch < self.run.epochs and not self.stop:
            self._fit_epoch()
        for callback in self.callbacks:
            callback.on_fit_end(self)

    def _fit_epoch(self) -> None:
        for share in self.timer.waiting(self.loader.epoch(self.epoch, self.batch)):
            at = Progress(self.run.seed, self.epoch, self.step, self.total_steps)
            factor = self.run.schedule.factor(self.step, self.total_steps, self.loader.num_batches)
            self.metrics.add(self.train_step(share, at, factor))
            self.step, self.batch = self.step + 1, self.batch + 1
            self.timer.images += share.total
            self.reported = self.step % self.run.log_every == 0 or self.batch == self.loader.num_batches
            if self.reported:
                self._report_step()
            for callback in self.callbacks:
                callback.after_step(self)
        self.epoch, self.batch = self.epoch + 1, 0
        means = {f"train_{name}": value for name, value in self.metrics.take_epoch().items()}
        self.record = {"event": "epoch", "epoch": self.epoch, "step": self.step, **means}
        for callback in self.callbacks:
            callback.after_epoch(self)

    def _report_step(self) -> None:
        self.metrics.flush(self.step)
        self.record = {
            "event": "step",
            "epoch": self.epoch,
            "step": self.step,
            "total_steps": self.total_steps,
            **self.metrics.take_window(),
            "lr": self.train_step.optimizer.param_groups[0]["lr"],
            **self.timer.lap(),
        }

    def position(self) -> dict[str, float]:
        """What a checkpoint sets on the trainer that goes on."""
        return {"epoch": self.epoch, "batch": self.batch, "step": self.step, "seconds": self.timer.seconds}


class Timer:
    """Throughput and the share of time spent waiting for data, between laps."""

    def __init__(self, spent: float = 0.0) -> None:
        self.last = time.monotonic()
        self.start = self.last - spent
        self.images = 0
        self.waited = 0.0

    def waiting(self, shares: Iterator[Share]) -> Iterator[Share]:
        while True:
            before = time.monotonic()
            share = next(shares, None)
            self.waited += time.monotonic() - before
            if share is None:
                return
            yield share

    @property
    def seconds(self) -> float:
        """Of training, over all attempts."""
        return time.monotonic() - self.start

    def lap(self) -> dict[str, float]:
        now = time.monotonic()
        seconds = max(now - self.last, 1e-9)
        report = {
            "images_per_second": self.images / seconds,
            "wait": min(1.0, self.waited / seconds),
            "seconds": now - self.start,
        }
        self.last, self.images, self.waited = now, 0, 0.0
        return report
