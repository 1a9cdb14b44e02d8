"""Averages of the weights: right, judged, kept, and saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from robustscale.cli import parse_run
from robustscale.config import components, override
from robustscale.engine.averaging import EMA, SWA, Newest
from robustscale.engine.callback import Callback
from robustscale.engine.callbacks.monitor import Monitor
from robustscale.engine.folder import RunFolder
from robustscale.engine.trainer import Trainer
from robustscale.errors import InputError
from robustscale.run import Run, identity, same_result
from robustscale.testing.gloo import run_ranks
from robustscale.types import Averaging, Objective
from tests.engine.small import MemoryLoader, golden_runs, small_run, train, train_rank

State = dict[str, Tensor]


class Snapshots(Callback):
    """The weights after every step, and before the first."""

    def __init__(self) -> None:
        self.states: list[State] = []

    def on_fit_start(self, trainer: Trainer) -> None:
        self.after_step(trainer)

    def after_step(self, trainer: Trainer) -> None:
        self.states.append({k: v.double().clone() for k, v in trainer.network.state_dict().items()})


def averaged(run: Run, **options: Any) -> tuple[State, list[State], Trainer]:
    """(the average, the weights after each step, trainer)."""
    snapshots = Snapshots()
    _, found, trainer = train(run, callbacks=[snapshots, *options.pop("callbacks", [])], **options)
    return found, snapshots.states, trainer


def same(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def statistics(name: str) -> bool:
    return "running" in name or "num_batches" in name


def test_shares_of_ema_rise_to_the_decay() -> None:
    shares = [EMA(decay=0.9).share(t, 1000, 10) for t in range(1, 200)]
    assert shares[0] == pytest.approx(9 / 11) and shares[-1] == pytest.approx(0.1)
    assert shares == sorted(shares, reverse=True)


@pytest.mark.parametrize("start, first", [(0.0, 1), (0.5, 6), (0.55, 6), (0.29, 3), (0.99, 10)])
def test_swa_is_the_mean_of_the_ends_of_epochs(start: float, first: int) -> None:
    """With a step's number for a weight, the average is the mean of the last numbers of the epochs after `start`."""
    average = 0.0
    for step in range(1, 71):
        average += SWA(start=start).share(step, 70, 7) * (step - average)
        epochs = [7 * e for e in range(first, 11) if 7 * e <= step]
        assert average == pytest.approx(sum(epochs) / len(epochs) if epochs else step)


def test_ema_is_the_closed_recursion() -> None:
    found, states, _ = averaged(small_run(averaging={"name": "ema", "decay": 0.6}))
    for name, value in found.items():
        # Σ_t (1 - d_t) (Π_{s>t} d_s) w_t, and w_0 with what is left.
        decays = [min(0.6, (1 + t) / (10 + t)) for t in range(1, len(states))]
        weights = [(1 - d) * float(np.prod(decays[t:])) for t, d in enumerate(decays, start=1)]
        expected = float(np.prod(decays)) * states[0][name]
        expected = expected + sum(w * s[name] for w, s in zip(weights, states[1:], strict=True))
        if "num_batches" in name:
            expected = states[-1][name]
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found["body.fc.weight"].double(), states[-1]["body.fc.weight"], atol=1e-4)


def test_swa_is_the_mean_of_the_weights() -> None:
    run = small_run(epochs=4, averaging={"name": "swa", "start": 0.25})
    found, states, trainer = averaged(run)
    ends = [states[e * trainer.loader.num_batches] for e in (2, 3, 4)]
    for name in filter(lambda name: not statistics(name), found):
        torch.testing.assert_close(found[name].double(), sum(s[name] for s in ends) / 3, rtol=1e-5, atol=1e-6)


