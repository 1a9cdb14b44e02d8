from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st

from robustscale import recipes
from robustscale.attacks.mixture import Mixture
from robustscale.attacks.pgd import PGD
from robustscale.config import components, override
from robustscale.errors import InputError
from robustscale.objectives.pgd_at import PgdAt
from robustscale.objectives.trades import Trades
from robustscale.run import Run
from robustscale.threat import L2, Linf
from robustscale.types import Objective
from tune.knobs import KNOBS
from tune.ranges import Choice, Integer, Log, Range, Uniform
from tune.spaces import FIXED, Infeasible, Space, difference
from tune.values import put

DIGITS = recipes.get("digits")
TRADES = override(DIGITS, {"objective": "trades"})
NEEDS: dict[str, dict[str, Any]] = {
    "oat": {"model": {"name": "conditional", "model": {"name": "resnet_cifar"}}},
    "oats": {"model": {"name": "conditional", "model": {"name": "slimmable", "model": {"name": "resnet"}}}},
    "rst": {"data": {"unlabelled": "more.beton"}},
    "rst_pgd_at": {"data": {"unlabelled": "more.beton"}},
}


def space(*entries: str) -> Space:
    return Space({}).narrowed(entries)


def with_objective(name: str) -> Run:
    """The digits, with what the objective can't do without."""
    return override(DIGITS, {**NEEDS.get(name, {}), "objective": name})


class Trial:
    """Draws what it is told to, if that is in the range; of other dimensions the low end, or the first choice."""

    def __init__(self, **told: Any) -> None:
        self.told = {path.replace("__", "."): value for path, value in told.items()}
        self.asked: list[str] = []

    def _draw(self, path: str, otherwise: Any) -> Any:
        self.asked.append(path)
        return self.told.get(path, otherwise)

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        value: float = self._draw(name, low)
        assert low <= value <= high
        return value

    def suggest_int(self, name: str, low: int, high: int) -> int:
        value: int = self._draw(name, low)
        assert low <= value <= high and isinstance(value, int)
        return value

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        value = self._draw(name, choices[0])
        assert value in choices
        return value


def refusal(entries: Sequence[str], run: Run = DIGITS) -> str:
    with pytest.raises(InputError) as refused:
        space(*entries).require(run)
    assert "\n" not in str(refused.value)
    return str(refused.value)


# What a recipe searches.


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_has_a_space(name: str) -> None:
    run = recipes.get(name)
    default = Space.of(run)
    default.require(run)
    assert "optimizer.lr" in default.dimensions
    assert sum(path.endswith("attack.threat.eps") for path in default.dimensions) == 1
    assert Space.from_text(default.as_text()) == default
    assert len(default.dimensions) == 2 + (run.objective.__class__.__name__ != "Oat")


@pytest.mark.parametrize("name", components(Objective))
def test_every_objective_has_a_space(name: str) -> None:
    run = with_objective(name)
    default = Space.of(run)
    default.require(run)
    paths = set(default.dimensions) - {"optimizer.lr"}
    assert bool(paths) == (name != "natural")
    if name in KNOBS:
        assert f"objective.{KNOBS[name][0]}" in paths


def test_every_knob_is_of_an_objective_that_there_is() -> None:
    assert set(KNOBS) <= set(components(Objective))


def test_a_default_space_is_relative_to_the_recipe() -> None:
    run = put(recipes.get("cifar10_trades"), {"objective.beta": 20.0})
    assert Space.of(run).as_text() == {
        "objective.beta": "log(0.5,20)",
        "objective.attack.threat.eps": "uniform(0.00775,0.0465)",
        "optimizer.lr": "log(0.025,0.4)",
    }
    assert Space.of(recipes.get("cifar10")).as_text()["objective.attack.threat.eps"] == "uniform(2/255,12/255)"


def test_a_ball_is_no_larger_than_the_box_and_none_has_no_range() -> None:
    assert Space.of(put(DIGITS, {"objective.attack.threat.eps": 0.8})).as_text()["objective.attack.threat.eps"] == (
        "uniform(0.2,1)"
    )
    nothing = put(DIGITS, {"objective.attack.threat.eps": 0.0})
    assert set(Space.of(nothing).dimensions) == {"objective.beta", "optimizer.lr"}


