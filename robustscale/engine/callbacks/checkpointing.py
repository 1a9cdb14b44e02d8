"""Saves and resumes a run."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from robustscale.engine.callback import Callback
from robustscale.engine.checkpoint import Store
from robustscale.engine.manifest import Saved
from robustscale.engine.trainer import Trainer
from robustscale.errors import InputError
from robustscale.run import Run, identity, same_result
from robustscale.types import Backend, State

SETTLES = 60.0
"""Seconds within which a checkpoint that one worker sees on shared storage is seen by all."""


class Checkpointing(Callback):
    """Rank 0 saves, every worker loads. The last callback, so that it saves the state of all the others.

    A step waits for the copy of the state alone, and for the checkpoint before this one if that is still being
    written: files, hashes and syncs are a thread's. What fails there fails the next step.
    """

    def __init__(self, run: Run, store: Store, emit: Callable[[dict[str, Any]], None]) -> None:
        self.run, self.store, self.emit = run, store, emit
        self.writer = ThreadPoolExecutor(1, "checkpoint")
        self.writing: Future[None] | None = None
        self.last = time.monotonic()
        self.resumed: int | None = None
        """The step of the checkpoint that this attempt went on from."""

    def on_fit_start(self, trainer: Trainer) -> None:
        saved = self._latest(trainer.backend)
        if saved is not None:
            self._restore(trainer, saved)
            if trainer.backend.rank == 0:
                self.emit({"event": "note", "message": f"resumed at step {trainer.step}, epoch {trainer.epoch}"})

    def _latest(self, backend: Backend) -> Saved | None:
        """The one that all workers see: on shared storage, what one has published may take others a while to see."""
        until = time.monotonic() + SETTLES
        while True:
            saved = self.store.latest()
            found = self._found(backend, saved)
            late = backend.gather(torch.tensor(time.monotonic() > until, device=backend.device))
            if len(set(found)) == 1:
                return saved
            if self.store.copied:
                return self._common(backend, found)
            if late.any():
                raise InputError(
                    f"{self.store.root}: workers see different checkpoints; use storage that all nodes share"
                )
            time.sleep(min(2.0, SETTLES))

    def _found(self, backend: Backend, saved: Saved | None) -> list[tuple[int, int]]:
        """Step and mark of what each worker has."""
        mine = (-1, 0) if saved is None else (saved.step, saved.mark)
        return [(int(step), int(mark)) for step, mark in backend.gather(torch.tensor(mine, device=backend.device))]

    def _common(self, backend: Backend, found: list[tuple[int, int]]) -> Saved:
        """The newest of which every machine has a sound copy, and the same one."""
        newest = max(step for step, _ in found)
        while True:
            steps = [step for step, _ in found]
            if min(steps) < 0:  # by what all know, so that all of them raise
                raise InputError(
                    f"{self.store.root}: workers have copies of step {newest}, but not all have a sound "
                    "checkpoint that is the same; put a copy of that one where the run is kept, or take another "
                    "--run-name"
                )
            # Of one step, they differ where it was taken more than once.
            saved = self.store.latest(min(steps) - (min(steps) == max(steps)))
            found = self._found(backend, saved)
            if saved is not None and len(set(found)) == 1:
                break
        if backend.rank == 0:
            self.store.set_aside(above=saved.step)
            message = f"no checkpoint after step {saved.step} is sound, and the same, on every machine"
            self.emit({"event": "note", "message": message})
        return saved

    def after_step(self, trainer: Trainer) -> None:
        self._ask_when_due(trainer)
        every = self.run.checkpoints.every_steps
        due = every is not None and trainer.step % every == 0
        # At the end of an epoch it is saved after the look at the held-out part, unless there is no time for that.
        within = trainer.batch < trainer.loader.num_batches
        asked = within and (due or trainer.agreed["save"])
        if trainer.agreed["leave"] or (asked and _sound(trainer)):
            trainer.metrics.flush(trainer.step)
            self._save(trainer, None)
        if trainer.agreed["leave"]:
            self._finish(trainer)

    def after_epoch(self, trainer: Trainer) -> None:
        due = trainer.epoch % self.run.checkpoints.every_epochs == 0 and _sound(trainer)
        if due or trainer.stop or trainer.epoch == self.run.epochs:
            self._save(trainer, trainer.record.get("ra"))

    def on_fit_end(self, trainer: Trainer) -> None:
        self._finish(trainer)

    def close(self) -> None:
        """However training ended: what is being written is written."""
        self.writer.shutdown(wait=True)

    def _ask_when_due(self, trainer: Trainer) -> None:
        """By rank 0's clock; the others can't know, and the state is saved by all at one step."""
        if trainer.backend.rank > 0:
            return
        if self.writing is not None and self.writing.done():
            self._wait()
        every = self.run.checkpoints.every_seconds
        if every is not None and time.monotonic() - self.last >= every:
            trainer.ask("save")

    def _save(self, trainer: Trainer, score: float | None) -> None:
        groups, state = contents_of(trainer, score)
        # At the end of an epoch that was left after its last step, the very checkpoint that it went on from is due.
        if trainer.backend.rank > 0 or trainer.step == self.resumed:
            return
        self._wait()
        # All of it: training goes on changing what the state refers to, too.
        state, copies = copy.deepcopy(state), {group: _copies(named) for group, named in groups.items()}
        self.last = time.monotonic()
        self.writing = self.writer.submit(self._write, trainer, trainer.step, copies, state)

    def _write(self, trainer: Trainer, step: int, copies: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
        self.store.save(step, copies, state)
        trainer.saved_at = time.monotonic()

    def _wait(self) -> None:
        writing, self.writing = self.writing, None
        if writing is not None:
            writing.result()

    def _finish(self, trainer: Trainer) -> None:
        """Until the checkpoint is durable, on every worker."""
        self._wait()
        trainer.backend.barrier()

    def _restore(self, trainer: Trainer, saved: Saved) -> None:
        state = saved.state
        with _as_saved(saved):
            same = same_result(state["identity"], self.run)
        if not same:
            raise InputError(
                f"{self.store.root}: the checkpoints are of another configuration; take another --run-name"
            )
        device = str(trainer.backend.device)
        with _as_saved(saved):
            trainer.network.load_state_dict(_like(saved.tensors("model", device), trainer.network.state_dict()))
            trainer.train_step.updater.load(saved.tensors("optimizer"), state)
            trainer.metrics.load_state_dict(state["metrics"])
            trainer.stop = bool(state["stop"])
            self.resumed = saved.step
            for name, value in _position(state["position"], trainer.position(), saved.step).items():
                setattr(trainer, name, value)
            for callback in trainer.callbacks:
                callback.load_state_dict(state["callbacks"].get(type(callback).__name__, {}))
                if f"{_group(callback)}.safetensors" in saved.files:
                    # Averages: shaped as what they are of.
                    callback.load_tensors(_like(saved.tensors(_group(callback), device), trainer.network.state_dict()))


def contents_of(trainer: Trainer, score: float | None) -> tuple[dict[str, Mapping[str, Tensor]], State]:
    """Tensors by group, and all else, of a checkpoint of where training stands; a collective of all workers."""
    optimizer, state = trainer.train_step.updater.state()
    state |= {
        "identity": identity(trainer.run),
        "position": trainer.position(),
        "stop": trainer.stop,
        "metrics": trainer.metrics.state_dict(),
        "callbacks": {type(c).__name__: c.state_dict() for c in trainer.callbacks},
        "score": score,
    }
    groups: dict[str, Mapping[str, Tensor]] = {"model": trainer.network.state_dict(), "optimizer": optimizer}
    groups |= {_group(c): named for c in trainer.callbacks if (named := c.tensors())}
    return groups, state


@contextlib.contextmanager
def _as_saved(saved: Saved) -> Iterator[None]:
    """A digest tells damage, not who wrote it: what somebody else wrote may be of any form."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{saved.path}: not what a run saves ({reason}); remove this folder to use the checkpoint before it"
        ) from error


