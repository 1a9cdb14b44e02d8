"""The processes of an attempt, and how one that does not answer is ended."""

from __future__ import annotations

from typing import Any, NamedTuple

TIMEOUT = 15.0
"""Seconds for a task that kills: it needs a process on that node."""


class Process(NamedTuple):
    node: str
    pid: int


def of_attempt(board: Any) -> list[Process]:
    """Those that live of an attempt which this process started with this board: workers, then the controller."""
    import ray

    table = ray._private.state.state.actor_table
    ours = table(board._actor_id.hex())["OwnerAddress"]
    living = list(table(None, ray.get_runtime_context().worker.current_job_id, "ALIVE").values())
    controllers = [a for a in living if a["ActorClassName"] == "TrainController" and a["OwnerAddress"] == ours]
    workers = [a for a in living if a["OwnerAddress"] in [c["Address"] for c in controllers]]
    workers = [a for a in workers if a["ActorClassName"] == "RayTrainWorker"]
    return [Process(a["Address"]["NodeID"], a["Pid"]) for a in [*workers, *controllers]]


def kill(process: Process) -> None:
    """SIGKILL, which a stopped process and a loop in C obey as well. By a task on its node; ray.kill asks the process
    itself. Where the node does not answer, Ray finds out by itself."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(process.node, False)
    task = ray.remote(num_cpus=0, max_retries=0)(_kill).options(scheduling_strategy=there)
    ray.wait([task.remote(process.pid)], timeout=TIMEOUT)


def _kill(pid: int) -> None:
    import os
    import signal
    from pathlib import Path

    # Between the order and now it may have ended, and its number may be another's.
    title = Path(f"/proc/{pid}/cmdline")
    if title.exists() and title.read_bytes().startswith(b"ray::"):
        os.kill(pid, signal.SIGKILL)


def release(group: str) -> None:
    """Remove a placement group, by its id in hexadecimal. After a controller that was killed an actor of Ray's does,
    but it asks the dashboard whether the controller lives, and gives up where several clusters run on one machine."""
    import ray
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    remove_placement_group(PlacementGroup(ray.PlacementGroupID.from_hex(group)))
