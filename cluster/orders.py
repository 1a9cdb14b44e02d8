"""What a signal to the driver orders: that the workers leave with a checkpoint, or that all ends at once."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn, Self

GRACE = 20.0
"""Seconds that the workers have for a checkpoint after SIGTERM. Kubernetes and Slurm grant 30 by default, and
`ray job stop` 3, or RAY_JOB_STOP_WAIT_TIME_S of the head."""


class Orders:
    """A context manager. Within, the first SIGTERM or SIGINT asks for a checkpoint, and is heeded where `check` is
    called; the second ends the run there at once. Nothing is raised by a handler: Ray makes SystemExit(1) of it."""

    def __init__(self, show: Callable[[dict[str, Any]], None]) -> None:
        self.show = show
        self.signals: list[int] = []
        self.since = 0.0
        self.before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._take) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.since = self.since or time.monotonic()
        self.signals.append(number)

    def check(self, can_leave: bool) -> str | None:
        """Why the workers are to leave, if they are. Raises SystemExit or KeyboardInterrupt where they need not, can't,
        or took too long."""
        if not self.signals:
            return None
        late = self.signals[0] == signal.SIGTERM and time.monotonic() - self.since > GRACE
        if not can_leave or late or len(self.signals) > 1:
            self.end()
        return "terminated" if self.signals[0] == signal.SIGTERM else "interrupted; once more ends it at once"

    def end(self) -> NoReturn:
        """As the first signal would have ended a process that does not care."""
        if self.signals[0] == signal.SIGINT:
            raise KeyboardInterrupt
        print("terminated", file=sys.stderr)
        raise SystemExit(128 + self.signals[0])


_terminated: list[int] = []
"""Signals that asked this process to end."""


def terminate(number: int, frame: FrameType | None) -> None:
    """Handles SIGTERM where there is nothing to leave."""
    _terminated.append(number)
    print("terminated", file=sys.stderr)
    raise SystemExit(128 + number)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Around Ray Train and Ray Tune in the main thread: they take SIGINT for themselves and keep it for good, and make
    SystemExit(1) of what a signal raises."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        if not _terminated:
            raise KeyboardInterrupt from None
        raise SystemExit(128 + _terminated[-1]) from None
    finally:
        signal.signal(signal.SIGINT, handler)
