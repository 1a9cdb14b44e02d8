"""A rank's signs of life: where it stands, told to the driver every second; and what it is told in return."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, TextIO

import ray

from cluster.board import SILENT, Beat
from robustscale.engine.callback import Callback
from robustscale.engine.folder import RunFolder
from robustscale.engine.trainer import Trainer
from robustscale.errors import InputError

EVERY = 1.0
"""Seconds between two beats."""
ABANDONED = 60.0
"""Seconds without an answer of the driver after which a rank ends itself: a new one may have begun elsewhere."""
WRITER = "writer.json"
"""In a run's folder: the attempt that may write there. One that was cut off from its driver ends when it is another."""

PHASES = {
    "on_fit_start": "at the start",
    "_fit_epoch": "in the step",
    "waiting": "waiting for data",
    "perturb": "in the attack",
    "after_step": "after the step",
    "after_epoch": "between two epochs",
    "on_fit_end": "at the end",
    "read_test_set": "reading the test set",
}
"""By the function in which a training thread stands; the innermost tells."""


class Beats(Callback):
    """Beats from a thread of its own, and keeps the time of the last step for it. `here` is this process's one, where
    there is one."""

    here: Beats | None = None

    def __init__(self, board: Any, rank: int, folder: RunFolder, hang: float, writer: str | None) -> None:
        self.board, self.rank, self.folder, self.hang, self.writer = board, rank, folder, hang, writer
        self.pid, self.node = os.getpid(), ray.get_runtime_context().get_node_id()
        self.training_thread = threading.get_ident()
        self.trainer: Trainer | None = None
        self.steps = 0
        """Taken in this attempt."""
        self.since = time.monotonic()
        """When the last step ended, or what is no step."""
        self.collective: tuple[int, ...] | None = None
        self.waits_since = 0.0
        self.dumped = -1
        """The step at which the stacks were written."""
        self.ended, self.woken = threading.Event(), threading.Event()

    def on_fit_start(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def after_step(self, trainer: Trainer) -> None:
        self.steps, self.since = self.steps + 1, time.monotonic()
        if self.steps == 1:
            # From now on there is something to leave with.
            self.woken.set()

    def on_fit_end(self, trainer: Trainer) -> None:
        self.trainer = None

    def __enter__(self) -> Beats:
        Beats.here = self
        stacks = self.folder.path / "stacks" / f"rank-{self.rank}.txt"
        stacks.parent.mkdir(parents=True, exist_ok=True)
        self.stacks = stacks.open("a")
        self.thread = threading.Thread(target=self._beat_on, args=(self.stacks,), name="beats", daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        Beats.here = None
        self.ended.set()
        self.woken.set()
        self.thread.join(2 * EVERY)
        faulthandler.cancel_dump_traceback_later()
        self.board.beat.remote(self._beat())
        self.stacks.close()
        path = Path(self.stacks.name)
        with contextlib.suppress(OSError):  # another rank's may be there, and an attempt before may end only now
            if path.stat().st_size == 0:
                path.unlink()
                path.parent.rmdir()

    def _beat_on(self, stacks: TextIO) -> None:
        answered = time.monotonic()
        while not self.ended.is_set():
            # C waits for it, so that the stacks of a loop which holds the interpreter are written, too.
            faulthandler.dump_traceback_later(0.8 * min(SILENT, self.hang), file=stacks)
            beat = self._beat()
            if beat["stepping"] and beat["idle"] > 0.8 * self.hang and self.dumped != self.steps:
                self.dumped = self.steps
                print(f"{time.ctime()}: {beat['phase']}, {beat['step']} steps finished", file=stacks, flush=True)
                faulthandler.dump_traceback(stacks)
            try:
                self._obey(ray.get(self.board.beat.remote(beat), timeout=10))
                answered = time.monotonic()
            except ray.exceptions.GetTimeoutError:
                if time.monotonic() - answered > ABANDONED:
                    self._end("no word from the driver")
            except ray.exceptions.RayError:
                self._end("the driver is gone")
            self._require_writer()
            self.woken.wait(EVERY)
            self.woken.clear()

    def _beat(self) -> Beat:
        now, trainer = time.monotonic(), self.trainer
        at = standing(sys._current_frames()[self.training_thread])
        stepping = at.stepping and self.steps > 0
        if not stepping:
            self.since = now
        # With the step: a frame that has ended leaves its place, and so its id, to the next.
        collective = None if at.collective is None else (self.steps, *at.collective)
        if collective is None or collective != self.collective:
            self.collective, self.waits_since = collective, now
        return {
            "rank": self.rank,
            "pid": self.pid,
            "node": self.node,
            "step": 0 if trainer is None else trainer.step,
            "phase": at.phase,
            "stepping": stepping,
            "idle": now - self.since,
            "waits": None if at.collective is None else now - self.waits_since,
            "leaves": trainer is not None and self.steps > 0,
            "saved": trainer is not None and trainer.saved_at is not None,
            "ended": self.ended.is_set(),
        }

    def _obey(self, orders: list[str]) -> None:
        trainer = self.trainer
        if "leave" in orders and trainer is not None:
            trainer.ask("leave")

    def _require_writer(self) -> None:
        if self.writer is None:
            return
        try:
            writes = self.folder.read(WRITER)["attempt"]
        except InputError as error:  # whether storage can be read is not for this thread to judge
            print(f"rank {self.rank}: {error}", file=sys.stderr, flush=True)
            return
        if writes != self.writer:
            self._end("another attempt has begun")

    def _end(self, why: str) -> None:
        """Of the process, at once: it must write nothing any more, and stands in a collective, perhaps."""
        if not self.ended.is_set():
            print(f"rank {self.rank}: {why}", file=sys.stderr, flush=True)
            os._exit(1)


class Standing(NamedTuple):
    phase: str
    stepping: bool
    collective: tuple[int, int] | None
    """Which call of one, if it stands in one."""


def standing(frame: FrameType) -> Standing:
    """Where a thread stands whose innermost frame this is."""
    stack = list(_outwards(frame))
    names = [f.f_code.co_name for f in stack]
    phase = next((PHASES[name] for name in names if name in PHASES), "at the start")
    # In DDP a gradient is averaged within backward. The attack takes its gradients by autograd.grad.
    waits = "backward" in names or any("/torch/distributed/" in f.f_code.co_filename for f in stack)
    collective = (id(frame), frame.f_lasti) if waits else None
    return Standing(phase, "_fit_epoch" in names and "after_epoch" not in names, collective)


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back
