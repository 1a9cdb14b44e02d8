from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from robustscale.engine.optim import SGD, AdamW
from robustscale.engine.schedule import Constant, Cosine, OneCycle, Piecewise, Step
from robustscale.errors import InputError
from robustscale.types import Optimizer, Schedule

PER_EPOCH = 7
TOTAL = 200 * PER_EPOCH


def factors(schedule: Schedule, total: int = TOTAL, per_epoch: int = PER_EPOCH) -> list[float]:
    return [schedule.factor(step, total, per_epoch) for step in range(total)]


def by_epoch(schedule: Schedule) -> list[float]:
    """The factor of each of 200 epochs, which does not change within one."""
    values = factors(schedule)
    epochs = [values[i : i + PER_EPOCH] for i in range(0, TOTAL, PER_EPOCH)]
    assert all(len(set(epoch)) == 1 for epoch in epochs)
    return [epoch[0] for epoch in epochs]


# --- Schedules


def test_constant() -> None:
    assert set(factors(Constant())) == {1.0}


def test_piecewise_drops_at_epochs_100_and_150_of_200() -> None:
    expected = [1.0] * 100 + [0.1] * 50 + [0.01] * 50
    assert by_epoch(Piecewise()) == pytest.approx(expected, rel=1e-15)


def test_piecewise_takes_its_milestones_and_gamma() -> None:
    expected = [1.0] * 20 + [0.5] * 140 + [0.25] * 20 + [0.125] * 20
    assert by_epoch(Piecewise(milestones=(0.1, 0.8, 0.9), gamma=0.5)) == expected
    assert set(factors(Piecewise(milestones=()))) == {1.0}


