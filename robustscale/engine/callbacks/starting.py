"""Puts the weights that a run starts from into its network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

from robustscale.engine.callback import Callback
from robustscale.engine.folder import RunFolder
from robustscale.engine.start import read_start
from robustscale.engine.trainer import Trainer
from robustscale.models.network import Network
from robustscale.models.transfer import Start, begin, keeps_head
from robustscale.run import Run

Emit = Callable[[dict[str, Any]], None]


class Starting(Callback):
    """Right before the callback that resumes, so that it comes right after it: every worker loads, unless a checkpoint
    was there, which has all the weights."""

    def __init__(self, run: Run, folder: RunFolder, classes: Sequence[str], emit: Emit) -> None:
        self.run, self.folder, self.classes, self.emit = run, folder, tuple(classes), emit

    @classmethod
    def of(cls, run: Run, folder: RunFolder, classes: Sequence[str], emit: Emit) -> list[Callback]:
        return [] if run.transfer.weights is None else [cls(run, folder, classes, emit)]

    def on_fit_start(self, trainer: Trainer) -> None:
        if trainer.step > 0:
            return
        start = read_start(self.run, self.folder)
        head = keeps_head(start, self.run.transfer, self.classes)
        begin(cast(Network, trainer.network), start, head=head)
        if trainer.backend.rank == 0:
            which = "its head is kept" if head else "its head is drawn anew"
            expected = start.normalisation()
            own = Start(dict(trainer.network.state_dict()), None, "").normalisation()
            other = "" if expected == own else "; its mean and std are not those of this run"
            if expected is None and own is not None:
                mean, std = (" ".join(f"{value:.4g}" for value in values) for values in own)
                other = f"; it does not say what normalisation it expects: taken are mean {mean} and std {std}"
            self.emit({"event": "note", "message": f"started from {start.where}; {which}{other}"})
