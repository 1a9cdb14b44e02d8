"""Looks at the held-out part of the training data: selection, early stopping, the best weights."""

from __future__ import annotations

from robustscale.engine.callback import Callback
from robustscale.engine.early_stopping import EarlyStopping
from robustscale.engine.folder import RunFolder
from robustscale.engine.trainer import Trainer
from robustscale.evaluation.accuracy import judge
from robustscale.evaluation.words import Attacker
from robustscale.run import Run
from robustscale.types import Loader, State


class Monitor(Callback):
    """Adds held-out `sa` and `ra` to the epoch's record, and keeps the weights with the best RA beside the last."""

    def __init__(self, run: Run, folder: RunFolder, held_out: Loader | None) -> None:
        self.run, self.folder, self.held_out = run, folder, held_out
        self.stopping = EarlyStopping(run.evaluation.patience)

    def after_epoch(self, trainer: Trainer) -> None:
        evaluation = self.run.evaluation
        if self.held_out is None or not evaluation.looks_after(trainer.epoch, self.run.epochs):
            return
        attackers = {"monitor": Attacker(evaluation.monitor, evaluation.goal)}
        examples = judge(
            trainer.judged, self.held_out, attackers, trainer.backend, self.run.seed, draws=evaluation.draws
        )
        sa = examples.right.double().mean().item()
        ra = examples.robust("monitor").double().mean().item()
        trainer.record |= {"sa": sa, "ra": ra}
        better, trainer.stop = self.stopping.look(ra)
        if better and trainer.backend.rank == 0:
            facts = {"epoch": trainer.epoch, "step": trainer.step, "held_out_sa": sa, "held_out_ra": ra}
            self.folder.save_weights("best", trainer.judged, **facts)

    def on_fit_end(self, trainer: Trainer) -> None:
        if trainer.backend.rank == 0:
            self.folder.save_weights("last", trainer.judged, epoch=trainer.epoch, step=trainer.step)
        trainer.backend.barrier()

    def state_dict(self) -> State:
        return self.stopping.state_dict()

    def load_state_dict(self, state: State) -> None:
        self.stopping.load_state_dict(state)