def test_swa_estimates_the_statistics_of_its_own_weights() -> None:
    """Each layer's running mean is the mean of its inputs over the training images, batch by batch."""
    _, _, trainer = averaged(small_run(epochs=3, averaging={"name": "swa", "start": 0.3}))
    network = trainer.judged
    first = next(m for m in network.modules() if isinstance(m, nn.BatchNorm2d))
    inputs: list[Tensor] = []
    handle = first.register_forward_hook(lambda _m, given, _o: inputs.append(given[0]))
    with torch.no_grad():
        for share in trainer.loader.epoch(trainer.epoch - 1):
            network.eval()(share.batch.x)
    handle.remove()
    mean = torch.stack([x.mean((0, 2, 3)) for x in inputs]).mean(0)
    var = torch.stack([x.var((0, 2, 3)) for x in inputs]).mean(0)
    torch.testing.assert_close(first.running_mean, mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(first.running_var, var, rtol=1e-4, atol=1e-5)
    assert first.momentum == 0.1
    assert not torch.allclose(mean, trainer.network.get_buffer(_name_of(network, first)), atol=1e-5)


def _name_of(network: nn.Module, wanted: nn.Module) -> str:
    return next(f"{name}.running_mean" for name, m in network.named_modules() if m is wanted)


def test_training_itself_is_not_changed() -> None:
    plain = train(small_run())[1]
    for averaging in ("ema", "swa"):
        run = small_run(averaging={"name": averaging})
        snapshots = averaged(run)[1]
        assert same({k: v.double() for k, v in plain.items()}, snapshots[-1])


@pytest.mark.parametrize("stop", [2, 4, 5])
@pytest.mark.parametrize("averaging", [{"name": "ema", "decay": 0.7}, {"name": "swa", "start": 0.3}])
def test_resuming_is_bitwise_the_uninterrupted_run(averaging: dict[str, Any], stop: int, tmp_path: Path) -> None:
    run = small_run(epochs=3, averaging=averaging, checkpoints={"every_steps": 1})
    whole = averaged(run)[0]

    class Stop(Callback):
        def after_step(self, trainer: Trainer) -> None:
            if trainer.step == stop:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        averaged(run, root=tmp_path, callbacks=[Stop()])
    resumed, states, trainer = averaged(run, root=tmp_path)
    assert len(states) < trainer.step + 1, "it began anew"
    assert same(resumed, whole)


def test_a_checkpoint_without_averages_goes_on_without_them(tmp_path: Path) -> None:
    """As one saved before there were any: without their group, and without their field in its identity."""
    run = small_run(epochs=1)
    train(run, root=tmp_path)
    folder = next(tmp_path.glob("step-*"))
    assert sorted(p.name for p in folder.glob("*.safetensors")) == ["model.safetensors", "optimizer.safetensors"]
    with pytest.raises(InputError, match="another configuration"):
        averaged(small_run(epochs=1, averaging={"name": "ema"}), root=tmp_path)


def test_an_older_identity_is_this_runs_where_the_new_fields_are_the_defaults() -> None:
    run = small_run()
    older = json.loads(json.dumps(identity(run)))
    del older["averaging"], older["label_smoothing"], older["objective"]["goal"]["loss"]
    assert same_result(older, run)
    assert not same_result(older, small_run(averaging={"name": "ema"}))
    assert not same_result(older, small_run(label_smoothing=0.1))
    assert not same_result({**older, "seed": 1}, run)
    assert not same_result({**older, "of_another_version": 1}, run)


def test_the_monitor_judges_and_keeps_the_average(tmp_path: Path) -> None:
    run = small_run(averaging={"name": "ema", "decay": 0.9}, evaluation={"monitor": {"steps": 1}})
    folder, held_out = RunFolder(tmp_path), MemoryLoader(small_run(), 0, 1)

    class Expected(Callback):
        """The average when the monitor looked."""

        def after_epoch(self, trainer: Trainer) -> None:
            state = {k: v.clone() for k, v in trainer.judged.state_dict().items()}
            looks.append((trainer.record["ra"], state))

    looks: list[tuple[float, State]] = []
    found, _, trainer = averaged(run, callbacks=[Monitor(run, folder, held_out), Expected()])
    best = max(looks, key=lambda look: look[0])[1]
    assert same(safetensors.torch.load_file(folder.weights_path("best")), best)
    assert same(safetensors.torch.load_file(folder.weights_path("last")), found)
    assert not torch.equal(found["body.fc.weight"], trainer.network.state_dict()["body.fc.weight"])
    read = RunFolder(tmp_path)
    read.load_weights("last", trainer.network)
    assert same(trainer.network.state_dict(), found)


@pytest.mark.parametrize("averaging, world", [("ema", 2), ("swa", 4)])
def test_any_number_of_workers_ends_with_the_same_bits(averaging: str, world: int) -> None:
    run = small_run(
        averaging={"name": averaging}, reduction="deterministic", shards=4, cluster={"workers": 1}, epochs=3
    )
    found = averaged(run)[0]
    for _losses, state in run_ranks(train_rank, world, run, world):
        assert same(state, found)


def test_two_workers_of_a_fast_run_hold_equal_averages() -> None:
    run = small_run(averaging={"name": "swa", "start": 0.3}, epochs=3)
    first, second = run_ranks(train_rank, 2, run, 2)
    assert same(first[1], second[1])


@pytest.mark.parametrize("name", components(Objective))
def test_every_objective_has_an_average(name: str) -> None:
    run = golden_runs()[name]
    for component in components(Averaging):
        found = averaged(override(run, {"averaging": component, "label_smoothing": 0.1, "epochs": 1}))[0]
        assert all(bool(v.isfinite().all()) for v in found.values())


@pytest.mark.parametrize("wrong", [EMA, SWA])
def test_what_makes_no_sense_is_refused(wrong: type) -> None:
    field = {"EMA": "decay", "SWA": "start"}[wrong.__name__]
    for value in (1.0, -0.1):
        with pytest.raises(InputError, match=field):
            wrong(**{field: value})


def test_the_command_line_chooses_it_and_sets_its_fields() -> None:
    def averaging(*args: str) -> Averaging:
        return parse_run(args, "pretrain", "", Run()).averaging

    assert averaging() == averaging("--averaging", "newest") == Newest()
    assert averaging("--averaging", "ema", "--averaging.decay", "0.999") == EMA(0.999)
    assert averaging("--averaging.start", "0.75", "--averaging=swa") == SWA(0.75)
    with pytest.raises(InputError, match=r"averaging.*did you mean 'ema'"):
        averaging("--averaging", "emma")
