"""Saving in the background, by the clock, on request; and leaving with a checkpoint."""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from robustscale.engine.callback import Callback
from robustscale.engine.callbacks.checkpointing import Checkpointing
from robustscale.engine.callbacks.log import Log, read_lines
from robustscale.engine.checkpoint import Store
from robustscale.engine.folder import RunFolder
from robustscale.engine.trainer import Trainer
from robustscale.errors import InputError, Left
from tests.engine.small import small_run, train


class Asking(Callback):
    """Asks at a step, from another thread, as an order from the driver does."""

    def __init__(self, what: Any, at_step: int) -> None:
        self.what, self.at_step = what, at_step
        self.agreed: list[int] = []

    def after_step(self, trainer: Trainer) -> None:
        if trainer.agreed[self.what]:
            self.agreed.append(trainer.step)
        if trainer.step == self.at_step:
            thread = threading.Thread(target=trainer.ask, args=[self.what])
            thread.start()
            thread.join()


def steps_in(root: Path) -> list[int]:
    return sorted(int(path.name.partition("-")[2]) for path in root.glob("step-*"))


@pytest.mark.parametrize("at_step", [1, 2, 4])
def test_a_run_that_left_ends_as_if_it_had_not(tmp_path: Path, at_step: int) -> None:
    """Epochs have 3 steps: also after the last of one, before the look that follows."""
    run = small_run(epochs=2, averaging={"name": "ema", "decay": 0.9})
    with pytest.raises(Left, match=f"left after step {at_step + 1}"):
        train(run, root=tmp_path, callbacks=[Asking("leave", at_step)])
    assert max(steps_in(tmp_path)) == at_step + 1
    assert Store(tmp_path, 2).latest() is not None
    _, state, trainer = train(run, root=tmp_path)
    _, expected, _ = train(run)
    assert trainer.step == 6 and all(torch.equal(t, expected[name]) for name, t in state.items())


def test_a_checkpoint_on_request(tmp_path: Path) -> None:
    asking = Asking("save", 1)
    train(small_run(epochs=1), root=tmp_path, callbacks=[asking])
    assert asking.agreed == [2], "asked once, saved once"
    assert steps_in(tmp_path) == [2, 3]


def test_checkpoints_by_the_clock(tmp_path: Path) -> None:
    run = small_run(epochs=2, checkpoints={"every_seconds": 1e-6, "every_epochs": 9, "keep": 9})
    train(run, root=tmp_path)
    # Due from the first step on, agreed at the next; not at the end of an epoch, unless it is the last.
    assert steps_in(tmp_path) == [2, 4, 5, 6]


class SlowStore(Store):
    """A store on a slow disk."""

    seconds = 0.5

    def save(self, step: int, tensors: Any, state: Any) -> Path:
        time.sleep(self.seconds)
        return super().save(step, tensors, state)


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    """And what is saved is the state of its step, not of those taken meanwhile."""
    run = small_run(epochs=2, checkpoints={"every_steps": 2, "every_epochs": 9, "every_seconds": None})
    times: dict[int, float] = {}
    states: dict[int, Tensor] = {}

    class Clock(Callback):
        def after_step(self, trainer: Trainer) -> None:
            times[trainer.step] = time.monotonic()
            states[trainer.step] = trainer.network.state_dict()["body.fc.weight"].clone()

    checkpointing = Checkpointing(run, SlowStore(tmp_path, 9), lambda record: None)
    trainer = train(run, callbacks=[Clock(), checkpointing])[2]
    checkpointing.close()
    assert times[3] - times[2] < SlowStore.seconds
    assert steps_in(tmp_path) == [2, 4, 6]
    assert trainer.saved_at is not None and trainer.saved_at > times[6]
    saved = Store(tmp_path, 9).latest()
    assert saved is not None and torch.equal(saved.tensors("model")["body.fc.weight"], states[6])
    newer = tmp_path / "step-00000006"
    newer.rename(tmp_path / "aside")
    saved = Store(tmp_path, 9).latest()
    assert saved is not None and torch.equal(saved.tensors("model")["body.fc.weight"], states[4])


def test_what_is_counted_while_a_checkpoint_is_written_is_not_in_it(tmp_path: Path) -> None:
    """The third of three steps is taken while the checkpoint of the second is held back."""
    taken = threading.Event()

    class Held(Store):
        def save(self, step: int, tensors: Any, state: Any) -> Path:
            assert taken.wait(60)
            return super().save(step, tensors, state)

    class Taken(Callback):
        def after_step(self, trainer: Trainer) -> None:
            if trainer.step == 3:
                taken.set()

    run = small_run(epochs=1, checkpoints={"every_steps": 2, "every_seconds": None})
    checkpointing = Checkpointing(run, Held(tmp_path, 9), lambda record: None)
    train(run, callbacks=[Taken(), checkpointing])
    checkpointing.close()
    (tmp_path / "step-00000003").rename(tmp_path / "aside")
    saved = Store(tmp_path, 9).latest()
    assert saved is not None and saved.step == 2
    assert saved.state["metrics"]["window"] == {}
    assert {steps for _, steps in saved.state["metrics"]["epoch"].values()} == {2}


def test_what_fails_in_the_background_ends_training(tmp_path: Path) -> None:
    class Full(Store):
        def save(self, step: int, tensors: Any, state: Any) -> Path:
            raise InputError(f"{self.root}: the checkpoint of step {step} cannot be written (No space left on device)")

    run = small_run(epochs=9, checkpoints={"every_steps": 1})
    checkpointing = Checkpointing(run, Full(tmp_path, 2), lambda record: None)
    with pytest.raises(InputError, match="step 1 cannot be written"):
        train(run, callbacks=[checkpointing])
    checkpointing.close()


def test_a_run_that_left_after_an_epoch_s_last_step_counts_its_look_once(tmp_path: Path) -> None:
    """Though it is killed after the look and before the next checkpoint; and what it goes on from is no new one."""
    folder = RunFolder(tmp_path)
    run = small_run(epochs=2, checkpoints={"every_seconds": None})

    class Killed(Callback):
        def after_step(self, trainer: Trainer) -> None:
            if trainer.step == 4:
                assert trainer.saved_at is None
                raise KeyboardInterrupt

    for stops in (Asking("leave", 2), Killed(), Killed(), None):
        with contextlib.closing(Log(folder, lambda record: None)) as log:
            callbacks = [log] if stops is None else [log, stops]
            with contextlib.suppress(Left, KeyboardInterrupt):
                train(run, root=folder.checkpoints, callbacks=callbacks)
    records = [(record["event"], record["step"]) for record in read_lines(folder)]
    assert records == [*[("step", s) for s in (1, 2, 3)], ("epoch", 3), *[("step", s) for s in (4, 5, 6)], ("epoch", 6)]
