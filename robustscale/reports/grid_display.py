"""How far a plan is: what runs, what waits and what is done, live on a terminal, plain lines anywhere else."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from rich.console import Group
from rich.table import Table
from rich.text import Text

from robustscale.reports.progress import Screen

WORDS = {"done": "done", "runs": "running", "waits": "waiting", "failed": "failed", "left out": "left out"}
OVER = ("done", "failed", "left out")
SHOWN = 12
"""Running nodes at most, that a terminal shows one by one."""


class GridDisplay(Screen):
    """Shows {"event": "node", "key", "name", "state", "reason"} as each changes its state; {"event": "grid", "states":
    {key: state}}; {"event": "progress", "key", "epoch", "epochs"}; notes, and any record with "done" and "total"."""

    def __init__(
        self,
        title: str = "",
        *,
        file: TextIO | None = None,
        interval: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(title, file, interval, clock)
        # Replaced, never changed: the picture is drawn by another thread.
        self.counts: Mapping[str, int] = {}
        self.running: Mapping[str, str] = {}
        self.epochs: Mapping[str, str] = {}

    def _take(self, record: Mapping[str, Any]) -> None:
        if record["event"] == "node":
            self._node(record)
        elif record["event"] == "grid":
            self.counts = Counter(record["states"].values())
            self.pace.at("grid", sum(self.counts[state] for state in OVER), len(record["states"]))
        elif record["event"] == "progress":
            self.epochs = {**self.epochs, record["key"]: f"epoch {record['epoch']}/{record['epochs']}"}
            if self.running and self._due():
                self._line(self._totals())
        elif "done" in record and "total" in record:
            if self._due(record["done"] == record["total"]):
                self._line(f"{record.get('message', record['event'])}  {record['done']} of {record['total']}")
        else:
            self._line(str(record.get("message", record["event"])))

    def _node(self, record: Mapping[str, Any]) -> None:
        others = {key: name for key, name in self.running.items() if key != record["key"]}
        self.running = {**others, record["key"]: record["name"]} if record["state"] == "runs" else others
        words = "starts" if record["state"] == "runs" else record["state"]
        reason = f": {record['reason']}" if record.get("reason") else ""
        if self.live is None or record["state"] == "failed":
            self._line(f"{record['name']}  {words}{reason}")

    def _totals(self) -> str:
        counts = [f"{self.counts[state]} {words}" for state, words in WORDS.items() if self.counts.get(state)]
        left = self.pace.left()
        return ", ".join(counts) + (f", {left}" if left else "")

    def _picture(self) -> Group:
        rows = Table.grid(padding=(0, 2))
        running = list(self.running.items())
        for key, name in running[:SHOWN]:
            rows.add_row(Text(f"  {name}"), Text(self.epochs.get(key, ""), style="dim"))
        more = [Text(f"  and {len(running) - SHOWN} more", style="dim")] if len(running) > SHOWN else []
        return Group(self._bar(Text(self._totals(), style="dim")), rows, *more)
