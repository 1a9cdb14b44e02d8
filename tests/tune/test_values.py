from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from robustscale.attacks.apgd import APGD
from robustscale.attacks.base import attacks_in
from robustscale.attacks.eot import EOT
from robustscale.attacks.fgsm import FGSM
from robustscale.attacks.mixture import Mixture
from robustscale.attacks.pgd import PGD
from robustscale.attacks.random_of import RandomOf
from robustscale.attacks.worst_of import WorstOf
from robustscale.config import components, override
from robustscale.engine.optim import SGD
from robustscale.errors import InputError
from robustscale.models.conditional import Conditional
from robustscale.models.resnet import ResNet
from robustscale.models.slimmable import Slimmable
from robustscale.objectives.awp import Awp
from robustscale.objectives.cw_pgd import CwPgd
from robustscale.objectives.fgsm_pgd import FgsmPgd
from robustscale.objectives.mat_max import MatMax
from robustscale.objectives.mat_rand import MatRand
from robustscale.objectives.natural import Natural
from robustscale.objectives.pgd_at import PgdAt
from robustscale.objectives.trades import Trades
from robustscale.objectives.weak_to_strong import WeakToStrong
from robustscale.run import Data, Evaluation, Run
from robustscale.threat import L2, Linf
from robustscale.types import Objective
from tune.values import at, plain, put

ATTACK = PGD(Linf(0.1), steps=7, step_size=0.03)
RECIPE = Run(
    objective=PgdAt(ATTACK), evaluation=Evaluation(attack=PGD(Linf(0.1), steps=20), monitor=PGD(Linf(0.1), steps=9))
)


def objective(run: Run, **values: Any) -> Any:
    return put(run, {path.replace("__", "."): value for path, value in values.items()}).objective


def of(attacked: Objective) -> Run:
    return dataclasses.replace(RECIPE, objective=attacked)


def test_a_value_is_put_in_its_place_and_all_else_stays() -> None:
    run = put(RECIPE, {"objective.beta": 0.25, "optimizer.lr": 0.3, "model.width": 0.5, "batch_size": 64})
    assert run == override(
        RECIPE, {"objective": {"beta": 0.25}, "optimizer": {"lr": 0.3}, "model": {"width": 0.5}, "batch_size": 64}
    )


def test_nothing_changes_nothing() -> None:
    assert put(RECIPE, {}) == RECIPE


@pytest.mark.parametrize("name", ["trades", "mart", "rat", "gairat", "cw_pgd", "adversarial_regularization", "triplet"])
def test_another_objective_keeps_threat_steps_and_step_size(name: str) -> None:
    attack = objective(RECIPE, objective=name).attack
    assert (attack.threat, attack.steps, attack.step_size) == (Linf(0.1), 7, 0.03)


def test_the_start_belongs_to_the_method() -> None:
    assert objective(RECIPE, objective="trades").attack == dataclasses.replace(ATTACK, start="gaussian")
    assert objective(of(Trades(Trades().attack)), objective="pgd_at").attack.start == "uniform"


def test_the_objective_of_the_recipe_stays_as_it_is() -> None:
    mine = Trades(dataclasses.replace(ATTACK, start="uniform"), beta=2, batchnorm="train")
    assert objective(of(mine), objective="trades") == mine


@pytest.mark.parametrize("attack", [APGD(Linf(0.1), steps=5), EOT(ATTACK, draws=2), WorstOf((ATTACK, FGSM(Linf(0.1))))])
def test_another_kind_of_attack_is_kept_too(attack: Any) -> None:
    assert objective(of(PgdAt(attack)), objective="mart").attack == attack


def test_an_attack_that_the_objective_is_about_stays() -> None:
    """FGSM's is one step, MAT's are two norms: only the ball is the recipe's, and the budget of what is PGD there."""
    assert objective(RECIPE, objective="fgsm_regularization").attack == FGSM(Linf(0.1))
    mixed = objective(RECIPE, objective="fgsm_pgd")
    assert (mixed.fgsm, mixed.attack) == (FGSM(Linf(0.1)), ATTACK)
    mat = objective(RECIPE, objective="mat_max").attack
    # The step size of one norm says nothing of the other's.
    assert mat == WorstOf((ATTACK, PGD(L2(128 / 255), steps=7)))


def test_two_norms_keep_both_their_balls() -> None:
    attacks = (PGD(Linf(0.1), steps=7), PGD(L2(1.5), steps=5, step_size=0.4))
    run = of(MatRand(RandomOf(attacks)))
    assert objective(run, objective="mat_max").attack == WorstOf(attacks)
    assert objective(run, objective="trades").attack == dataclasses.replace(attacks[0], start="gaussian")