def test_a_mixture_searches_the_share_of_its_first_attack_and_the_common_ball() -> None:
    attack = Mixture((PGD(Linf(0.1), steps=2), PGD(Linf(0.1))))
    run = dataclasses.replace(DIGITS, objective=PgdAt(attack))
    assert {"objective.attack.shares.0", "objective.attack.threat.eps"} <= set(Space.of(run).dimensions)
    Space.of(run).require(run)
    two_norms = override(DIGITS, {"objective": "mat_rand"})
    assert set(Space.of(two_norms).dimensions) == {"objective.beta", "objective.attack.weights.0", "optimizer.lr"}


def test_an_objective_around_another_searches_both() -> None:
    run = override(DIGITS, {"objective": {"name": "awp", "objective": "trades"}})
    assert list(Space.of(run).dimensions) == [
        "objective.gamma",
        "objective.objective.beta",
        "objective.objective.attack.threat.eps",
        "optimizer.lr",
    ]


# What a person types.


def test_entries_replace_add_and_remove() -> None:
    narrowed = Space.of(TRADES).narrowed(
        ["objective.beta=log(0.1,10)", "--model.base=int(4,16)", "optimizer.lr=recipe", "log-every=int(1,2)"]
    )
    assert narrowed.dimensions == {
        "objective.beta": Log(0.1, 10),
        "objective.attack.threat.eps": Uniform(0.025, 0.15),
        "model.base": Integer(4, 16),
        "log_every": Integer(1, 2),
    }


def test_a_choice_of_objectives_brings_the_usual_range_of_each() -> None:
    narrowed = Space.of(DIGITS).narrowed(["objective=choice(trades,mart,pgd_at,natural)"])
    assert narrowed.as_text() == {
        "objective.attack.threat.eps": "uniform(0.025,0.15)",
        "optimizer.lr": "log(0.075,1.2)",
        "objective.trades.beta": "log(0.5,12)",
        "objective.mart.lam": "log(0.5,12)",
        "objective.pgd_at.beta": "uniform(0,1)",
        "objective": "choice(trades,mart,pgd_at,natural)",
    }
    narrowed.require(DIGITS)
    typed = ["objective=choice(trades,mart)", "objective.mart.lam=recipe", "objective.beta=log(1,2)"]
    assert set(Space.of(DIGITS).narrowed(typed).dimensions) == {
        "objective",
        "objective.beta",
        "objective.attack.threat.eps",
        "optimizer.lr",
    }


def test_the_same_entries_once_more_change_nothing() -> None:
    entries = ["objective=choice(trades,mart)", "objective.trades.beta=log(1,2)", "optimizer.lr=log(0.1,1)"]
    once = Space.of(DIGITS).narrowed(entries)
    assert once.narrowed(entries) == once


@given(
    st.dictionaries(
        st.sampled_from(["objective.beta", "optimizer.lr", "model.depth", "objective"]),
        st.sampled_from([Uniform(0.1, 1 / 3), Log(1 / 255, 0.7), Integer(-3, 8), Choice((None, "trades", 0.25, True))]),
    )
)
def test_a_space_reads_back_from_its_text(dimensions: Mapping[str, Range]) -> None:
    assert Space.from_text(Space(dimensions).as_text()) == Space(dimensions)


def test_the_difference_of_two_spaces() -> None:
    before = space("objective.beta=log(0.5,12)", "optimizer.lr=log(0.1,1)")
    now = space("optimizer.lr=log(0.1,1)", "objective.beta=log(0.1,10)", "model.base=int(4,16)")
    assert difference(before, now).splitlines() == [
        "                  there        here",
        "* objective.beta  log(0.5,12)  log(0.1,10)",
        "  optimizer.lr    log(0.1,1)   log(0.1,1)",
        "* model.base      -            int(4,16)",
    ]


# What a trial draws.


