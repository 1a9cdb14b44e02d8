"""How long the device was at work on something, without waiting for it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Stopwatch:
    """Adds up what runs within `running`. On a GPU by its own events: the host is ahead of it."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.laps: list[tuple[Any, Any]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        start = self._now()
        yield
        self.laps.append((start, self._now()))

    def _now(self) -> Any:
        if not self.cuda:
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def take(self) -> float:
        """Seconds of it since the last call; after the host has waited for the device, as events must be over."""
        laps, self.laps = self.laps, []
        return float(sum(start.elapsed_time(end) / 1000 if self.cuda else end - start for start, end in laps))
