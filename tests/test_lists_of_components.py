"""Fields that hold several components, as the attacks of a combination: from YAML, from the command line, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from robustscale.attacks.base import Goal
from robustscale.attacks.carlini_wagner import CarliniWagner
from robustscale.attacks.eot import EOT
from robustscale.attacks.fgsm import FGSM
from robustscale.attacks.mi_fgsm import MIFGSM
from robustscale.attacks.mixture import Mixture
from robustscale.attacks.pgd import PGD
from robustscale.attacks.random_of import RandomOf
from robustscale.attacks.restarts import Restarts
from robustscale.attacks.worst_of import WorstOf
from robustscale.cli import as_yaml, parse_run, read_file
from robustscale.config import decode, encode, override, override_threats
from robustscale.errors import InputError
from robustscale.evaluation.words import Attacker, name_of
from robustscale.objectives.pgd_at import PgdAt
from robustscale.objectives.trades import Trades
from robustscale.run import Evaluation, Run
from robustscale.threat import L2, Linf
from robustscale.types import Attack

BOTH = Run(objective=PgdAt(RandomOf((PGD(Linf(4 / 255)), PGD(L2(0.25), steps=7)))))


def typed(options: str, base: Run | None = None) -> Run:
    return parse_run(options.split(), "prog", "", base or Run())


def attack_of(options: str, base: Run | None = None) -> Attack:
    return typed(options, base).objective.attack  # type: ignore[attr-defined, no-any-return]


TYPED: list[tuple[str, Attack]] = [
    ("random_of --objective.attack.attacks.1.steps 5", RandomOf((PGD(), PGD(L2(), steps=5)))),
    ("random_of --objective.attack.attacks.0 fgsm", RandomOf((FGSM(), PGD(L2())))),
    ("random_of --objective.attack.attacks.0.threat l2", RandomOf((PGD(L2()), PGD(L2())))),
    ("random_of --objective.attack.attacks.0.threat.eps 1/255", RandomOf((PGD(Linf(1 / 255)), PGD(L2())))),
    ("random_of --objective.attack.attacks.2 fgsm", RandomOf((PGD(), PGD(L2()), FGSM()))),
    ("random_of --objective.attack.weights 1 3 --objective.attack.per sample", RandomOf(per="sample", weights=(1, 3))),
    (
        "mixture --objective.attack.attacks.2 mi_fgsm --objective.attack.shares .2 .3 .5",
        Mixture((FGSM(), PGD(), MIFGSM()), (0.2, 0.3, 0.5)),
    ),
    ("restarts --objective.attack.attack fgsm --objective.attack.restarts 2", Restarts(FGSM(), 2)),
    (
        "eot --objective.attack.attack worst_of --objective.attack.attack.attacks.1.steps 3",
        EOT(WorstOf((PGD(), PGD(L2(), steps=3)))),
    ),
]


@pytest.mark.parametrize("options, attack", TYPED, ids=[options for options, _ in TYPED])
def test_items_are_set_by_their_number(options: str, attack: Attack, tmp_path: Path) -> None:
    run = typed(f"--objective.attack {options}")
    assert run.objective == PgdAt(attack)
    path = tmp_path / "run.yaml"
    path.write_text(as_yaml(run))
    assert read_file(path) == typed(f"--config {path}") == run
    assert decode(Run, encode(run)) == run


REFUSED = [
    (
        "random_of --objective.attack.attacks.3 fgsm",
        "objective.attack.attacks.3: there are 2 of them, counted from 0; objective.attack.attacks.2 would add one",
    ),
    ("random_of --objective.attack.attacks.x fgsm", "objective.attack.attacks.x: there are 2 of them, counted from 0"),
    (
        "random_of --objective.attack.attacks.2.steps 5",
        "option: '--objective.attack.attacks.2.steps' is not known; "
        "did you mean '--objective.attack.attacks.[01].steps'",
    ),
    (
        "random_of --objective.attack.attacks.1.stepz 5",
        "option: '--objective.attack.attacks.1.stepz' is not known; did you mean '--objective.attack.attacks.1.steps'",
    ),
    (
        "random_of --objective.attack.attacks.1 pdg",
        "objective.attack.attacks.1: 'pdg' is not known; did you mean 'pgd'",
    ),
    (
        "random_of --objective.attack.attacks fgsm",
        "option: '--objective.attack.attacks' is not known; did you mean '--objective.attack.attacks.[01]'",
    ),
    ("random_of --objective.attack.weights 1 2 3", "objective.attack.weights: 3 of them for 2 attacks"),
    ("mixture --objective.attack.shares 0.5 0.6", r"objective.attack.shares: \(0.5, 0.6\) add up to 1.1"),
    (
        "random_of --threat.eps 4/255",
        "threat: {'eps': '4/255'} for attacks in l2 and linf; set the threat of each of them",
    ),
    ("random_of --threat l2", "threat: {'name': 'l2'} for attacks in l2 and linf; set the threat of each of them"),
]


@pytest.mark.parametrize("options, message", REFUSED, ids=[options for options, _ in REFUSED])
def test_what_is_wrong_with_an_item_is_said_in_a_line(options: str, message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        typed(f"--objective.attack {options}")


def test_help_names_every_field_of_every_item(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        typed("--objective.attack random_of --objective.attack.attacks.0 fgsm --help")
    said = capsys.readouterr().out
    assert caught.value.code == 0
    for option in ("attacks.0.alpha", "attacks.1.steps", "attacks.1.threat.eps", "per", "weights"):
        assert f"--objective.attack.{option}" in said, option
    assert "--objective.attack.attacks.0.steps" not in said


LISTS: list[tuple[Any, Attack]] = [
    (["fgsm", "pgd"], RandomOf((FGSM(Linf(4 / 255)), PGD(L2(0.25), steps=7)))),
    (["fgsm"], RandomOf((FGSM(Linf(4 / 255)),))),
    (["pgd", "pgd", "fgsm"], RandomOf((PGD(Linf(4 / 255)), PGD(L2(0.25), steps=7), FGSM(Linf(4 / 255))))),
    ([{"name": "pgd", "steps": 2}, {"threat": "linf"}], RandomOf((PGD(Linf(4 / 255), steps=2), PGD(Linf(), steps=7)))),
    ({"1": {"steps": 2}}, RandomOf((PGD(Linf(4 / 255)), PGD(L2(0.25), steps=2)))),
    ({0: "fgsm"}, RandomOf((FGSM(Linf(4 / 255)), PGD(L2(0.25), steps=7)))),
]


@pytest.mark.parametrize("change, attack", LISTS, ids=[str(change) for change, _ in LISTS])
def test_a_list_takes_names_and_parts_as_a_single_field_does(change: Any, attack: Attack) -> None:
    """What is not named stays, and an exchanged item keeps its threat model."""
    text = yaml.safe_dump({"objective": {"attack": {"attacks": change}}})
    assert override(BOTH, yaml.safe_load(text)).objective == PgdAt(attack)


@pytest.mark.parametrize(
    "change, message",
    [
        ("fgsm", "objective.attack.attacks: expected a list, got 'fgsm'"),
        ([3], "objective.attack.attacks.0: expected a mapping of fields, got 3"),
        ([], "objective.attack.attacks: is empty"),
        ([{"steps": 3}, "fgsm", {"steps": 3}], "objective.attack.attacks.2: None is not known"),
    ],
    ids=str,
)
def test_a_list_that_will_not_do(change: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        override(BOTH, {"objective": {"attack": {"attacks": change}}})


# Threat models


def test_one_threat_reaches_every_item_of_one_norm() -> None:
    run = Run(objective=PgdAt(Mixture((FGSM(), EOT(WorstOf((PGD(step_size=2 / 255), MIFGSM())))))))
    inner = EOT(WorstOf((PGD(Linf(4 / 255), step_size=1 / 255), MIFGSM(Linf(4 / 255)))))
    changed = override_threats(run, {"eps": "4/255"})
    assert changed.objective == PgdAt(Mixture((FGSM(Linf(4 / 255)), inner)))
    assert changed.evaluation.attack == PGD(Linf(4 / 255), steps=20)


def test_one_threat_for_nested_attacks_in_two_norms_is_refused() -> None:
    run = Run(objective=PgdAt(Mixture((FGSM(), WorstOf()))))
    with pytest.raises(InputError, match="for attacks in l2 and linf"):
        override_threats(run, {"eps": "4/255"})


def test_exchanging_keeps_the_threat_of_the_same_norm() -> None:
    assert attack_of("--objective.attack worst_of", Run(objective=PgdAt(PGD(Linf(4 / 255))))) == WorstOf(
        (PGD(Linf(4 / 255)), PGD(L2()))
    )
    assert attack_of("--objective.attack mixture", Run(objective=PgdAt(PGD(L2(0.25))))) == Mixture(
        (FGSM(L2(0.25)), PGD(L2(0.25)))
    )
    kept = override(BOTH, {"objective": "trades"}).objective
    assert kept.attack.threat == Linf(4 / 255), "the first of several"  # type: ignore[attr-defined]
    assert isinstance(kept, Trades)


# Pairs of attack and goal


def test_a_boundary_attack_is_refused_without_a_margin() -> None:
    """Wherever attack and goal stand side by side; within a combination too; and TRADES has no goal at all."""
    seeker = CarliniWagner()
    for build, message in (
        (lambda: Run(objective=PgdAt(seeker)), "objective.attack: CarliniWagner looks .* no cross_entropy tells"),
        (lambda: Run(objective=PgdAt(WorstOf((PGD(), seeker)))), "objective.attack: CarliniWagner"),
        (lambda: Run(objective=Trades(attack=seeker)), "objective.attack: .* no goal tells; take pgd"),
        (lambda: Run(evaluation=Evaluation(attack=seeker)), "evaluation.attack: .* set goal.loss to margin"),
        (lambda: Run(evaluation=Evaluation(monitor=seeker)), "evaluation.monitor: .* set goal.loss to margin"),
    ):
        with pytest.raises(InputError, match=message):
            build()
    Run(objective=PgdAt(seeker, Goal(loss="margin")), evaluation=Evaluation(attack=seeker, goal=Goal(loss="margin")))


@pytest.mark.parametrize(
    "options",
    [
        "--objective.attack carlini_wagner --objective.goal.loss margin --objective.attack.threat l2",
        "--objective.attack.threat l2 --objective.attack carlini_wagner --objective.goal.loss margin",
        "--objective.goal.loss margin --objective.attack carlini_wagner --threat l2",
    ],
)
def test_options_that_fit_only_together_may_come_in_any_order(options: str) -> None:
    assert typed(options).objective == PgdAt(CarliniWagner(), Goal(loss="margin"))


# Names


def test_combinations_have_names_that_tell_them_apart() -> None:
    attacks = [
        RandomOf(),
        RandomOf(per="sample"),
        RandomOf(weights=(1.0, 3.0)),
        RandomOf((PGD(), PGD(L2(), steps=5))),
        WorstOf((PGD(), FGSM())),
        WorstOf((FGSM(), PGD())),
        Restarts(PGD(start="none")),
        EOT(PGD(L2())),
        EOT(FGSM(L2())),
    ]
    names = [name_of(Attacker(attack)) for attack in attacks]
    assert len(set(names)) == len(names)
