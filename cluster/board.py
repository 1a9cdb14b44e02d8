"""Between the driver and the workers: records and beats go one way, orders the other."""

from __future__ import annotations

import time
from typing import Any, NamedTuple, TypedDict

SILENT = 30.0
"""Seconds without a beat after which a rank is taken for dead or stopped."""


class Beat(TypedDict):
    """What a rank says of itself, every second."""

    rank: int
    pid: int
    node: str
    step: int
    """Steps finished."""
    phase: str
    """Where its training thread stands, in words."""
    stepping: bool
    """Whether it is within a step; before the first, between epochs and in an evaluation a minute is nothing."""
    idle: float
    """Seconds since the last step, while it is within one."""
    waits: float | None
    """Seconds for which it has stood in one and the same collective, if it does: for another, as a rule."""
    leaves: bool
    """Whether it trains, and so follows the order to leave."""
    saved: bool
    """Whether a checkpoint of this attempt is durable."""
    ended: bool
    """Whether this was its last."""


class News(NamedTuple):
    """What has come in since the driver last asked."""

    records: list[dict[str, Any]]
    beats: list[tuple[Beat, float]]
    """The newest of each rank, and its age in seconds by the board's own clock."""


class Board:
    """Ranks push and beat, the driver drains and orders."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.beats: dict[int, tuple[Beat, float]] = {}
        self.orders: list[str] = []

    def push(self, record: dict[str, Any]) -> None:
        self.records.append(record)

    def beat(self, beat: Beat) -> list[str]:
        """Returns all orders so far: what a rank asks for twice, it gets once."""
        self.beats[beat["rank"]] = (beat, time.monotonic())
        return self.orders

    def order(self, name: str) -> None:
        self.orders.append(name)

    def drain(self) -> News:
        records, self.records = self.records, []
        now = time.monotonic()
        return News(records, [(beat, now - at) for beat, at in self.beats.values()])


def make_board() -> Any:
    """The actor, on the driver's node and outside all resource accounting. It ends with the driver."""
    # Here, as the driver imports this before it knows what Ray reads from the environment when it is imported.
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0)(Board).options(scheduling_strategy=here).remote()