def _like(tensors: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Raises ValueError where names or shapes differ."""
    for name in sorted(tensors.keys() | own.keys()):
        found, wanted = ([*of[name].shape] if name in of else None for of in (tensors, own))
        if found != wanted:
            raise ValueError(f"{name!r} has shape {found}, not {wanted}")
    return tensors


def _position(found: Mapping[str, Any], own: Mapping[str, float], step: int) -> Mapping[str, Any]:
    """What may be set on a trainer; an older checkpoint has fewer. Raises ValueError for anything else."""
    for name, value in found.items():
        if name not in own or type(value) not in (int, type(own[name])) or not value >= 0:
            raise ValueError(f"position: {name!r} is no place to go on from")
    if found["step"] != step or not {"epoch", "batch", "seconds"} <= found.keys():
        raise ValueError("position: is not of this step, or lacks something")
    return found


def _sound(trainer: Trainer) -> bool:
    """Whether the newest step was taken. If not, the weights may be what no step can be taken from, and checkpoints of
    them would push out those that a diverged run can go back to."""
    return trainer.skipped_in_a_row == 0


def _group(callback: Callback) -> str:
    return type(callback).__name__.lower()


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, each on its own: training goes on changing what they are of."""
    return {name: t.detach().to("cpu", copy=True, memory_format=torch.contiguous_format) for name, t in tensors.items()}