def test_step_is_a_tenth_every_30_epochs() -> None:
    expected = [0.1 ** (epoch // 30) for epoch in range(200)]
    assert by_epoch(Step()) == pytest.approx(expected, rel=1e-15)
    assert by_epoch(Step(every=1, gamma=0.5))[:4] == [1.0, 0.5, 0.25, 0.125]


def test_cosine_against_the_closed_form_and_torch() -> None:
    values = factors(Cosine(), total=101, per_epoch=1)
    assert values[0] == 1.0
    assert values == pytest.approx([(1 + math.cos(math.pi * t / 101)) / 2 for t in range(101)], abs=1e-15)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=101)
    for value in values:
        assert value == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        theirs.step()


def test_cosine_ends_at_its_floor() -> None:
    assert Cosine().factor(TOTAL, TOTAL, PER_EPOCH) == pytest.approx(0.0, abs=1e-15)
    assert Cosine(floor=0.25).factor(TOTAL, TOTAL, PER_EPOCH) == pytest.approx(0.25)
    assert Cosine(floor=0.25).factor(TOTAL // 2, TOTAL, PER_EPOCH) == pytest.approx(0.625)
    assert set(factors(Cosine(floor=1.0))) == {1.0}
    assert 0 < factors(Cosine())[-1] < 1e-5


@pytest.mark.parametrize("schedule", [Constant(warmup_epochs=5), Piecewise(warmup_epochs=5), Step(warmup_epochs=5)])
def test_warm_up_is_linear_and_reaches_the_base_rate_with_its_last_step(schedule: Schedule) -> None:
    warm = 5 * PER_EPOCH
    values = factors(schedule)
    assert values[:warm] == pytest.approx([(step + 1) / warm for step in range(warm)])
    assert values[warm - 1] == values[warm] == 1.0


def test_cosine_decays_over_what_follows_the_warm_up() -> None:
    warm = 5 * PER_EPOCH
    values = factors(Cosine(warmup_epochs=5))
    assert values[:warm] == pytest.approx([(step + 1) / warm for step in range(warm)])
    assert values[warm:] == pytest.approx(factors(Cosine(), total=TOTAL - warm))


def test_a_part_of_an_epoch_may_be_the_warm_up() -> None:
    assert factors(Constant(warmup_epochs=0.5), total=5, per_epoch=8) == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_a_warm_up_longer_than_the_run_does_not_fail() -> None:
    values = factors(Cosine(warmup_epochs=10), total=20, per_epoch=4)
    assert values == pytest.approx([(step + 1) / 40 for step in range(20)])


def test_one_cycle_rises_to_its_peak_and_falls_to_zero() -> None:
    values = factors(OneCycle(), total=99, per_epoch=1)
    assert values.index(max(values)) == 39 and values[39] == pytest.approx(1.0)
    assert values[:40] == pytest.approx([(step + 1) / 40 for step in range(40)])
    assert values[39:] == pytest.approx([(99 - step) / 60 for step in range(39, 99)])
    assert 0 < values[-1] < 0.02, "no step is wasted on a rate of zero"
    assert factors(OneCycle(rise=0.5), total=1, per_epoch=1) == [1.0]


DECAYING: list[Schedule] = [Constant(), Piecewise(), Step(), Cosine(), Cosine(floor=0.1)]


@pytest.mark.parametrize("schedule", DECAYING, ids=str)
@pytest.mark.parametrize("total", [1, 2, 3, 100])
def test_decay_never_rises_and_stays_within_the_base_rate(schedule: Schedule, total: int) -> None:
    values = factors(schedule, total, per_epoch=2)
    assert values == sorted(values, reverse=True)
    assert values[0] == 1.0 and values[-1] > 0


@pytest.mark.parametrize("schedule", [*DECAYING, OneCycle(), Cosine(warmup_epochs=3)], ids=str)
def test_the_factor_depends_on_nothing_but_the_step(schedule: Schedule) -> None:
    forth = factors(schedule)
    back = [schedule.factor(step, TOTAL, PER_EPOCH) for step in reversed(range(TOTAL))]
    assert forth == back[::-1]


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: Constant(warmup_epochs=-1), "warmup_epochs: -1 is negative"),
        (lambda: Piecewise(milestones=(0.75, 0.5)), "milestones: .* must rise"),
        (lambda: Piecewise(milestones=(100, 150)), r"milestones: .* within \(0, 1\)"),
        (lambda: Piecewise(gamma=0), "gamma: 0 is outside"),
        (lambda: Piecewise(gamma=10), "gamma: 10 is outside"),
        (lambda: Piecewise(warmup_epochs=-1), "warmup_epochs: -1 is negative"),
        (lambda: Step(every=0), "every: 0 is below 1"),
        (lambda: Step(gamma=1.5), r"gamma: 1\.5 is outside"),
        (lambda: Step(warmup_epochs=-1), "warmup_epochs: -1 is negative"),
        (lambda: Cosine(floor=-0.1), r"floor: -0\.1 is outside"),
        (lambda: Cosine(floor=2), "floor: 2 is outside"),
        (lambda: Cosine(warmup_epochs=-1), "warmup_epochs: -1 is negative"),
        (lambda: OneCycle(rise=0), "rise: 0 is outside"),
        (lambda: OneCycle(rise=1), "rise: 1 is outside"),
        (lambda: SGD(lr=0), "lr: 0 is not positive"),
        (lambda: SGD(momentum=1), r"momentum: 1 is outside \[0, 1\)"),
        (lambda: SGD(weight_decay=-1), "weight_decay: -1 is negative"),
        (lambda: SGD(momentum=0, nesterov=True), "nesterov: needs momentum above 0"),
        (lambda: AdamW(lr=-1), "lr: -1 is not positive"),
        (lambda: AdamW(betas=(0.9, 1.0)), "betas: .* is outside"),
        (lambda: AdamW(eps=0), "eps: 0 is not positive"),
        (lambda: AdamW(weight_decay=-1), "weight_decay: -1 is negative"),
    ],
)
def test_bad_values_are_refused_with_name_value_and_remedy(build: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        build()
    assert "\n" not in str(caught.value)


# --- Optimizers


def descend(config: Optimizer, grads: list[float], w: float = 1.0) -> list[float]:
    parameter = nn.Parameter(torch.tensor(w, dtype=torch.float64))
    optimizer, path = config.build([parameter]), []
    for grad in grads:
        parameter.grad = torch.tensor(grad, dtype=torch.float64)
        optimizer.step()
        path.append(parameter.item())
    return path


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_against_its_equation(nesterov: bool) -> None:
    lr, mu, decay, grads = 0.1, 0.9, 5e-4, [0.3, -0.2, 0.5, 0.1]
    w, v, expected = 1.0, 0.0, []
    for grad in grads:
        g = grad + decay * w
        v = mu * v + g
        w -= lr * (g + mu * v if nesterov else v)
        expected.append(w)
    assert descend(SGD(nesterov=nesterov), grads) == pytest.approx(expected, rel=1e-14)


def test_adamw_against_its_equation() -> None:
    lr, (b1, b2), eps, decay, grads = 1e-3, (0.9, 0.999), 1e-8, 0.05, [0.3, -0.2, 0.5, 0.1]
    w, m, v, expected = 1.0, 0.0, 0.0, []
    for t, g in enumerate(grads, 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        w -= lr * decay * w + lr * (m / (1 - b1**t)) / (math.sqrt(v / (1 - b2**t)) + eps)
        expected.append(w)
    assert descend(AdamW(), grads) == pytest.approx(expected, rel=1e-12)


def test_defaults_are_the_papers() -> None:
    (group,) = SGD().build([nn.Parameter(torch.zeros(1))]).param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"], group["nesterov"]) == (0.1, 0.9, 5e-4, False)
    (group,) = AdamW().build([nn.Parameter(torch.zeros(1))]).param_groups
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (1e-3, (0.9, 0.999), 1e-8, 0.05)
