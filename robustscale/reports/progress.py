"""How far a run is: a live display on a terminal, plain lines anywhere else."""

from __future__ import annotations

import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Self, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def duration(seconds: float) -> str:
    """12 s, 3:05 min or 2:07 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02} h"


class Pace:
    """Time left at the mean speed since this process first saw the work: a resumed run is not faster for it."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.phase: object = None
        self.done = self.total = self.first = 0
        self.since = self.seen = 0.0

    def at(self, phase: object, done: int, total: int) -> None:
        if phase != self.phase or done < self.done:
            self.phase, self.since, self.first = phase, self.clock(), done
        self.done, self.total, self.seen = done, total, self.clock()

    def share(self) -> str:
        return f"{100 * self.done // self.total} %" if self.total else ""

    def left(self) -> str | None:
        if self.done <= self.first or self.done >= self.total:
            return None
        seconds = (self.seen - self.since) / (self.done - self.first) * (self.total - self.done)
        return f"{duration(max(0.0, seconds - (self.clock() - self.seen)))} left"


class Screen(ABC):
    """Shows records as they come: a picture that is kept current on a terminal, lines anywhere else. A context manager;
    `update` may be called from several threads. Another one says what a record changes, and draws the picture."""

    def __init__(self, title: str, file: TextIO | None, interval: float, clock: Callable[[], float]) -> None:
        """Between two lines that nobody needs at once, `interval` seconds."""
        self.title, self.interval, self.clock = title, interval, clock
        self.pace = Pace(clock)
        self.console = Console(file=file or sys.stdout, highlight=False)
        self.lock = threading.Lock()
        self.live: Live | None = None
        self.last_line = -float("inf")

    def __enter__(self) -> Self:
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            self.live = Live(console=self.console, transient=True, get_renderable=self._picture, refresh_per_second=4)
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None

    def update(self, record: Mapping[str, Any]) -> None:
        with self.lock:
            self._take(record)

    @abstractmethod
    def _take(self, record: Mapping[str, Any]) -> None: ...

    @abstractmethod
    def _picture(self) -> RenderableType: ...

    def _bar(self, *more: Text) -> Table:
        """A line of the picture: the title, how far it is, and more."""
        bar = Table.grid(padding=(0, 1))
        width = min(40, self.console.width // 3)
        progress = ProgressBar(total=max(self.pace.total, 1), completed=self.pace.done, width=width)
        bar.add_row(Text(self.title, style="bold"), progress, *more)
        return bar

    def _due(self, now: bool = False) -> bool:
        """Whether to print a line of what a terminal's picture shows anyway: `now`, or `interval` after the last."""
        if self.live is not None or not (now or self.clock() - self.last_line >= self.interval):
            return False
        self.last_line = self.clock()
        return True

    def _line(self, text: str) -> None:
        prefix = f"[{self.title}] " if self.title else ""
        if self.live is not None:
            self.console.print(Text(prefix + text))
        else:
            print(prefix + text, file=self.console.file, flush=True)


class Display(Screen):
    """Shows the records of a run.

    It takes the records of metrics.jsonl, {"event": "note", "message"}, {"event": "workers", "workers", "of",
    "attempt"}, and any record with "done" and "total", such as {"event": "judge", "attack", "done", "total"}. An epoch
    that comes again after a restart is not shown again.
    """

    def __init__(
        self,
        total_epochs: int = 0,
        total_steps: int | None = None,
        title: str = "",
        *,
        file: TextIO | None = None,
        interval: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(title, file, interval, clock)
        self.total_epochs, self.total_steps = total_epochs, total_steps
        self.label = ""
        self.figures: list[str] = []
        self.held_out: list[str] = []
        self.last_epoch = 0
        self.group: list[str] = []
        """Of the workers, what is worth a word: fewer than wished for, begun again."""

    def _take(self, record: Mapping[str, Any]) -> None:
        event = record["event"]
        if event == "step":
            self._step(record)
        elif event == "epoch":
            self._epoch(record)
        elif event == "workers":
            self._workers(record)
        elif "done" in record and "total" in record:
            self._part(record)
        else:
            self._line(str(record.get("message", event)))

    def _step(self, record: Mapping[str, Any]) -> None:
        total = record.get("total_steps") or self.total_steps or record["step"]
        self.pace.at("step", record["step"], total)
        # A step's record counts the epochs finished before it.
        self.label = f"epoch {min(record['epoch'] + 1, self.total_epochs)}/{self.total_epochs}"
        formats: dict[str, Callable[[float], str]] = {
            "loss": lambda v: f"loss {v:.4f}",
            "lr": lambda v: f"lr {v:.3g}",
            "images_per_second": lambda v: f"{v:,.0f} images/s",
            "wait": lambda v: f"waiting for data {100 * v:.0f} %",
        }
        shown = [text(record[name]) for name, text in formats.items() if name in record]
        self.figures = [f"step {record['step']}/{total}", *shown]
        self._maybe_line()

    def _workers(self, record: Mapping[str, Any]) -> None:
        workers, of, restarts = record["workers"], record["of"], record["attempt"] - 1
        fewer = [f"{workers} of {of} workers"] if workers < of else []
        self.group = [*fewer, *([f"{restarts} restart{'s' * (restarts > 1)}"] if restarts else [])]
        if self.group:
            self._line(", ".join(self.group))

    def _epoch(self, record: Mapping[str, Any]) -> None:
        if record["epoch"] <= self.last_epoch:
            return
        self.last_epoch = record["epoch"]
        self.held_out = [f"{name.upper()} {percent(record[name])}" for name in ("sa", "ra") if name in record]
        held_out = [f"held out: {', '.join(self.held_out)}"] if self.held_out else []
        loss = [f"loss {record['train_loss']:.4f}"] if "train_loss" in record else []
        took = [duration(record["seconds"])] if "seconds" in record else []
        self._line("  ".join([f"epoch {record['epoch']}/{self.total_epochs} done", *loss, *held_out, *took]))

    def _part(self, record: Mapping[str, Any]) -> None:
        self.pace.at(record["event"], record["done"], record["total"])
        verb = {"judge": "evaluating"}.get(record["event"], record["event"])
        self.label = verb
        self.figures = [str(record[name]) for name in ("attack", "message") if name in record]
        self._maybe_line(finished=record["done"] == record["total"])

    def _maybe_line(self, finished: bool = False) -> None:
        if self._due(finished):
            left = self.pace.left()
            share = [] if self.pace.phase == "step" else [self.pace.share()]
            self._line(
                "  ".join([" ".join([self.label, *share]), *self.figures, *self.group, *([left] if left else [])])
            )

    def _picture(self) -> Group:
        bar = Table.grid(padding=(0, 1))
        left = self.pace.left() or ""
        progress = ProgressBar(total=max(self.pace.total, 1), completed=self.pace.done, width=40)
        bar.add_row(Text(self.title, style="bold"), Text(self.label), progress, Text(self.pace.share()), Text(left))
        held_out = [f"held out {', '.join(self.held_out)}"] if self.held_out else []
        return Group(bar, Text("  ".join([*self.figures, *held_out, *self.group]), style="dim"))