def test_what_is_drawn_is_put_in_the_run() -> None:
    both = space("optimizer.lr=log(0.01,1)", "objective.attack.threat.eps=uniform(0,0.2)", "clip=choice(null,1)")
    values, run = both.draw(DIGITS, Trial(optimizer__lr=0.5, objective__attack__threat__eps=0.05, clip=1))
    assert values == {"optimizer.lr": 0.5, "objective.attack.threat.eps": 0.05, "clip": 1}
    assert run == put(DIGITS, values)
    assert (run.evaluation, run.optimizer.lr, run.clip) == (DIGITS.evaluation, 0.5, 1)  # type: ignore[attr-defined]


def test_a_dimension_of_another_objective_is_left_out() -> None:
    searched = space("objective=choice(trades,mart)", "objective.beta=log(1,2)", "objective.mart.lam=log(1,2)")
    trial = Trial(objective="mart", objective__mart__lam=1.5)
    values, run = searched.draw(DIGITS, trial)
    assert values == {"objective": "mart", "objective.mart.lam": 1.5} and trial.asked == list(values)
    assert run.objective.lam == 1.5  # type: ignore[attr-defined]
    assert run.objective.attack.threat == Linf(0.1) and run.objective.attack.steps == 7  # type: ignore[attr-defined]
    assert set(searched.draw(DIGITS, Trial())[0]) == {"objective", "objective.beta"}


def test_a_range_beyond_what_a_field_allows_is_of_another_objective() -> None:
    """pgd_at's beta is a share; a range of beta beyond 1 means the one of trades."""
    searched = space("objective=choice(pgd_at,trades)", "objective.beta=log(0.5,12)")
    searched.require(DIGITS)
    assert searched.draw(DIGITS, Trial(objective="pgd_at")) == ({"objective": "pgd_at"}, DIGITS)
    assert set(searched.draw(DIGITS, Trial(objective="trades"))[0]) == {"objective", "objective.beta"}


def test_names_are_drawn_from_the_outermost_in() -> None:
    searched = space(
        "objective.attack.start=choice(uniform,gaussian)",
        "objective.attack=choice(pgd,apgd)",
        "objective=choice(pgd_at,natural)",
    )
    trial = Trial()
    searched.draw(DIGITS, trial)
    assert trial.asked[:3] == ["objective", "objective.attack", "objective.attack.start"]
    assert set(searched.draw(DIGITS, Trial(objective__attack="apgd"))[0]) == {
        "objective",
        "objective.attack",
        "objective.pgd_at.beta",
    }
    assert searched.draw(DIGITS, Trial(objective="natural"))[0] == {"objective": "natural"}


def test_a_run_that_is_not_valid_is_told_with_its_values() -> None:
    depth = space("model.depth=int(8,20)")
    depth.require(DIGITS)
    with pytest.raises(Infeasible, match=r"model\.depth: 9 is not 6 n \+ 2") as failed:
        depth.draw(DIGITS, Trial(model__depth=9))
    assert failed.value.values == {"model.depth": 9}
    names = space("objective=choice(oat,trades)", "model=choice(resnet_cifar,conditional)", "optimizer.lr=log(0.1,1)")
    names.require(DIGITS)
    with pytest.raises(Infeasible, match="the network is not told its λ") as failed:
        names.draw(DIGITS, Trial())
    assert failed.value.values == {"objective": "oat", "model": "resnet_cifar"}


def test_the_order_of_the_dimensions_changes_no_draw() -> None:
    entries = ["optimizer.lr=log(0.1,1)", "clip=uniform(1,2)", "objective=choice(trades,mart)"]
    one, other = Trial(), Trial()
    assert space(*entries).draw(DIGITS, one) == space(*reversed(entries)).draw(DIGITS, other)
    assert one.asked == other.asked


def test_a_study_of_optuna_draws_and_knows_its_trials_again() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    searched = Space.of(DIGITS).narrowed(
        ["objective=choice(trades,mart)", "clip=choice(null,1)", "model.base=int(4,8)"]
    )
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0), directions=["maximize"] * 2)
    drawn = set()
    for _ in range(8):
        trial = study.ask()
        values, run = searched.draw(DIGITS, trial)
        assert trial.params == values and put(DIGITS, values) == run
        assert searched.draw(DIGITS, optuna.trial.FixedTrial(values)) == (values, run)
        drawn.add(values["objective"])
    assert drawn == {"trades", "mart"}


