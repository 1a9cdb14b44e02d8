"""Joins a Ray cluster, or starts one on this machine."""

from __future__ import annotations

import contextlib
import functools
import ipaddress
import logging
import os
import secrets
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cluster.orders import terminate
from robustscale.errors import InputError, WorkersFailed
from robustscale.run import Cluster

Show = Callable[[dict[str, Any]], None]

_RAY = {
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # else every print of a worker appears twice
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # a poll of 2 s would keep every short run waiting
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # cluster/watch.py looks for draining nodes, and more often
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
            require_token(ray.get_runtime_context().gcs_address)
        stack.callback(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, terminate))
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


def require_token(address: str) -> None:
    """Raise InputError for a cluster that others can reach and that is joined without a token: whoever reaches one that
    asks for none runs what he likes on it. RAY_AUTH_MODE=disabled, said aloud, is the way out."""
    host = address.rpartition(":")[0].strip("[]")
    with contextlib.suppress(ValueError):
        if ipaddress.ip_address(host).is_loopback:
            return
    if host == "localhost" or "RAY_AUTH_MODE" in os.environ:
        return
    raise InputError(
        f"RAY_AUTH_MODE: is not set, and the cluster at {address} is not on loopback; start it with a token and set "
        "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH, or RAY_AUTH_MODE=disabled where the network keeps others out"
    )


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
        token.touch(0o600)
        token.write_text(_secret())
        ours = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        os.environ.update(ours)
        try:
            yield token
        finally:
            for name in ours:
                del os.environ[name]


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
    try:
        context = ray.init(
            "local",  # else it joins whatever /tmp/ray/ray_current_cluster names, running or not
            num_cpus=cpus,
            include_dashboard=True,
            dashboard_host="127.0.0.1",
            logging_level=logging.WARNING,
            log_to_driver=False,
        )
    except Exception as error:  # Ray raises that very class where one of its processes is too slow to start
        reason = " ".join(str(error).split())[:300]
        raise WorkersFailed(
            f"Ray did not start on this machine ({reason}); it needs free memory, disk and processor time, and a short "
            "path in RAY_TMPDIR; the same command tries again"
        ) from error
    return f"http://{context.dashboard_url}"
