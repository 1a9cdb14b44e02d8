"""The driver's eye on an attempt: who hangs, which node is about to go, whether more workers would fit."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from cluster.board import SILENT, Beat
from cluster.nodes import draining, needs, places
from robustscale.run import Cluster, Run

START = 120.0
"""Least seconds for the first sign of life of all workers: processes start, and import torch."""
PLACES = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
GROW_EVERY = 30.0
"""Seconds that a group works, at least, before it is interrupted to be larger."""
STEADY = 5.0
"""Seconds for which there must be room for more, before that."""

Heard = list[tuple[Beat, float]]


class Hung(NamedTuple):
    """Whom the others wait for, and why it is thought so."""

    message: str
    beat: Beat | None
    """None for a start of which not all ranks have reported."""


class Watch:
    def __init__(
        self,
        cluster: Cluster,
        workers: int,
        *,
        grown: Callable[[int], int | None] = lambda places: None,
        gpu: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`grown`: how many workers the run may have with so many places."""
        self.cluster, self.workers, self.grown, self.clock = cluster, workers, grown, clock
        self.need = needs(cluster, gpu)
        self.begun = clock()
        self.training: float | None = None
        self.room_since: float | None = None

    def hung(self, beats: Heard, stacks: str) -> Hung | None:
        """The rank that the others wait for, if one has given no sign, or taken no step, for too long."""
        hang = self.cluster.hang
        if len(beats) < self.workers:
            # Where other work holds the places that there were, Ray Train itself waits, for a time of its own.
            limit = max(hang, START) + float(os.environ.get(PLACES, "60"))
            late = self.clock() - self.begun > limit
            missing = sorted(set(range(self.workers)) - {beat["rank"] for beat, _ in beats})
            return Hung(f"no sign of ranks {missing} {limit:g} s after the start", None) if late else None
        beats = [(beat, age) for beat, age in beats if not beat["ended"]]
        silent = [(beat, age) for beat, age in beats if age > min(hang, SILENT)]
        if silent:
            beat, age = max(silent, key=lambda one: one[1])
            return Hung(f"{_named(beat)} has given no sign for {age:.0f} s; it stood {_where(beat)}", beat)
        stood = max((max(beat["idle"], beat["waits"] or 0.0) for beat, _ in beats), default=0.0)
        if stood <= hang:
            return None
        # Of those that have come as far, one that stands in a collective waits for one that does not.
        beat = min((beat for beat, _ in beats), key=lambda b: (b["step"], b["waits"] is not None, b["rank"]))
        others = "; the others wait for it" if self.workers > 1 else ""
        return Hung(f"{_named(beat)} stands {_where(beat)}, since {stood:.0f} s{others}; stacks in {stacks}", beat)

    def leaves(self, beats: Heard) -> str | None:
        """Why these workers should leave, if they should."""
        ours = [beat["node"] for beat, _ in beats]
        going = draining() & set(ours)
        if going:
            return f"node {', '.join(node[:8] for node in sorted(going))} is about to go"
        return self._larger(ours)

    def _larger(self, ours: list[str]) -> str | None:
        now = self.clock()
        self.training = self.training or now
        size = self.grown(places(self.need, ours)) if now - self.training > GROW_EVERY - STEADY else None
        if size is None or size <= self.workers:
            self.room_since = None
            return None
        self.room_since = self.room_since or now
        return f"there is room for {size} workers" if now - self.room_since >= STEADY else None


def _named(beat: Beat) -> str:
    return f"rank {beat['rank']} (node {beat['node'][:8]}, pid {beat['pid']})"


def _where(beat: Beat) -> str:
    return f"in step {beat['step'] + 1}, {beat['phase']}" if beat["stepping"] else beat["phase"]


def growing(run: Run) -> Callable[[int], int | None]:
    """For `Watch.grown`."""
    from cluster.elastic import largest

    return lambda places: largest(run, places)


def alive(beats: Heard) -> dict[str, Any]:
    """What the beats say of the attempt as a whole."""
    return {
        "leaves": any(beat["leaves"] for beat, _ in beats),
        "saved": any(beat["saved"] for beat, _ in beats),
    }
