"""Joins or starts a Ray cluster and runs a task on its workers."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import secrets
import signal
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from robustscale.config import encode
from robustscale.engine.folder import RunFolder
from robustscale.errors import Diverged, InputError, WorkersFailed
from robustscale.run import Cluster, Data, Run

Show = Callable[[dict[str, Any]], None]

_RAY = {
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # else every print of a worker appears twice
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # a poll of 2 s would keep every short run waiting
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else Ray warns that it will once leave CUDA_VISIBLE_DEVICES alone
    "RAY_USAGE_STATS_ENABLED": "0",
}


def in_cluster() -> bool:
    """Whether a Ray cluster is there to join: inside a Ray job, or by RAY_ADDRESS."""
    return bool(os.environ.get("RAY_ADDRESS") or os.environ.get("RAY_JOB_ID"))


@contextlib.contextmanager
def ray_cluster(cluster: Cluster, show: Show) -> Iterator[None]:
    """Ray, connected: the cluster around us, or one of our own on this machine, shut down on leaving."""
    os.environ.update({name: os.environ.get(name, value) for name, value in _RAY.items()})
    with contextlib.ExitStack() as stack:
        own = not in_cluster()
        token = stack.enter_context(_token()) if own and "RAY_AUTH_MODE" not in os.environ else None
        import ray  # reads these variables when it is imported

        stack.callback(ray.shutdown)
        if own:
            url = _start(cluster, show)
            where = f" (token: {token})" if token else ""
            show({"event": "note", "message": f"Ray dashboard: {url}{where}"})
        else:
            require_answer(os.environ.get("RAY_ADDRESS", ""))
            ray.init(logging_level=logging.WARNING, log_to_driver=False)
        stack.callback(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, _terminate))
        yield


def require_answer(address: str) -> None:
    """Raise InputError where nothing listens: Ray itself would try for minutes, and say nothing."""
    host, colon, port = address.rpartition("//")[2].rpartition(":")
    if not (colon and port.isdecimal()):
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise InputError(
            f"RAY_ADDRESS: nothing answers at {address} ({error.strerror or error}); start that cluster, or unset it "
            "to have one on this machine"
        ) from None


@functools.cache
def _secret() -> str:
    """One for all clusters of this process: Ray reads it once, and a second cluster would not know the first one's."""
    return secrets.token_hex(32)


@contextlib.contextmanager
def _token() -> Iterator[Path]:
    """A secret for a cluster of our own. Ray would write a world-readable one into the home folder, and later clusters
    would pick it up."""
    with tempfile.TemporaryDirectory(prefix="robustscale-") as private:  # nobody else may enter it
        token = Path(private) / "ray_token"
        token.write_text(_secret())
        ours = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        os.environ.update(ours)
        try:
            yield token
        finally:
            for name in ours:
                del os.environ[name]


_terminated: list[int] = []
"""Signals that asked this process to end."""


def _terminate(number: int, frame: FrameType | None) -> None:
    _terminated.append(number)
    print("terminated", file=sys.stderr)
    raise SystemExit(128 + number)


def _start(cluster: Cluster, show: Show) -> str:
    """The URL of its dashboard."""
    import ray

    cpus = max(os.cpu_count() or 1, 4)
    needed = cluster.workers * cluster.cpus_per_worker
    if needed > cpus:
        raise InputError(
            f"cluster.workers: {cluster.workers} workers of {cluster.cpus_per_worker} CPUs need {needed}, this machine "
            f"offers {cpus}; lower it, or join a cluster by RAY_ADDRESS or ray job submit"
        )
    show({"event": "note", "message": "starting a Ray cluster on this machine"})
    context = ray.init(
        "local",  # else it joins whatever /tmp/ray/ray_current_cluster names, running or not
        num_cpus=cpus,
        include_dashboard=True,
        dashboard_host="127.0.0.1",
        logging_level=logging.WARNING,
        log_to_driver=False,
    )
    return f"http://{context.dashboard_url}"


def wait_for_resources(cluster: Cluster, gpu: bool, show: Show, wait: float) -> None:
    """Return once so much is free that all workers fit; raise InputError after `wait` seconds."""
    import ray

    deadline = time.monotonic() + wait
    need = {"CPU": cluster.workers * cluster.cpus_per_worker, **({"GPU": cluster.workers} if gpu else {})}
    said = False
    while True:
        free, there = ray.available_resources(), ray.cluster_resources()
        short = {kind: amount for kind, amount in need.items() if free.get(kind, 0) < amount}
        if not short:
            return
        parts = [
            f"{n} {kind}s (it has {there.get(kind, 0):g}, {free.get(kind, 0):g} free)" for kind, n in short.items()
        ]
        what = f"{cluster.workers} workers need {' and '.join(parts)}"
        if time.monotonic() > deadline:
            remedy = "add nodes, lower it, or raise cluster.wait"
            raise InputError(f"cluster.workers: {what}; waited {wait:g} s; {remedy}")
        if not said:
            show({"event": "note", "message": f"waiting for the cluster: {what}"})
            said = True
        time.sleep(0.5)


