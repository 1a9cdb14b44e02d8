from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from robustscale.attacks.fgsm import FGSM
from robustscale.attacks.pgd import PGD
from robustscale.cli import parse_run
from robustscale.config import decode, encode, override
from robustscale.engine.flops import step_flops
from robustscale.errors import InputError
from robustscale.models.network import build
from robustscale.models.resnet_cifar import ResNetCifar
from robustscale.objectives.natural import Natural
from robustscale.objectives.oat import Oat
from robustscale.objectives.pgd_at import PgdAt
from robustscale.objectives.trades import Trades
from robustscale.objectives.weak_to_strong import WeakToStrong
from robustscale.run import Run
from robustscale.testing.contracts import AT, TinyNet, random_batch
from robustscale.threat import Linf
from robustscale.types import DataSpec, Objective

STAGES = (Natural(), PgdAt(FGSM(Linf(0.1), random_start=True)), Trades(PGD(Linf(0.1), steps=2)))
THREE = WeakToStrong(STAGES, until=(0.2, 0.55))


@pytest.mark.parametrize("step, stage", [(0, 0), (1, 0), (2, 1), (5, 1), (6, 2), (9, 2)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_value(seed: int, step: int, stage: int) -> None:
    """Of 10 steps: natural for 2, FGSM-RS up to round(5.5) = 6, then TRADES; each with its own formula and metrics."""
    batch, at = random_batch(6, seed, torch.float64), AT._replace(step=step, total_steps=10)
    found = THREE(TinyNet(seed).double().train(), batch, at)
    expected = STAGES[stage](TinyNet(seed).double().train(), batch, at)
    torch.testing.assert_close(found.value, expected.value, rtol=0, atol=0)
    assert found.metrics.keys() == expected.metrics.keys()


def test_takes_the_stages_forwards(forwards: Callable[[Objective], int]) -> None:
    for until, expected in ((0.3, 5 + 1), (0.4, 1 + 1)):  # the fourth of 10 steps
        objective = WeakToStrong((PgdAt(PGD(steps=1)), PgdAt(PGD(steps=5))), (until,))
        assert forwards(objective) == expected


def test_its_cost_is_its_stages_by_their_shares() -> None:
    shares, stages = zip(*THREE.outcomes(), strict=True)
    assert stages == STAGES
    assert shares == pytest.approx((0.2, 0.35, 0.45))


def test_its_stages_are_set_by_their_number() -> None:
    run = override(Run(), {"objective": {"name": "weak_to_strong", "stages": {"1": {"attack": {"steps": 5}}}}})
    assert run.objective == WeakToStrong((PgdAt(FGSM(random_start=True)), PgdAt(PGD(steps=5))))
    assert decode(Run, encode(run)) == run


def test_a_stage_is_added_on_the_command_line() -> None:
    options = "--objective weak_to_strong --objective.stages.0 natural --objective.stages.2 trades"
    run = parse_run([*options.split(), "--objective.until", "0.2", "0.5"], "prog", "", Run())
    assert run.objective == WeakToStrong((Natural(), PgdAt(PGD(steps=3)), Trades()), (0.2, 0.5))
    with pytest.raises(InputError, match=r"^objective\.until: 1 of them for 3 stages"):
        parse_run(options.split(), "prog", "", Run())


def test_each_stage_may_refuse_the_run() -> None:
    with pytest.raises(InputError, match=r"^objective\.stages\.1\.lambdas: the network is not told its λ"):
        Run(objective=WeakToStrong((Natural(), Oat()), (0.5,)))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: WeakToStrong((), ()), "stages: is empty"),
        (lambda: Run(objective=WeakToStrong(until=())), "objective.until: 0 of them for 2 stages"),
        (lambda: WeakToStrong(STAGES, (0.5, 0.5)), r"until: \(0.5, 0.5\) must rise"),
        (lambda: WeakToStrong(until=(1.0,)), r"until: \(1.0,\) must rise"),
    ],
)
def test_refuses(make: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        make()


def test_the_usual_shares_cost_under_two_thirds_of_pgd_3() -> None:
    """As the docstring says: of 2 and 4 forward and backward passes an image."""
    run, spec = Run(objective=WeakToStrong(), model=ResNetCifar(8, base=4)), DataSpec(1, 8, 8, 10, (0.3,), (0.37,))
    network = build(run.model, spec)
    strong = dataclasses.replace(run, objective=PgdAt(PGD(steps=3)))
    assert 0.6 < step_flops(run, network, spec) / step_flops(strong, network, spec) < 2 / 3
