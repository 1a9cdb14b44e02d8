"""How many workers an attempt has."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

from cluster.nodes import needs, places
from robustscale.errors import InputError
from robustscale.run import Cluster, Run

SETTLE = 5.0
"""Seconds to wait for more workers than are needed: what a failed attempt held comes back within seconds."""


def largest(run: Run, places: int) -> int | None:
    """The largest number of workers that the run may have and that so many places hold."""
    return next((size for size in run.cluster.sizes(run.shards // run.accumulation) if size <= places), None)


def wait_for_workers(
    run: Run, gpu: bool, show: Callable[[dict[str, Any]], None], wait: float, tick: Callable[[], object] = lambda: None
) -> int:
    """How many workers the cluster has room for now: all, or within `wait` seconds as few as the run may have. Raises
    InputError if it has not. `tick` is called while waiting, and may raise."""
    sizes = run.cluster.sizes(run.shards // run.accumulation)
    begun, said = time.monotonic(), False
    with asking(run.cluster, gpu) as ask:
        while True:
            tick()
            ask()
            size = largest(run, places(needs(run.cluster, gpu)))
            waited = time.monotonic() - begun
            if size == sizes[0] or (size is not None and waited > SETTLE):
                return size
            if size is None and waited > wait:
                remedy = "add nodes, lower it, or raise cluster.wait"
                raise InputError(f"cluster.workers: {_lack(run.cluster, sizes, gpu)}; waited {wait:g} s; {remedy}")
            if not said:
                lack = _lack(run.cluster, sizes, gpu)
                show({"event": "note", "message": f"waiting for the cluster: {lack}"})
                said = True
            time.sleep(0.3)


def _lack(cluster: Cluster, sizes: tuple[int, ...], gpu: bool) -> str:
    import ray

    free, there = ray.available_resources(), ray.cluster_resources()
    need = {kind: amount * sizes[0] for kind, amount in needs(cluster, gpu).items()}
    short = {kind: n for kind, n in need.items() if free.get(kind, 0) < n} or need
    parts = [f"{n:g} {kind}s (it has {there.get(kind, 0):g}, {free.get(kind, 0):g} free)" for kind, n in short.items()]
    least = f", {sizes[-1]} at least," if sizes[-1] < sizes[0] else ""
    return f"{sizes[0]} workers{least} need {' and '.join(parts)}"


ASK_EVERY = 5.0
"""Seconds between two requests: a cluster has one for all its drivers, and what another asks for, or withdraws, takes
its place."""


@contextlib.contextmanager
def asking(cluster: Cluster, gpu: bool) -> Iterator[Callable[[], None]]:
    """Within, an autoscaler is asked for room for all workers, now and as often as the result is called; a cluster
    without one does not care. Withdrawn on leaving: asked for, nodes are kept, and paid for. A driver that is killed
    leaves its request standing, until the next one is made."""
    from ray.autoscaler.sdk import request_resources

    asked = -math.inf

    def ask() -> None:
        nonlocal asked
        if time.monotonic() - asked >= ASK_EVERY:
            request_resources(bundles=[needs(cluster, gpu)] * cluster.workers)
            asked = time.monotonic()

    ask()
    try:
        yield ask
    finally:
        request_resources(bundles=[])
