"""The loop: the same seed, any number of workers, and any moment of resuming give the same run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors
import torch

from robustscale.config import encode
from robustscale.engine.callback import Callback
from robustscale.engine.callbacks.monitor import Monitor
from robustscale.engine.folder import RunFolder
from robustscale.engine.step import TrainStep
from robustscale.engine.trainer import Trainer
from robustscale.run import Run
from robustscale.testing.gloo import run_ranks
from tests.engine.small import MemoryLoader, golden_runs, golden_trace, small_run, train, train_rank

GOLDEN = Path(__file__).parent.parent / "golden"


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_same_seed_twice_is_the_same_run_and_another_seed_is_not() -> None:
    first, second = train(small_run()), train(small_run())
    assert first[0] == second[0]
    assert same(first[1], second[1])
    assert train(small_run(seed=1))[0] != first[0]


def test_loss_falls() -> None:
    losses, _, _ = train(small_run(epochs=12, optimizer={"lr": 0.1}))
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])


GOLDEN_RUNS = golden_runs()


def trained(run: Run) -> str:
    """What a trace on the digits depends on: not on the name, nor on the data but for its kinds."""
    return json.dumps({**encode(run), "name": "", "data": run.data.unlabelled is not None})


TRACES = {trained(run): name for name, run in reversed(GOLDEN_RUNS.items())}
"""The first name of each training: recipes for other data train the digits alike."""


def golden_of(name: str) -> list[float]:
    found: list[float] = json.loads((GOLDEN / f"{name}.json").read_text())
    return found


@pytest.mark.parametrize("name", TRACES.values())
def test_golden_trace(name: str) -> None:
    """A refactor must not change a trace. Weights moved by 1e-15, as by rounding, move one by 1.2e-7 at most."""
    assert golden_trace(GOLDEN_RUNS[name]) == pytest.approx(golden_of(name), rel=1e-5)


@pytest.mark.parametrize("name", GOLDEN_RUNS)
def test_recipes_for_other_data_have_equal_traces(name: str) -> None:
    assert golden_of(name) == golden_of(TRACES[trained(GOLDEN_RUNS[name])])


def test_deterministic_reduction_is_bitwise_equal_for_1_2_and_4_workers() -> None:
    run = small_run(reduction="deterministic", shards=4, cluster={"workers": 1})
    losses, state, _ = train(run)
    for world in (2, 4):
        for rank_losses, rank_state in run_ranks(train_rank, world, run, world):
            assert rank_losses == losses
            assert same(rank_state, state)


@pytest.mark.parametrize(
    "model, tolerance", [({"name": "basic"}, 1e-4), ({"name": "resnet_cifar", "depth": 8, "base": 4}, 0.05)]
)
def test_one_and_two_workers_agree(model: dict[str, object], tolerance: float) -> None:
    """Without BatchNorm they differ by rounding, which PGD's sign amplifies; with it, by each worker's statistics."""
    run = small_run(model=model)
    losses, _, _ = train(run)
    ranks = run_ranks(train_rank, 2, run, 2)
    assert ranks[0][0] == pytest.approx(losses, rel=tolerance)
    assert ranks[0][0] == ranks[1][0]
    assert same(ranks[0][1], ranks[1][1]), "workers must hold equal weights and equal buffers after every step"


class StopAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def after_step(self, trainer: Trainer) -> None:
        if trainer.step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("reduction", ["fast", "deterministic"])
def test_resume_anywhere_is_bitwise_the_uninterrupted_run(optimizer: str, reduction: str, tmp_path: Path) -> None:
    run = small_run(optimizer={"name": optimizer}, reduction=reduction, checkpoints={"every_steps": 1})
    losses, state, _ = train(run)
    for stop in (1, 3, 4):
        with pytest.raises(KeyboardInterrupt):
            train(run, root=tmp_path / str(stop), callbacks=[StopAt(stop)])
        rest, resumed, trainer = train(run, root=tmp_path / str(stop))
        assert trainer.step == 6
        assert losses[-len(rest) :] == rest
        assert len(rest) <= 6 - stop + 1
        assert same(resumed, state)


DROPOUT = {"name": "wide_resnet", "depth": 10, "widen": 1, "dropout": 0.3}


def test_dropout_depends_on_the_seed_and_not_on_workers_or_resuming(tmp_path: Path) -> None:
    run = small_run(model=DROPOUT, epochs=1, reduction="deterministic", shards=2, checkpoints={"every_steps": 1})
    losses, state, _ = train(run)
    with pytest.raises(KeyboardInterrupt):
        train(run, root=tmp_path, callbacks=[StopAt(2)])
    assert same(train(run, root=tmp_path)[1], state)
    for rank_losses, rank_state in run_ranks(train_rank, 2, run, 2):
        assert rank_losses == losses
        assert same(rank_state, state)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_trains_and_keeps_float32_weights(precision: str, tmp_path: Path) -> None:
    run = small_run(precision=precision, clip=1.0, checkpoints={"every_steps": 2})
    losses, state, trainer = train(run, root=tmp_path)
    reference, _, _ = train(small_run(clip=1.0))
    assert losses == pytest.approx(reference, rel=0.1)
    assert losses != reference
    assert all(v.dtype in (torch.float32, torch.int64) for v in state.values())
    assert trainer.train_step.updater.scaler.is_enabled() == (precision == "fp16")


def test_clipping_bounds_the_step() -> None:
    run = small_run(clip=1e-3, optimizer={"lr": 1.0, "momentum": 0.0, "weight_decay": 0.0}, epochs=1)
    trainer = train(small_run(epochs=1))[2]
    step = TrainStep(run, trainer.network, trainer.backend)
    before = [p.detach().clone() for p in step.parameters]
    share = next(trainer.loader.epoch(0))
    from robustscale.types import Progress

    step(share, Progress(0, 0, 0, 1), 1.0)
    moved = torch.stack([(p.detach() - b).norm() for p, b in zip(step.parameters, before, strict=True)]).norm()
    assert 0.5e-3 < float(moved) <= 1e-3 * 1.001


def test_early_stopping_ends_the_run_and_keeps_the_best_weights(tmp_path: Path) -> None:
    """At a learning rate of nearly nothing RA never rises: the first look is the best, and the third is the last."""
    run = small_run(
        epochs=9, optimizer={"lr": 1e-9}, evaluation={"patience": 2, "monitor": {"threat": {"eps": 0.1}, "steps": 1}}
    )
    folder = RunFolder(tmp_path)
    held_out = MemoryLoader(run, 0, 1)
    trainer = train(run, root=tmp_path / "checkpoints", callbacks=[Monitor(run, folder, held_out)])[2]
    assert trainer.stop
    assert trainer.epoch == 3
    with safetensors.safe_open(folder.weights_path("best"), "pt") as best:
        assert json.loads(best.metadata()["facts"])["epoch"] == 1
    again = train(run, root=tmp_path / "checkpoints", callbacks=[Monitor(run, folder, held_out)])[2]
    assert again.epoch == 3, "a stopped run stays stopped when it is resumed"