# Points.


def test_size() -> None:
    assert space("model.base=int(4,8)", "clip=choice(null,1)").size(DIGITS) == 10
    assert space("model.base=int(4,8)", "optimizer.lr=log(0.1,1)").size(DIGITS) is None
    conditional = space(
        "objective=choice(pgd_at,trades,natural)",
        "objective.attack.steps=int(1,5)",
        "objective.trades.beta=choice(1,6)",
        "objective.pgd_at.beta=choice(0,0.5,1)",
    )
    assert conditional.size(DIGITS) == 3 * 5 + 2 * 5 + 1


def test_a_grid_has_every_point_once() -> None:
    searched = space("objective=choice(trades,mart,natural)", "objective.beta=log(1,4)", "optimizer.lr=log(0.1,0.4)")
    searched = searched.narrowed(["objective.mart.lam=choice(5,6)"])
    grid = searched.grid(DIGITS, 3)
    assert len(grid) == 3 * 3 + 2 * 3 + 3
    assert len({tuple(sorted(point.items())) for point in grid}) == len(grid)
    assert {frozenset(point) for point in grid} == {
        frozenset({"objective", "objective.beta", "optimizer.lr"}),
        frozenset({"objective", "objective.mart.lam", "optimizer.lr"}),
        frozenset({"objective", "optimizer.lr"}),
    }
    for point in grid:
        assert searched.draw(DIGITS, optuna.trial.FixedTrial(point)) == (point, put(DIGITS, point))


def test_a_grid_leaves_out_what_can_not_run() -> None:
    assert space("model.depth=int(8,20)").grid(DIGITS, 13) == [{"model.depth": depth} for depth in (8, 14, 20)]


# Refusals; those of a range by itself are in test_ranges.py.


@pytest.mark.parametrize(
    "entries, message",
    [
        ([], "space: has no dimension; give one, as in objective.beta=log(0.1,10)"),
        (["objective.beta=uniform(6,6)"], "objective.beta: uniform(6,6) is one point; fix it with --objective.beta 6"),
        (["model.base=int(8,8)"], "model.base: int(8,8) is one point; fix it with --model.base 8"),
        (["objective=choice(trades)"], "objective: choice(trades) is one point; fix it with --objective trades"),
        (["objective.betta=log(1,2)"], "objective.betta: 'betta' is not known; did you mean 'beta'?"),
        (["optimizr.lr=log(1,2)"], "optimizr.lr: 'optimizr' is not known; did you mean 'optimizer'?"),
        (["objective=choice(tradess,mart)"], "objective: 'tradess' is not known; did you mean 'trades'?"),
        (
            ["objective=choice(trades,mart)", "objective.gama=log(1,2)"],
            "objective.gama: 'gama' is not known; did you mean 'lam'?",
        ),
        (
            ["objective=choice(trades,mart)", "objective.pgd_at.beta=log(1,2)"],
            "objective.pgd_at.beta: 'pgd_at' is not known; choose one of attack, beta, batchnorm",
        ),
        (
            ["objective=uniform(0,1)"],
            "objective: uniform(0,1) is no choice of names; write choice(pgd_at,...)",
        ),
        (["objective=choice(trades,2)"], "objective: choice(trades,2) is no choice of names; write choice(pgd_at,...)"),
        (
            ["model.depth=uniform(8,20)"],
            "model.depth: uniform(8,20) draws fractions, and this is a whole number; write",
        ),
        (
            ["optimizer.nesterov=int(0,1)"],
            "optimizer.nesterov: int(0,1) draws from all numbers, and this is one of few; write choice(true,false)",
        ),
        (
            ["model.activation=log(1,2)"],
            "model.activation: log(1,2) draws from all numbers, and this is one of few; write choice(relu,silu)",
        ),
        (["optimizer=choice(sgd,adam)"], "optimizer: 'adam' is not known; did you mean 'adamw'?"),
        (["data=choice(a,b)"], "data: holds several fields; search one of data.source, "),
        (["optimizer.lr.x=log(1,2)"], "optimizer.lr.x: optimizer.lr is a single value; search that, or leave it out"),
        (["objective.beta=uniform(-1,1)"], "objective.beta: -1.0 is outside [0, 1]; it is the share of the clean loss"),
        (["objective.beta=uniform(0,6)"], "objective.beta: 6.0 is outside [0, 1]; it is the share of the clean loss"),
        (["clip=choice(1,trades)"], "clip: 'trades' will not do: Input should be a valid number"),
        (
            ["objective.attack.threat.eps=uniform(0,8)"],
            "objective.attack.threat.eps: 8.0 is outside [0, 1]; write it in [0, 1] pixels, as in 8/255",
        ),
        (["batch_size=int(2,64)"], "batch_size: 2 is below the 8 logical shards; lower shards to"),
        (
            ["shards=choice(8,256)"],
            "shards=choice(8,256): batch_size: 128 is below the 256 logical shards; lower shards to",
        ),
        (
            ["objective=choice(trades,oat)"],
            "objective=choice(trades,oat): oat will not do: objective.lambdas: the network is not told its λ; take",
        ),
        (
            ["objective.beta=uniform(0,1)", "objective.pgd_at.beta=uniform(0,0.5)"],
            "objective.pgd_at.beta: is objective.beta as well; search one of them",
        ),
        (["objective.lam=recipe"], "objective.lam=recipe: dimension: 'objective.lam' is not known"),
        (["objective.beta"], "objective.beta: names no range; write PATH=RANGE, as in objective.beta=log(0.1,10)"),
        (["=log(1,2)"], "=log(1,2): names no range; write PATH=RANGE, as in objective.beta=log(0.1,10)"),
    ],
)
def test_refusals(entries: list[str], message: str) -> None:
    assert refusal(entries).startswith(message)


