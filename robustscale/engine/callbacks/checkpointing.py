"""Saves and resumes a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from robustscale.engine.callback import Callback
from robustscale.engine.checkpoint import Store
from robustscale.engine.manifest import Saved
from robustscale.engine.tensors import flatten_optimizer, restore_optimizer
from robustscale.engine.trainer import Trainer
from robustscale.errors import InputError
from robustscale.run import Run, identity, same_result


class Checkpointing(Callback):
    """Rank 0 saves, every worker loads. The last callback, so that it saves the state of all the others."""

    def __init__(self, run: Run, store: Store, emit: Callable[[dict[str, Any]], None]) -> None:
        self.run, self.store, self.emit = run, store, emit

    def on_fit_start(self, trainer: Trainer) -> None:
        saved = self.store.latest()
        step = torch.tensor(-1 if saved is None else saved.step, device=trainer.backend.device)
        if len(set(trainer.backend.gather(step).tolist())) > 1:
            raise InputError(f"{self.store.root}: workers see different checkpoints; use storage that all nodes share")
        if saved is not None:
            self._restore(trainer, saved)
            if trainer.backend.rank == 0:
                self.emit({"event": "note", "message": f"resumed at step {trainer.step}, epoch {trainer.epoch}"})

    def after_step(self, trainer: Trainer) -> None:
        every = self.run.checkpoints.every_steps
        if every is not None and trainer.step % every == 0 and trainer.batch < trainer.loader.num_batches:
            trainer.metrics.flush(trainer.step)
            self._save(trainer)

    def after_epoch(self, trainer: Trainer) -> None:
        if trainer.epoch % self.run.checkpoints.every_epochs == 0 or trainer.stop or trainer.epoch == self.run.epochs:
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        if trainer.backend.rank == 0:
            step = trainer.train_step
            optimizer, optimizer_state = flatten_optimizer(step.optimizer)
            state = {
                "identity": identity(self.run),
                "position": trainer.position(),
                "stop": trainer.stop,
                "metrics": trainer.metrics.state_dict(),
                "optimizer": optimizer_state,
                "scaler": step.scaler.state_dict(),
                "callbacks": {type(c).__name__: c.state_dict() for c in trainer.callbacks},
            }
            tensors = {"model": step.network.state_dict(), "optimizer": optimizer}
            tensors |= {_group(c): named for c in trainer.callbacks if (named := c.tensors())}
            self.store.save(trainer.step, tensors, state)
        trainer.backend.barrier()

    def _restore(self, trainer: Trainer, saved: Saved) -> None:
        state, step = saved.state, trainer.train_step
        if not same_result(state["identity"], self.run):
            raise InputError(
                f"{self.store.root}: the checkpoints are of another configuration; take another --run-name"
            )
        device = str(trainer.backend.device)
        step.network.load_state_dict(saved.tensors("model", device))
        restore_optimizer(step.optimizer, saved.tensors("optimizer"), state["optimizer"])
        step.scaler.load_state_dict(state["scaler"])
        trainer.metrics.load_state_dict(state["metrics"])
        trainer.stop = state["stop"]
        for name, value in state["position"].items():
            setattr(trainer, name, value)
        for callback in trainer.callbacks:
            callback.load_state_dict(state["callbacks"].get(type(callback).__name__, {}))
            if f"{_group(callback)}.safetensors" in saved.files:
                callback.load_tensors(saved.tensors(_group(callback), device))


def _group(callback: Callback) -> str:
    return type(callback).__name__.lower()
