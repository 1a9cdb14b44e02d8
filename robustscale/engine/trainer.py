"""The training loop."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import nn

from robustscale.engine.callback import Callback
from robustscale.engine.metrics import Metrics
from robustscale.engine.step import Outcome, TrainStep
from robustscale.errors import Diverged, Left
from robustscale.run import Run
from robustscale.types import Backend, Loader, Progress, Share

ASKS: tuple[Literal["save"], Literal["leave"]] = ("save", "leave")
"""What any worker may ask for, and all do at once: save a checkpoint; save one and end."""


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
        self.skipped = self.skipped_in_a_row = 0
        """Steps whose loss or gradient was not finite."""
        self.lr_scale = 1.0
        """Below 1 after a rollback."""
        self.stop = False
        self.asked: set[str] = set()
        self.agreed: dict[str, bool] = dict.fromkeys(ASKS, False)
        """Of `ASKS`, at the step just taken."""
        self.saved_at: float | None = None
        """`time.monotonic()` at which the newest checkpoint was durable."""
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

    def ask(self, what: Literal["save", "leave"]) -> None:
        """From any thread of any worker; all agree at the next step."""
        self.asked.add(what)

    def _fit_epoch(self) -> None:
        for share in self.timer.waiting(self.loader.epoch(self.epoch, self.batch)):
            at = Progress(self.run.seed, self.epoch, self.step, self.total_steps)
            factor = self.run.schedule.factor(self.step, self.total_steps, self.loader.num_batches)
            outcome = self.train_step(share, at, factor * self.lr_scale, [name in self.asked for name in ASKS])
            self._take(outcome, share)
            self.step, self.batch = self.step + 1, self.batch + 1
            self.timer.count(share.total, self.train_step.attack.take())
            self.reported = self.step % self.run.log_every == 0 or self.batch == self.loader.num_batches
            if self.reported:
                self._report_step()
            for callback in self.callbacks:
                callback.after_step(self)
            if self.agreed["leave"]:
                raise Left(f"left after step {self.step}, as asked; the checkpoint is there")
        self.epoch, self.batch = self.epoch + 1, 0
        means = {f"train_{name}": value for name, value in self.metrics.take_epoch().items()}
        self.record = {"event": "epoch", "epoch": self.epoch, "step": self.step, **means}
        for callback in self.callbacks:
            callback.after_epoch(self)

    def _take(self, outcome: Outcome, share: Share) -> None:
        self.agreed = dict(zip(ASKS, outcome.agreed, strict=True))
        self.asked -= {name for name, agreed in self.agreed.items() if agreed}
        if not outcome.skipped:
            self.skipped_in_a_row = 0
            self.metrics.add(outcome.metrics)
            return
        self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
        what = f"step {self.step + 1}: loss {outcome.loss}, gradient norm {outcome.grad_norm}"
        if self.skipped_in_a_row > self.run.divergence.skip:
            raise Diverged(
                f"{what}, {self.skipped_in_a_row} such steps in a row, the last on images {self._images(share)}; "
                "lower optimizer.lr, set clip to 1, or use precision fp32 or bf16"
            )
        # In fp16 the first steps find the loss's scale this way.
        if self.backend.rank == 0 and self.run.precision != "fp16":
            warnings.warn(f"{what}; the step is skipped", stacklevel=2)

    def _images(self, share: Share) -> str:
        """Rows of the global batch, of all workers, whose shares may differ in length."""
        longest = -(-share.total // len(share.sizes)) * len(share.sizes)
        rows = torch.full((longest,), -1, device=self.backend.device)
        rows[: len(share.batch.index)] = share.batch.index
        every = [row for row in self.backend.gather(rows).flatten().tolist() if row >= 0]
        return ", ".join(map(str, every[:32])) + ", ..." * (len(every) > 32)

    def _report_step(self) -> None:
        self.metrics.flush(self.step)
        self.record = {
            "event": "step",
            "epoch": self.epoch,
            "step": self.step,
            "total_steps": self.total_steps,
            **self.metrics.take_window(),
            "lr": self.train_step.updater.optimizer.param_groups[0]["lr"],
            "skipped": self.skipped,
            **self.timer.lap(self.backend),
        }

    def position(self) -> dict[str, float]:
        """What a checkpoint sets on the trainer that goes on."""
        names = ("epoch", "batch", "step", "skipped", "skipped_in_a_row")
        return {name: getattr(self, name) for name in names} | {"seconds": self.timer.seconds}


class Timer:
    """Throughput, and what the time was spent on, between laps."""

    def __init__(self, spent: float = 0.0) -> None:
        self.last = time.monotonic()
        self.start = self.last - spent
        self.images = self.steps = 0
        self.waited = self.attacked = 0.0
        self.own: dict[str, float] = {}
        """Of the last lap, this worker's alone: `wait`, `attack_seconds` and `step_seconds`."""

    def waiting(self, shares: Iterator[Share]) -> Iterator[Share]:
        while True:
            before = time.monotonic()
            share = next(shares, None)
            self.waited += time.monotonic() - before
            if share is None:
                return
            yield share

    def count(self, images: int, attacked: float) -> None:
        self.images, self.steps, self.attacked = self.images + images, self.steps + 1, self.attacked + attacked

    @property
    def seconds(self) -> float:
        """Of training, over all attempts."""
        return time.monotonic() - self.start

    def lap(self, backend: Backend) -> dict[str, float]:
        """One small collective. The slowest worker is told by its attacks: in those it waits for nobody."""
        now = time.monotonic()
        seconds = max(now - self.last, 1e-9)
        steps = max(self.steps, 1)
        self.own = {
            "wait": min(1.0, self.waited / seconds),
            "attack_seconds": self.attacked / steps,
            "step_seconds": seconds / steps,
        }
        mine = torch.tensor(list(self.own.values()), device=backend.device)
        wait, attack, step = (column.tolist() for column in backend.gather(mine).unbind(1))
        slowest = max(range(backend.world), key=attack.__getitem__)
        report = {
            "images_per_second": self.images / seconds,
            "wait": max(wait),
            "attack_seconds": sum(attack) / len(attack),
            "step_seconds": max(step),
            "slowest_rank": slowest,
            "slowest_attack_seconds": attack[slowest],
            "seconds": now - self.start,
        }
        self.last, self.images, self.steps, self.waited, self.attacked = now, 0, 0, 0.0, 0.0
        return report
