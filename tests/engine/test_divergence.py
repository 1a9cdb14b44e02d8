"""A loss or gradient that is not finite: all workers skip the step alike, it is counted, and too many end the run."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustscale.engine.callback import Callback
from robustscale.engine.checkpoint import Store
from robustscale.engine.trainer import Trainer
from robustscale.errors import Diverged
from robustscale.objectives.pgd_at import PgdAt
from robustscale.run import Run
from robustscale.testing.gloo import run_ranks
from robustscale.types import Batch, Loss, Progress
from tests.engine.small import small_run, train

WARNING = "ignore:step .* is skipped"


@dataclass(frozen=True)
class Sabotaged(PgdAt):
    """PGD-AT in which something is not finite, on one rank, at some steps."""

    at_steps: tuple[int, ...] = ()
    rank: int = 0
    where: str = "loss"

    def loss(self, model: nn.Module, batch: Batch, found: Any, at: Progress) -> Loss:
        if at.step not in self.at_steps or int(os.environ.get("RANK", "0")) != self.rank:
            return super().loss(model, batch, found, at)
        bad = {"nan image": float("nan"), "inf image": float("inf")}.get(self.where)
        loss = super().loss(model, batch, found if bad is None else torch.full_like(found, bad), at)
        if self.where == "gradient":
            # sqrt at zero: 0, with an infinite derivative.
            zero = (loss.value - loss.value.detach()).clamp(min=0)
            return loss._replace(value=loss.value + zero.sqrt())
        return loss._replace(value=loss.value * float("inf")) if self.where == "loss" else loss


class States(Callback):
    """The whole state after every step."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []
        self.skipped: list[int] = []

    def after_step(self, trainer: Trainer) -> None:
        optimizer, _ = trainer.train_step.updater.state()
        weights = {f"network.{name}": t for name, t in trainer.network.state_dict().items()}
        self.states.append({name: t.clone() for name, t in {**weights, **optimizer}.items()})
        self.skipped.append(trainer.skipped)


def sabotaged(where: str, at_steps: tuple[int, ...], rank: int = 0, **changes: Any) -> Run:
    run = small_run(epochs=2, **changes)
    attack = run.objective.attack  # type: ignore[attr-defined]
    object.__setattr__(run, "objective", Sabotaged(attack=attack, at_steps=at_steps, rank=rank, where=where))
    return run


@pytest.mark.filterwarnings(WARNING)
@pytest.mark.parametrize("where", ["loss", "gradient", "nan image", "inf image"])
@pytest.mark.parametrize("reduction", ["fast", "deterministic"])
def test_such_a_step_changes_nothing_and_is_counted(where: str, reduction: str) -> None:
    states = States()
    losses, _, _ = train(sabotaged(where, (2, 3), reduction=reduction), callbacks=[states])
    assert states.skipped == [0, 0, 1, 2, 2, 2]
    for step in (2, 3):
        assert all(torch.equal(t, states.states[1][name]) for name, t in states.states[step].items())
    assert not torch.equal(states.states[4]["network.body.fc.weight"], states.states[3]["network.body.fc.weight"])
    assert all(torch.tensor(losses).isfinite()), "the metrics are of the other steps"


def test_a_person_is_told() -> None:
    with pytest.warns(UserWarning, match=r"step 3: loss inf, gradient norm .*; the step is skipped"):
        train(sabotaged("loss", (2,)))


@pytest.mark.filterwarnings(WARNING)
def test_too_many_in_a_row_end_the_run_and_name_the_images() -> None:
    states = States()
    run = sabotaged("gradient", (2, 3, 4, 5), divergence={"skip": 2})
    with pytest.raises(Diverged, match=r"step 5: loss .*, 3 such steps in a row, the last on images (\d+, ){32}\.\.\."):
        train(run, callbacks=[states])
    assert len(states.states) == 4, "callbacks do not see a run that has diverged"


@pytest.mark.filterwarnings(WARNING)
def test_others_in_between_make_a_new_row() -> None:
    assert train(sabotaged("loss", (1, 3, 5), divergence={"skip": 1}))[2].skipped == 3


@pytest.mark.filterwarnings(WARNING)
def test_a_learning_rate_far_too_high_diverges() -> None:
    with pytest.raises(Diverged, match=r"step \d+: .* lower optimizer.lr"):
        train(small_run(optimizer={"lr": 1e18}, epochs=20))


@pytest.mark.filterwarnings(WARNING)
def test_skipped_steps_push_no_checkpoint_out(tmp_path: Path) -> None:
    """Neither by steps, nor by the clock, nor after an epoch: a run that diverges goes back to before the first."""
    checkpoints = {"every_steps": 1, "every_seconds": 1e-6, "keep": 1}
    run = sabotaged("loss", (2, 3, 4, 5), divergence={"skip": 3}, checkpoints=checkpoints)
    with pytest.raises(Diverged, match="step 6"):
        train(run, root=tmp_path)
    saved = Store(tmp_path, 1).latest()
    assert saved is not None and saved.step == 2 and saved.state["position"]["skipped_in_a_row"] == 0


@pytest.mark.filterwarnings(WARNING)
def test_a_run_that_ends_so_is_saved(tmp_path: Path) -> None:
    train(sabotaged("loss", (4, 5)), root=tmp_path)
    saved = Store(tmp_path, 1).latest()
    assert saved is not None and saved.step == 6 and saved.state["position"]["skipped"] == 2


def _states(rank: int, run: Run, world: int) -> tuple[list[int], list[dict[str, Tensor]]]:
    import warnings

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    from cluster.ddp_backend import DdpBackend

    states = States()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        train(run, DdpBackend(cpu=True), callbacks=[states])
    return states.skipped, states.states


@pytest.mark.parametrize(
    "where, rank, reduction",
    [
        ("loss", 1, "fast"),
        pytest.param("gradient", 0, "fast", marks=pytest.mark.slow),
        pytest.param("nan image", 1, "fast", marks=pytest.mark.slow),
        pytest.param("gradient", 1, "deterministic", marks=pytest.mark.slow),
        pytest.param("loss", 0, "deterministic", marks=pytest.mark.slow),
    ],
)
def test_one_worker_s_is_skipped_by_all(where: str, rank: int, reduction: str) -> None:
    run = sabotaged(where, (1, 4), rank, reduction=reduction)
    (skipped, states), (other_skipped, other_states) = run_ranks(_states, 2, run, 2)
    assert skipped == other_skipped == [0, 1, 1, 1, 2, 2]
    for ours, theirs in zip(states, other_states, strict=True):
        assert all(torch.equal(t, theirs[name]) and t.isfinite().all() for name, t in ours.items())
    assert all(torch.equal(t, states[1][name]) for name, t in states[0].items())
