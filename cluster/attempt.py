"""One Ray Train run of a job, watched until it ends."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from cluster.watch import Heard, Hung, Watch, alive
from robustscale.config import encode
from robustscale.engine.folder import RunFolder
from robustscale.errors import Diverged, InputError, Left
from robustscale.run import Cluster, Run

Show = Callable[[dict[str, Any]], None]
Check = Callable[[bool], str | None]
"""Given whether the workers can leave: why they are to, if they are. May raise."""

NODES = 1.0
"""Seconds between two looks at the nodes."""
TICK = 0.25
"""Seconds between two looks at the board."""
AGAIN = 60.0
"""Seconds after which a hung process is killed once more: its node did not answer, perhaps."""
COLLECTIVE = 30.0
"""Seconds that a collective's own time-out comes later than `cluster.hang`, so that the message names the rank."""


def job(task: str, run: Run, folder: RunFolder, options: Mapping[str, Any], gpu: bool) -> dict[str, Any]:
    """What a rank is told: see cluster.worker."""
    return {
        "task": task,
        "run": encode(run),
        "folder": folder.where,
        "options": dict(options),
        "threads": run.cluster.cpus_per_worker,
        "gpu": gpu,
    }


class Attempt:
    """Runs once. `run` returns why it failed, if so; `saved` says whether a checkpoint was made."""

    def __init__(self, config: Mapping[str, Any], cluster: Cluster, workers: int, show: Show) -> None:
        from cluster.board import make_board

        self.config, self.cluster, self.workers, self.show = config, cluster, workers, show
        self.board = make_board()
        self.folder = RunFolder(config["folder"], config["task"]).path
        self.stacks = str(self.folder / "stacks")
        self.saved = False
        self.ordered: str | None = None
        """Why the workers were told to leave."""
        self.hung: Hung | None = None
        self.killed = -AGAIN
        self.groups: list[str] = []
        self.looked = 0.0
        """When the nodes were last looked at."""

    def run(self, watch: Watch, check: Check = lambda can_leave: None) -> str | None:
        """Raises InputError, Diverged or Left as a worker did, and what `check` raises."""
        import ray

        ended: list[BaseException | None] = []
        thread = threading.Thread(target=lambda: ended.append(self._fit()), daemon=True)
        thread.start()
        try:
            while thread.is_alive():
                self._look(watch, check, thread)
            self._look(watch, check, None)
        finally:
            ray.kill(self.board)
            if not thread.is_alive():
                self._release()
        return self._reason(ended[0])

    def _fit(self) -> BaseException | None:
        """Not in the main thread, where Ray Train would take the signals."""
        try:
            self._trainer().fit()
        except Exception as failure:  # noqa: BLE001 (whose thread waits for this one tells them apart)
            return failure
        return None

    def _trainer(self) -> Any:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer
        from ray.train.v2.api.config import LoggingConfig

        from cluster.nodes import needs
        from cluster.worker import main

        gpu = self.config["gpu"]
        scaling = ScalingConfig(num_workers=self.workers, use_gpu=gpu, resources_per_worker=needs(self.cluster, gpu))
        return TorchTrainer(
            main,
            train_loop_config={**self.config, "board": self.board},
            scaling_config=scaling,
            torch_config=TorchConfig(
                backend="nccl" if gpu else "gloo", timeout_s=round(self.cluster.hang + COLLECTIVE)
            ),
            run_config=RunConfig(
                name=f"attempt-{uuid.uuid4().hex[:8]}",
                storage_path=str(self.folder / "ray"),
                # mypy sees the classes of the older Ray Train here.
                # No limit on the controller's failures, the default, retries for ever where the group can't be placed.
                failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),  # type: ignore[call-arg]
                logging_config=LoggingConfig(log_level="WARNING"),
            ),
        )

    def _look(self, watch: Watch, check: Check, thread: threading.Thread | None) -> None:
        """`thread`: None once it has ended."""
        beats = self._drain(check)
        if thread is None:
            return
        if beats is None:
            thread.join(TICK)
            return
        can_leave = alive(beats)["leaves"]
        why = check(can_leave)
        if why is None and can_leave and time.monotonic() - self.looked > NODES:
            why, self.looked = watch.leaves(beats), time.monotonic()
        if why is not None and self.ordered is None:
            self.ordered = why
            self.show({"event": "note", "message": f"{why}: saving a checkpoint"})
            self.board.order.remote("leave")
        if time.monotonic() - self.killed > AGAIN and (hung := watch.hung(beats, self.stacks)) is not None:
            self._kill(hung)
        thread.join(TICK)

    def _drain(self, check: Check) -> Heard | None:
        """What the workers have said meanwhile, passed on; None where the board does not answer."""
        import ray

        answer, since = self.board.drain.remote(), time.monotonic()
        while not ray.wait([answer], timeout=0.2)[0]:
            check(True)
            if time.monotonic() - since > 30:
                self.show({"event": "note", "message": "no word from the workers for 30 s"})
                return None
        try:
            records, beats = ray.get(answer)
        except ray.exceptions.RayError:  # the board was killed, and without it the workers end, too
            return None
        for record in records:
            if "placement_group" in record:
                self.groups.append(record["placement_group"])
            self.show(record)
        self.saved |= alive(beats)["saved"]
        return list(beats)

    def _kill(self, hung: Hung) -> None:
        from cluster.processes import Process, kill, of_attempt

        self.hung, self.killed = hung, time.monotonic()
        self.show({"event": "note", "message": f"{hung.message}; killing it"})
        one = hung.beat
        for process in of_attempt(self.board) if one is None else [Process(one["node"], one["pid"])]:
            kill(process)

    def _release(self) -> None:
        from cluster.processes import release

        for group in self.groups:
            release(group)

    def _reason(self, failure: BaseException | None) -> str | None:
        """One line; raises what a retry cannot mend, and Left."""
        import ray

        if failure is None:
            return None
        if not isinstance(failure, (ray.train.TrainingFailedError, ray.exceptions.RayError)):
            raise failure
        causes: list[BaseException] = [*getattr(failure, "worker_failures", {}).values(), failure]
        found = [error for cause in causes for error in _chain(cause)]
        for kind in (InputError, Diverged):
            for error in found:
                if isinstance(error, kind):
                    raise kind(str(error.args[0])) from None
        if self.ordered is not None and any(isinstance(error, Left) for error in found):
            raise Left(self.ordered)
        # A rank that died says more than those that lost it in a collective.
        died = [cause for cause in causes if isinstance(cause, ray.exceptions.RayActorError)]
        return self.hung.message if self.hung else short((died or causes)[0])


def attempt(config: Mapping[str, Any], cluster: Cluster, show: Show) -> str | None:
    """A job on all workers of a cluster that this process is connected to; returns why it failed, if so. Raises
    InputError or Diverged as a worker did."""
    return Attempt(config, cluster, cluster.workers, show).run(Watch(cluster, cluster.workers, gpu=config["gpu"]))


def short(error: BaseException) -> str:
    """One line of bearable length: what happened stands at its beginning, or, in a traceback, at its end."""
    text = " ".join(str(error).split())
    return text if len(text) <= 400 else f"{text[:200]} ... {text[-200:]}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = getattr(error, "cause", None) or error.__cause__
