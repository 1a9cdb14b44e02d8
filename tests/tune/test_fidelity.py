"""What a trial costs less than its recipe, and what it does not change."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from robustscale import recipes
from robustscale.attacks.apgd import APGD
from robustscale.attacks.base import Goal
from robustscale.attacks.carlini_wagner import CarliniWagner
from robustscale.attacks.fgsm import FGSM
from robustscale.attacks.pgd import PGD
from robustscale.attacks.restarts import Restarts
from robustscale.attacks.worst_of import WorstOf
from robustscale.config import components, override
from robustscale.engine.flops import flops_of, step_flops
from robustscale.errors import InputError
from robustscale.models.basic import Basic
from robustscale.models.conditional import Conditional
from robustscale.models.network import build
from robustscale.models.resnet import ResNet
from robustscale.models.resnet_cifar import ResNetCifar
from robustscale.models.slimmable import Slimmable
from robustscale.models.torchvision_zoo import TorchvisionZoo
from robustscale.models.vgg import VGG
from robustscale.models.wide_resnet import WideResNet
from robustscale.objectives.awp import Awp
from robustscale.objectives.fgsm_pgd import FgsmPgd
from robustscale.objectives.natural import Natural
from robustscale.objectives.pgd_at import PgdAt
from robustscale.objectives.trades import Trades
from robustscale.run import Evaluation, Run, drafting
from robustscale.threat import L2, Linf
from robustscale.types import Model, Objective
from tests.engine.small import SPEC, small_run
from tune.fidelity import Fidelity, trial_run


def run_of(objective: Objective) -> Run:
    return replace(Run(epochs=20), objective=objective)


def objective_at(steps: int, objective: Objective) -> Any:
    return Fidelity(attack_steps=steps).apply(run_of(objective)).objective


def test_by_default_a_trial_is_the_recipe() -> None:
    run = recipes.get("digits")
    assert Fidelity().apply(run) == run
    assert Fidelity().describe(run) == "the whole recipe"


def test_everything_at_once() -> None:
    run = replace(run_of(PgdAt(PGD(steps=7))), model=ResNet(width=1.0))
    fidelity = Fidelity(epochs=2, attack_steps=2, share=0.25, width=0.5)
    little = fidelity.apply(run)
    assert (little.epochs, little.data.share, little.model) == (2, 0.25, ResNet(width=0.5))
    assert little.objective == PgdAt(PGD(steps=2))
    changed = {"epochs": 20, "data": run.data, "model": run.model, "objective": run.objective}
    assert replace(little, **changed) == run
    expected = "2 of 20 epochs, pgd-2 instead of 7, 25 % of the training images, half the width"
    assert fidelity.describe(run) == expected


@pytest.mark.parametrize(
    "step_size, expected", [(None, None), (2 / 255, 7 / 255)], ids=["the attack's rule", "as far in all"]
)
def test_step_size_follows_the_steps(step_size: float | None, expected: float | None) -> None:
    attack = PGD(Linf(8 / 255), steps=7, step_size=step_size, start="gaussian")
    found = objective_at(2, Trades(attack)).attack
    assert found == replace(attack, steps=2, step_size=expected)


def test_attacks_are_found_wherever_they_are() -> None:
    parts = (PGD(steps=10), Restarts(PGD(L2(), steps=20, step_size=0.1), restarts=3), FGSM(), PGD(steps=2))
    awp = Awp(PgdAt(WorstOf(parts), beta=0.5), gamma=0.02)
    found = objective_at(4, awp)
    wanted = (PGD(steps=4), Restarts(PGD(L2(), steps=4, step_size=0.5), restarts=3), FGSM(), PGD(steps=2))
    assert found == Awp(PgdAt(WorstOf(wanted), beta=0.5), gamma=0.02)
    described = Fidelity(attack_steps=4).describe(run_of(awp))
    assert described == "pgd-4 instead of 10, pgd-4 instead of 20"
    assert objective_at(3, FgsmPgd()) == FgsmPgd(attack=PGD(steps=3))
    assert objective_at(3, Natural()) == Natural()


@pytest.mark.parametrize("name", components(Objective))
def test_every_objective_in_little(name: str) -> None:
    with drafting():
        run = override(run_of(Natural()), {"objective": {"name": name}})
        little = Fidelity(attack_steps=1).apply(run)
        cheaper = Fidelity(attack_steps=1).describe(run)
    assert (little.objective == run.objective) == (name in ("natural", "fgsm_regularization"))
    assert ("pgd-1 instead of" in cheaper) == (little.objective != run.objective)


def test_share_is_of_what_the_recipe_trains_on() -> None:
    run = override(Run(), {"data": {"share": 0.5}})
    assert Fidelity(share=0.5).apply(run).data.share == 0.25
    assert Fidelity(share=0.5).describe(run) == "25 % of the training images"


@pytest.mark.parametrize(
    "model, expected",
    [
        (ResNet(18, width=0.5), ResNet(18, width=0.25)),
        (VGG(width=1.0), VGG(width=0.5)),
        (WideResNet(28, 10), WideResNet(28, 5)),
        (ResNetCifar(20, base=16), ResNetCifar(20, base=8)),
        (Basic(32, 128), Basic(16, 64)),
        (Conditional(Slimmable(ResNet(34))), Conditional(Slimmable(ResNet(34, width=0.5)))),
    ],
    ids=lambda model: type(model).__name__,
)
def test_half_the_width(model: Model, expected: Model) -> None:
    found = Fidelity(width=0.5).apply(replace(Run(), model=model))
    assert found.model == expected
    assert Fidelity(width=0.5).describe(replace(Run(), model=model)) == "half the width"


def test_less_is_cheaper() -> None:
    run = small_run(objective={"attack": {"steps": 6}}, model={"name": "resnet_cifar", "depth": 8, "base": 8})

    def cost(fidelity: Fidelity) -> float:
        little = fidelity.apply(run)
        return step_flops(little, build(little.model, SPEC), SPEC)

    whole = cost(Fidelity())
    network = build(run.model, SPEC)
    forward = flops_of(lambda: network.eval()(network.normalize.mean.new_zeros(1, 1, 8, 8)))
    assert whole - cost(Fidelity(attack_steps=2)) == 4 * 2 * forward
    assert cost(Fidelity(width=0.5)) < 0.3 * whole


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"epochs": 0}, "epochs: 0 is below 1"),
        ({"attack_steps": 0}, "attack_steps: 0 is below 1"),
        ({"share": 0.0}, r"share: 0.0 is outside \(0, 1\]"),
        ({"width": 1.5}, r"width: 1.5 is outside \(0, 1\]"),
    ],
)
def test_fields_are_validated(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Fidelity(**changes)


def test_more_than_the_recipe_is_refused() -> None:
    with pytest.raises(InputError, match=r"fidelity\.epochs: 30 are more than the recipe's 20"):
        Fidelity(epochs=30).apply(run_of(PgdAt()))


@pytest.mark.parametrize(
    "model, width, message",
    [
        (TorchvisionZoo("resnet18"), 0.5, "torchvision_zoo has one width only"),
        (WideResNet(16, 1), 0.4, "0.4 times model wide_resnet's widen 1 gives 0"),
        (Conditional(WideResNet(16, 2)), 0.9, "0.9 times model wide_resnet's widen 2 gives 2"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_network_that_cannot_be_made_thinner_is_refused(model: Model, width: float, message: str) -> None:
    with pytest.raises(InputError, match=rf"fidelity\.width: {message}"):
        Fidelity(width=width).apply(replace(Run(), model=model))


def third(epochs: int) -> int:
    return max(1, epochs // 3)


def test_a_trial_is_judged_by_apgd_after_its_last_epoch() -> None:
    evaluation = Evaluation(
        attack=PGD(L2(0.5), steps=50), goal=Goal(loss="margin"), patience=3, report="best", batch_size=64
    )
    run = replace(run_of(PgdAt()), evaluation=evaluation)
    trial = trial_run(run, Fidelity(epochs=9, attack_steps=4), third, 5)
    assert trial.epochs == 9
    assert trial.objective == PgdAt(PGD(steps=4))
    judged = {"monitor": APGD(L2(0.5), steps=5), "every": 3, "report": "last", "patience": None}
    assert trial.evaluation == replace(evaluation, **judged)
    assert replace(trial, evaluation=evaluation, epochs=20, objective=PgdAt()) == run


def test_boundary_attacks_give_their_ball() -> None:
    evaluation = Evaluation(attack=CarliniWagner(L2(0.25)), goal=Goal(loss="margin"), monitor=PGD(L2(0.25)))
    trial = trial_run(replace(run_of(PgdAt()), evaluation=evaluation), Fidelity(), third)
    assert trial.evaluation.monitor == APGD(L2(0.25), steps=10)


def test_trials_that_could_not_be_compared_are_refused() -> None:
    run = run_of(PgdAt())
    with drafting():
        two_balls = replace(run, evaluation=Evaluation(attack=WorstOf((PGD(), PGD(L2())))))
        with pytest.raises(InputError, match=r"evaluation\.attack: has no single ball"):
            trial_run(two_balls, Fidelity(), third)
    with pytest.raises(InputError, match=r"data\.held_out: is 0"):
        trial_run(override(run, {"data": {"held_out": 0.0}}), Fidelity(), third)


@pytest.mark.parametrize(
    "objective, message",
    [
        (Natural(), r"attack_steps: 12, and natural .* \(none at all\)"),
        (PgdAt(), r"attack_steps: 12, and pgd_at .* \(10\)"),
    ],
    ids=["natural", "pgd_at"],
)
def test_attack_steps_that_change_nothing_are_refused(objective: Objective, message: str) -> None:
    with pytest.raises(InputError, match=message):
        trial_run(run_of(objective), Fidelity(attack_steps=12), third)
