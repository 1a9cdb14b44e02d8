"""Runs a task on the workers of a Ray cluster, attempt after attempt, until it is done."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Mapping
from typing import Any

from cluster.attempt import Attempt, Show, job
from cluster.elastic import asking, wait_for_workers
from cluster.nodes import prepare_nodes, staying, wants_gpu
from cluster.orders import Orders
from cluster.ray_cluster import in_cluster, ray_cluster
from cluster.watch import Watch, growing
from robustscale.engine.folder import RunFolder
from robustscale.errors import Diverged, Left, WorkersFailed
from robustscale.run import Run


def launch(task: str, run: Run, folder: RunFolder, show: Show, options: Mapping[str, Any] | None = None) -> None:
    """Run a task of cluster.worker on as many workers as there is room for, of those that the run may have; every
    failure short of bad input is retried.

    Attempts are ours, each a fresh Ray Train run that goes on from our own checkpoint: Ray's snapshot is written in
    place and can tear, and a run that Ray resumes trusts it. Raises InputError or Diverged as a worker did,
    WorkersFailed after too many failures in a row; SystemExit(143) after SIGTERM and KeyboardInterrupt after SIGINT,
    with a checkpoint if there was time for one.
    """
    folder.require_usable()
    with ray_cluster(run.cluster, show), Orders(show) as orders:
        # Once: a retry after a node was lost must not go on without GPUs.
        Launch(task, run, folder, show, options or {}, wants_gpu(run.cluster), orders).run_on()
    folder.pull()


class Launch:
    def __init__(
        self,
        task: str,
        run: Run,
        folder: RunFolder,
        show: Show,
        options: Mapping[str, Any],
        gpu: bool,
        orders: Orders,
    ) -> None:
        self.task, self.run, self.folder, self.show = task, run, folder, show
        self.options, self.gpu, self.orders = options, gpu, orders
        self.number = 0
        """Of the attempt."""
        self.failures = 0
        """In a row, without a checkpoint in between."""

    def run_on(self) -> None:
        reason = "start"
        while True:
            self.number += 1
            try:
                error = self._attempt(reason)
            except Left as left:
                if self.orders.signals:
                    self.orders.end()
                reason, self.failures = str(left), 0
            except Diverged as diverged:
                reason = self._roll_back(diverged)
            else:
                if error is None:
                    return
                if self.failures > self.run.cluster.max_failures:
                    raise WorkersFailed(f"gave up after {self.failures} failures in a row; the last: {error}")
                reason = f"a worker failed ({error})"
            self.show({"event": "note", "message": f"{reason}; going on from the last checkpoint"})

    def _attempt(self, reason: str) -> str | None:
        # What a failed attempt held comes back within seconds.
        wait = max(self.run.cluster.wait, 30.0 if self.number > 1 else 0.0)
        while True:
            there, error = staying(), self._prepare()
            if error is not None:
                self.failures += 1
                return error
            workers = wait_for_workers(self.run, self.gpu, self.show, wait, lambda: self._check(False))
            if staying() <= there:  # else who came meanwhile has its data to prepare, too
                break
        told = {"event": "workers", "workers": workers, "of": self.run.cluster.workers, "attempt": self.number}
        self.show({**told, "reason": reason})
        config = job(self.task, self.run, self.folder, self._options(), self.gpu) | {"writer": self._claim()}
        self.folder.push()
        attempt = Attempt(config, self.run.cluster, workers, self.show)
        watch = Watch(self.run.cluster, workers, grown=growing(self.run), gpu=self.gpu)
        short = workers < self.run.cluster.workers
        with asking(self.run.cluster, self.gpu) if short else contextlib.nullcontext(lambda: None) as ask:

            def check(can_leave: bool) -> str | None:
                ask()
                return self._check(can_leave)

            error = attempt.run(watch, check)
        self.failures = 1 if attempt.saved else self.failures + 1
        return error

    def _options(self) -> dict[str, Any]:
        """With what all ranks must agree on: another machine may see the folder as it was."""
        return {**self.options, "restarts": self.number - 1, "rollbacks": len(self.folder.rollbacks())}

    def _prepare(self) -> str | None:
        if not in_cluster():
            return None
        with asking(self.run.cluster, self.gpu) as ask:  # an autoscaler would take these nodes for idle
            return prepare_nodes(self.run.data, lambda: (ask(), self._check(False)))

    def _check(self, can_leave: bool) -> str | None:
        return self.orders.check(can_leave)

    def _claim(self) -> str | None:
        """The run's folder, for this attempt; what may be left of another one ends. An evaluation claims nothing: it
        may be of a run in training."""
        from cluster.beats import WRITER

        if self.task != "pretrain":
            return None
        writer = uuid.uuid4().hex
        self.folder.write(WRITER, {"attempt": writer})
        return writer

    def _roll_back(self, diverged: Diverged) -> str:
        """Raises it where the run has gone back often enough."""
        before = self.folder.rollbacks()
        if len(before) >= self.run.divergence.rollbacks:
            raise diverged
        self.folder.write("rollbacks.json", [*before, {"message": str(diverged)}])
        self.folder.push()  # now: until the next attempt begins this driver may end, and what lies here alone is lost
        rate = self.run.divergence.rollback_lr ** (len(before) + 1)
        return f"training diverged ({diverged}), going back with {rate:g} times the learning rate"