def test_of_two_attacks_the_one_that_is_named_so_is_kept() -> None:
    assert objective(of(FgsmPgd(fgsm=FGSM(Linf(0.1)), attack=ATTACK)), objective="cw_pgd").attack == ATTACK


def test_an_objective_inside_another_is_attacked_as_the_recipe() -> None:
    assert objective(RECIPE, objective="awp").objective == PgdAt(ATTACK)
    assert objective(of(Awp(PgdAt(ATTACK))), objective="cw_pgd").attack == ATTACK
    inner = objective(of(Awp(PgdAt(ATTACK), gamma=0.005)), objective__objective="trades")
    assert inner == Awp(Trades(dataclasses.replace(ATTACK, start="gaussian")), gamma=0.005)


def test_a_recipe_without_attack_gives_the_ball_it_is_watched_in() -> None:
    assert objective(of(Natural()), objective="pgd_at").attack == PGD(Linf(0.1), steps=9)
    assert objective(of(Natural()), objective="fgsm_regularization").attack == FGSM(Linf(0.1))
    assert objective(RECIPE, objective="natural") == Natural()


@pytest.mark.parametrize("name", components(Objective))
def test_every_objective_can_take_the_place_of_another(name: str) -> None:
    run = dataclasses.replace(RECIPE, data=Data(unlabelled="more.beton"), model=Conditional(Slimmable(ResNet())))
    drawn = put(run, {"objective": name})

    def threats(part: Any) -> set[Any]:
        inner = set().union(*(threats(attack) for _field, attack in attacks_in(part)))
        return inner | ({part.threat} if getattr(part, "threat", None) is not None else set())

    of_drawn = threats(drawn.objective) | threats(getattr(drawn.objective, "objective", Natural()))
    assert {threat for threat in of_drawn if isinstance(threat, Linf)} <= {Linf(0.1)}
    assert (drawn.evaluation, drawn.data, drawn.model) == (run.evaluation, run.data, run.model)


def test_the_training_ball_takes_the_step_size_along_and_leaves_the_judges_alone() -> None:
    run = put(RECIPE, {"objective.attack.threat.eps": 0.05})
    assert run.objective == PgdAt(PGD(Linf(0.05), steps=7, step_size=0.015))
    assert run.evaluation == RECIPE.evaluation


def test_stages_have_one_ball() -> None:
    stages = WeakToStrong((Natural(), PgdAt(FGSM(Linf(0.1))), PgdAt(ATTACK)), (0.2, 0.5))
    small = (Natural(), PgdAt(FGSM(Linf(0.05))), PgdAt(PGD(Linf(0.05), steps=7, step_size=0.015)))
    assert put(of(stages), {"objective.stages.2.attack.threat.eps": 0.05}).objective == WeakToStrong(small, (0.2, 0.5))
    assert objective(of(stages), objective="trades").attack == dataclasses.replace(ATTACK, start="gaussian")


def test_a_step_size_by_its_rule_stays_one() -> None:
    run = put(of(PgdAt(PGD(Linf(0.1)))), {"objective.attack.threat.eps": 0.05})
    assert run.objective == PgdAt(PGD(Linf(0.05)))


def test_a_step_size_that_is_put_as_well_stays() -> None:
    values = {"objective.attack.step_size": 0.02, "objective.attack.threat.eps": 0.05}
    assert put(RECIPE, values).objective == PgdAt(PGD(Linf(0.05), steps=7, step_size=0.02))


def test_every_attack_of_the_objective_takes_the_ball() -> None:
    eps = {"objective__attack__threat__eps": 0.05}
    moved = PGD(Linf(0.05), steps=7, step_size=0.015)
    assert objective(of(FgsmPgd(fgsm=FGSM(Linf(0.1)), attack=ATTACK)), **eps) == FgsmPgd(
        fgsm=FGSM(Linf(0.05)), attack=moved
    )
    assert objective(of(PgdAt(Mixture((FGSM(Linf(0.1)), ATTACK)))), **eps).attack == Mixture((FGSM(Linf(0.05)), moved))
    assert objective(of(PgdAt(EOT(ATTACK))), **eps).attack == EOT(moved)
    assert objective(of(Awp(PgdAt(ATTACK))), objective__objective__attack__threat__eps=0.05) == Awp(PgdAt(moved))


def test_the_ball_of_one_of_several_is_its_own() -> None:
    both = RandomOf((ATTACK, PGD(L2(1.0), step_size=0.2)))
    found = objective(of(PgdAt(both)), objective__attack__attacks__1__threat__eps=0.5)
    assert found.attack == RandomOf((ATTACK, PGD(L2(0.5), step_size=0.1)))
    same = objective(of(PgdAt(WorstOf((ATTACK, ATTACK)))), objective__attack__attacks__1__threat__eps=0.05)
    assert same.attack == WorstOf((ATTACK, PGD(Linf(0.05), steps=7, step_size=0.015)))
    fgsm_pgd = FgsmPgd(fgsm=FGSM(Linf(0.1)), attack=ATTACK)
    two = objective(of(fgsm_pgd), objective__fgsm__threat__eps=0.2, objective__attack__threat__eps=0.05)
    assert (two.fgsm.threat, two.attack.threat) == (Linf(0.2), Linf(0.05))