def test_one_share_of_several_attacks() -> None:
    run = dataclasses.replace(DIGITS, objective=PgdAt(Mixture((PGD(), PGD(steps=2), PGD(steps=3)))))
    first = "objective.attack.shares.0=uniform(0,0.5)"
    space(first).require(run)
    assert refusal([first, "objective.attack.shares.2=uniform(0,0.5)"], run) == (
        "objective.attack.shares.2: follows from objective.attack.shares.0; search one share of objective.attack.shares"
    )
    beyond = refusal(["objective.attack.shares.0=uniform(0,1.5)"], run)
    assert beyond.startswith("objective.attack.shares.0=uniform(0,1.5): objective.attack.shares: (1.5, -0.2")
    assert beyond.endswith("must not be negative")
    assert refusal(["objective.attack.shares.3=uniform(0,1)"], run).startswith(
        "objective.attack.shares.3: '3' is not known; choose one of 0, 1, 2"
    )


@pytest.mark.parametrize("field", FIXED)
def test_what_is_the_same_for_all_trials(field: str) -> None:
    for path in (field, f"{field}.within"):
        assert re.fullmatch(
            rf"{re.escape(path)}: .+, so it is not searched; set it for all trials with --{re.escape(path)}",
            refusal([f"{path}=int(1,8)"]),
        )


def test_what_only_begins_alike_may_be_searched() -> None:
    space("data.labelled_share=uniform(0.2,0.5)").require(DIGITS)


def test_whole_numbers_may_be_drawn_for_any_number() -> None:
    whole = space("objective.beta=int(1,6)")
    whole.require(TRADES)
    assert whole.draw(TRADES, Trial(objective__beta=3))[1].objective == Trades(
        PGD(Linf(0.1), start="gaussian"), beta=3.0
    )


def test_a_norm_may_be_searched_with_the_balls_of_each() -> None:
    norms = space(
        "objective.attack.threat=choice(linf,l2)",
        "objective.attack.threat.linf.eps=uniform(0.05,0.1)",
        "objective.attack.threat.l2.eps=uniform(0.5,2)",
    )
    norms.require(DIGITS)
    run = norms.draw(DIGITS, Trial(objective__attack__threat="l2", objective__attack__threat__l2__eps=1.5))[1]
    assert run.objective == PgdAt(PGD(L2(1.5), steps=7)) and run.evaluation == DIGITS.evaluation