def prepare_nodes(data: Data) -> str | None:
    """Have every node that may run a worker prepare the data that it does not see; returns why one could not.

    Before the workers start: the others of a process group would wait for one that prepares ImageNet, and time out.
    Raises InputError.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from data_loaders.write import ensure

    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) > 0]
    task = ray.remote(num_cpus=0, max_retries=0)(ensure)
    try:
        ray.get(
            [task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(n, False)).remote(data) for n in nodes]
        )
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, InputError):
            raise InputError(str(error.cause)) from None
        raise
    except (ray.exceptions.RayError, ValueError) as error:  # the node went away meanwhile, or its process was killed
        return short(error)
    return None


def launch(task: str, run: Run, folder: RunFolder, show: Show, options: Mapping[str, Any] | None = None) -> None:
    """Run a task of cluster.worker on the run's workers; every failure short of bad input is retried.

    Retries are ours, each a fresh Ray Train run that goes on from our own checkpoint: Ray's snapshot is written in
    place and can tear, and a run that Ray resumes trusts it. Raises InputError or Diverged as a worker did.
    """
    with ray_cluster(run.cluster, show):
        import ray

        # Once: a retry after a node was lost must not go on without GPUs.
        gpu = ray.cluster_resources().get("GPU", 0) >= 1 if run.cluster.gpu is None else run.cluster.gpu
        for number in range(run.cluster.max_failures + 1):
            # What a failed attempt held comes back within seconds.
            wait_for_resources(run.cluster, gpu, show, max(run.cluster.wait, 30.0 if number else 0.0))
            error = prepare_nodes(run.data) if in_cluster() else None
            if error is None:
                with interruptible():
                    error = attempt(job(task, run, folder, options or {}, gpu), run.cluster, show)
            if error is None:
                return
            if number < run.cluster.max_failures:
                show({"event": "note", "message": f"a worker failed ({error}); going on from the last checkpoint"})
    raise WorkersFailed(f"gave up after {run.cluster.max_failures + 1} attempts; the last failure: {error}")


def job(task: str, run: Run, folder: RunFolder, options: Mapping[str, Any], gpu: bool) -> dict[str, Any]:
    """What a rank is told: see cluster.worker."""
    return {
        "task": task,
        "run": encode(run),
        "folder": str(folder.path),
        "options": dict(options),
        "threads": run.cluster.cpus_per_worker,
        "gpu": gpu,
    }


def attempt(config: Mapping[str, Any], cluster: Cluster, show: Show) -> str | None:
    """One Ray Train run of a job, in the cluster that this process is connected to; returns why it failed, if so.

    Raises InputError or Diverged as a worker did.
    """
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.config import LoggingConfig

    from cluster.board import make_board
    from cluster.worker import main

    board = make_board()
    gpu = config["gpu"]
    resources = {"CPU": float(cluster.cpus_per_worker), **({"GPU": 1.0} if gpu else {})}
    trainer = TorchTrainer(
        main,
        train_loop_config={**config, "board": board},
        scaling_config=ScalingConfig(num_workers=cluster.workers, use_gpu=gpu, resources_per_worker=resources),
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo", timeout_s=600),
        run_config=RunConfig(
            name=f"attempt-{uuid.uuid4().hex[:8]}",
            storage_path=str(Path(config["folder"], "ray")),
            # mypy sees the classes of the older Ray Train here.
            # No limit on the controller's failures, the default, retries for ever where the group can't be placed.
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),  # type: ignore[call-arg]
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    with _showing(board, show):
        try:
            trainer.fit()
        except ray.train.TrainingFailedError as failure:
            return _reason(failure)
    return None


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Ray Train takes SIGINT for itself and keeps it for good, and makes SystemExit(1) of what a signal raises."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        if not _terminated:
            raise KeyboardInterrupt from None
        raise SystemExit(128 + _terminated[-1]) from None
    finally:
        signal.signal(signal.SIGINT, handler)


def _reason(failure: BaseException) -> str:
    """One line; raises what a retry cannot mend."""
    causes: list[BaseException] = [*getattr(failure, "worker_failures", {}).values(), failure]
    for cause in causes:
        for error in _chain(cause):
            for kind in (InputError, Diverged):
                if isinstance(error, kind):
                    raise kind(str(error.args[0])) from None
    return short(causes[0])


def short(error: BaseException) -> str:
    """One line of bearable length: what happened stands at its beginning, or, in a traceback, at its end."""
    text = " ".join(str(error).split())
    return text if len(text) <= 400 else f"{text[:200]} ... {text[-200:]}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = getattr(error, "cause", None) or error.__cause__


@contextlib.contextmanager
def _showing(board: Any, show: Show) -> Iterator[None]:
    """Pass the workers' records on while they come."""
    import ray

    done = threading.Event()

    def follow() -> None:
        while True:
            last = done.wait(0.3)
            try:
                for record in ray.get(board.drain.remote(), timeout=30):
                    show(record)
            except ray.exceptions.GetTimeoutError:
                show({"event": "note", "message": "no word from the workers for 30 s"})
            except ray.exceptions.RayActorError:  # the cluster ends
                return
            if last:
                return

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(30)
        ray.kill(board)