def test_a_ball_goes_with_the_objective_that_is_put_too() -> None:
    run = put(RECIPE, {"objective.attack.threat.eps": 0.05, "objective": "trades"})
    assert run.objective == Trades(PGD(Linf(0.05), steps=7, step_size=0.015, start="gaussian"))


def test_two_norms_have_no_ball_in_common() -> None:
    with pytest.raises(InputError, match=r"^objective\.attack\.threat\.eps: 'threat' is not known; choose one of"):
        put(of(MatMax()), {"objective.attack.threat.eps": 0.05})


@pytest.mark.parametrize(
    "shares, number, share, found",
    [
        (None, 0, 0.25, (0.25, 0.75)),
        ((0.5, 0.5), 1, 0.2, (0.8, 0.2)),
        ((1.0, 0.0), 0, 0.5, (0.5, 0.5)),
        ((0.5, 0.3, 0.2), 0, 0.0, (0.0, 0.6, 0.4)),
        ((0.5, 0.3, 0.2), 2, 1.0, (0.0, 0.0, 1.0)),
    ],
)
def test_one_share_is_put_and_the_others_keep_their_proportions(
    shares: Any, number: int, share: float, found: tuple[float, ...]
) -> None:
    attacks = (FGSM(Linf(0.1)), ATTACK, APGD(Linf(0.1)))[: len(found)]
    drawn = objective(of(PgdAt(Mixture(attacks, shares))), **{f"objective__attack__shares__{number}": share})
    assert drawn.attack.shares == pytest.approx(found)


def test_weights_need_not_add_up_before() -> None:
    run = of(PgdAt(RandomOf((FGSM(Linf(0.1)), ATTACK, ATTACK), weights=(5, 3, 1))))
    assert objective(run, objective__attack__weights__0=0.2).attack.weights == pytest.approx((0.2, 0.6, 0.2))


def test_fields_that_only_fit_each_other_are_put_together() -> None:
    run = dataclasses.replace(RECIPE, optimizer=SGD(momentum=0.0))
    assert put(run, {"optimizer.nesterov": True, "optimizer.momentum": 0.9}).optimizer == SGD(nesterov=True)


def test_a_name_before_a_field_says_whose_it_is() -> None:
    assert put(RECIPE, {"objective": "trades", "objective.trades.beta": 2.0}).objective.beta == 2  # type: ignore[attr-defined]
    run = put(of(Trades(ATTACK)), {"objective.trades.attack.pgd.threat.eps": 0.05})
    assert run.objective == Trades(PGD(Linf(0.05), steps=7, step_size=0.015))
    assert plain(RECIPE, "objective.pgd_at.attack.threat.linf.eps") == "objective.attack.threat.eps"
    with pytest.raises(InputError, match=r"^objective\.trades\.beta: 'trades' is not known"):
        put(RECIPE, {"objective.trades.beta": 2.0})


@pytest.mark.parametrize(
    "path, message",
    [
        ("objective.betta", "objective.betta: 'betta' is not known; did you mean 'beta'?"),
        ("optimiser.lr", "optimiser.lr: 'optimiser' is not known; did you mean 'optimizer'?"),
        ("optimizer.lr.x", "optimizer.lr.x: optimizer.lr is a single value; search that, or leave it out"),
        (
            "schedule.milestones.0",
            "schedule.milestones.0: schedule.milestones is a single value; search that, or leave",
        ),
        ("objective.attack.attacks.0", "objective.attack.attacks.0: 'attacks' is not known; choose one of threat"),
    ],
)
def test_a_path_that_leads_nowhere(path: str, message: str) -> None:
    for refused in (lambda: at(RECIPE, path), lambda: put(RECIPE, {path: 1})):
        with pytest.raises(InputError) as error:
            refused()
        assert str(error.value).startswith(message)


def test_what_is_no_valid_run_is_refused_unless_it_is_a_draft() -> None:
    with pytest.raises(InputError, match="the network is not told its λ"):
        put(RECIPE, {"objective": "oat"})
    assert type(put(RECIPE, {"objective": "oat"}, draft=True).objective).__name__ == "Oat"
    assert CwPgd().share == 0.5 and put(of(CwPgd(attack=ATTACK)), {"objective.share": 0.25}).objective.share == 0.25  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=r"objective\.share: 1\.5 is outside"):
        put(of(CwPgd(attack=ATTACK)), {"objective.share": 1.5})
