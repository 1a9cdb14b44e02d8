from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from robustscale.attacks.base import Goal
from robustscale.attacks.eot import EOT
from robustscale.attacks.fgsm import FGSM
from robustscale.attacks.pgd import PGD
from robustscale.attacks.worst_of import WorstOf
from robustscale.engine.backend import LocalBackend
from robustscale.errors import InputError
from robustscale.evaluation.accuracy import judge
from robustscale.evaluation.suite import KINDS, Suite, default_suite, kinds_of, other_radius, reported, suite_result
from robustscale.evaluation.words import Attacker, name_of, pixels, threat_of
from robustscale.noise import Noise
from robustscale.run import Evaluation, Run
from robustscale.testing.linear import Linear
from robustscale.threat import L2, Linf, Threat
from robustscale.types import Batch, DataSpec, Share

CIFAR = DataSpec(3, 32, 32, 10, (0.5,) * 3, (0.2,) * 3)
DIGITS = DataSpec(1, 8, 8, 10, (0.5,), (0.2,))


def run_with(attack: PGD, goal: Goal = Goal()) -> Run:  # noqa: B008
    return Run(evaluation=Evaluation(attack=attack, goal=goal))


def by_threat(suite: Suite) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for name, attacker in suite.attacks.items():
        found.setdefault(type(threat_of(attacker.attack)).__name__, set()).add(name)
    return found


@pytest.mark.parametrize(
    "eps, text",
    [(8 / 255, "8/255"), (0.031, "0.031"), (128 / 255, "128/255"), (0.5, "0.5"), (0.0, "0"), (1.0, "1")],
)
def test_radii_in_words(eps: float, text: str) -> None:
    assert pixels(eps) == text


def test_names_tell_attackers_apart() -> None:
    attackers = [
        Attacker(PGD()),
        Attacker(PGD(steps=20)),
        Attacker(PGD(restarts=2)),
        Attacker(PGD(L2())),
        Attacker(PGD(Linf(4 / 255))),
        Attacker(PGD(), Goal(target="random")),
        Attacker(PGD(), Goal("predicted")),
        Attacker(FGSM()),
        Attacker(FGSM(random_start=True)),
    ]
    assert len({name_of(a) for a in attackers}) == len(attackers)
    assert name_of(attackers[0]) == "pgd-10 linf 8/255"
    assert name_of(attackers[2]) == "pgd-10 linf 8/255 restarts=2"


def test_default_suite_on_cifar() -> None:
    suite = default_suite(Run(), CIFAR)
    assert by_threat(suite) == {
        "Linf": {
            "fgsm linf 8/255",
            *(f"pgd-20 linf {k}/255" for k in (2, 4, 8, 12, 16)),
            "apgd-100 linf 8/255",
            "apgd-100 linf 8/255 loss=dlr targets=9",
        },
        "L2": {"pgd-20 l2 128/255"},
    }
    assert suite.reported == "pgd-20 linf 8/255"
    assert [pixels(eps) for eps in suite.sweep] == ["0", "2/255", "4/255", "8/255", "12/255", "16/255"]
    assert suite.sweep[0.0] is None
    assert any("convention" in note for note in suite.notes)
    more = set(default_suite(Run(), CIFAR, kinds=KINDS).attacks) - set(suite.attacks)
    assert more == {"carlini_wagner-200 l2 128/255 search_steps=5 c=1 loss=margin"}


def test_a_different_evaluation_attack_is_kept_beside_the_suite() -> None:
    run = run_with(PGD(Linf(0.1), steps=7, restarts=3), Goal(target="random"))
    suite = default_suite(run, DIGITS)
    name, attacker = reported(run)
    assert suite.attacks[name] == attacker
    assert suite.reported == name
    assert "pgd-20 linf 0.1" in suite.attacks


def test_radius_in_the_other_norm() -> None:
    assert other_radius(Linf(8 / 255), CIFAR)[0] == 128 / 255
    assert other_radius(Linf(4 / 255), CIFAR)[0] == 128 / 255
    assert other_radius(L2(1.0), CIFAR)[0] == 8 / 255
    eps, why = other_radius(Linf(0.3), DIGITS._replace(height=28, width=28))
    assert eps == pytest.approx(2.425, abs=1e-3)
    assert "sqrt(d / 12)" in why
    assert "784" in why
    # The rule meets the convention, and goes back to where it came from.
    assert 8 / 255 * math.sqrt(3072 / 12) == pytest.approx(128 / 255)
    assert other_radius(L2(eps), DIGITS._replace(height=28, width=28))[0] == pytest.approx(0.3)


def test_radii_can_be_given() -> None:
    suite = default_suite(Run(), DIGITS, linf=0.1, l2=0.7)
    assert {"fgsm linf 0.1", "pgd-20 linf 0.1", "pgd-20 l2 0.7"} <= set(suite.attacks)
    assert max(suite.sweep) == 0.2
    with pytest.raises(InputError, match="outside"):
        default_suite(Run(), DIGITS, linf=8)


@pytest.mark.parametrize("threat", [Linf(0.7), L2(60.0), Linf(0.0), L2(0.0)])
def test_extreme_radii_stay_in_range(threat: Threat) -> None:
    suite = default_suite(run_with(PGD(threat)), DIGITS)
    assert min(suite.sweep) == 0
    assert all(a == suite.attacks[name_of(a)] for a in suite.attacks.values())


class Whole:
    num_examples, num_batches = 60, 1

    def epoch(self, epoch: int, start: int = 0) -> list[Share]:
        del epoch, start
        index = torch.arange(60)
        x = Noise.of(0, index, "images").uniform(1, 8, 8)
        return [Share(Batch.of(x, Linear.random(10, (1, 8, 8))(x).argmax(1), index), (60,), 60)]


def test_result_of_the_suite() -> None:
    """Robustness falls from SA at 0 to what the trained radius leaves, and to 0 far beyond it."""
    suite = default_suite(run_with(PGD(Linf(0.1), steps=20)), DIGITS, kinds=("fgsm", "pgd"))
    examples = judge(Linear.random(10, (1, 8, 8)), Whole(), suite.attacks, LocalBackend(), 0)  # type: ignore[arg-type]
    result = json.loads(json.dumps(suite_result(examples, suite), allow_nan=False))
    sweep = [entry["ra"] for entry in result["sweep"]]
    assert sweep[0] == result["sa"] == 1
    assert 0 < sweep[3] < 1
    assert sweep == sorted(sweep, reverse=True)
    assert sweep[3] == result["attacks"]["pgd-20 linf 0.1"]["ra"]
    assert result["worst"]["linf 0.1"]["ra"] <= min(
        result["attacks"][name]["ra"] for name in ("fgsm linf 0.1", "pgd-20 linf 0.1")
    )
    assert result["eps"] == 0.1
    assert len(result["notes"]) == 2


def test_kinds_are_chosen() -> None:
    run = run_with(PGD(Linf(0.1), steps=7))
    assert list(default_suite(run, DIGITS, kinds=("fgsm",)).attacks) == ["pgd-7 linf 0.1", "fgsm linf 0.1"]
    assert default_suite(run, DIGITS, kinds=("apgd",)).sweep == {0.0: None}
    assert kinds_of("fgsm, cw") == ("fgsm", "cw")
    assert kinds_of(",".join(KINDS)) == KINDS
    with pytest.raises(InputError, match="attacks: 'apdg' is not known; did you mean 'apgd'"):
        kinds_of("fgsm,apdg")


@pytest.mark.parametrize(
    "classes, randomised, targets",
    [(2, False, None), (3, False, None), (4, False, 3), (12, False, 9), (2, True, None), (3, True, 0)],
)
def test_dlr_where_there_are_classes_enough(classes: int, randomised: bool, targets: int | None) -> None:
    suite = default_suite(Run(), CIFAR._replace(classes=classes), kinds=("apgd",), randomised=randomised)
    dlr = [attacker for attacker in suite.attacks.values() if attacker.goal.loss == "dlr"]
    assert [attacker.targets for attacker in dlr] == ([] if targets is None else [targets])
    assert any("no DLR" in note for note in suite.notes) == (targets is None)
    assert sum("apgd-100" in name for name in suite.attacks) == 1 + len(dlr)


def test_attacks_on_a_randomised_network_are_averaged() -> None:
    run = Run(evaluation=Evaluation(attack=EOT(PGD(steps=20), 5), eot=3))
    suite = default_suite(run, CIFAR, randomised=True, kinds=KINDS)
    assert suite.reported == "eot-5 pgd-20 linf 8/255"
    assert all(isinstance(attacker.attack, EOT) for attacker in suite.attacks.values())
    assert {attacker.attack.draws for attacker in suite.attacks.values()} == {3, 5}  # type: ignore[attr-defined]
    assert all(name is None or name in suite.attacks for name in suite.sweep.values())
    assert any("cw: left out" in note for note in suite.notes)
    assert not any(
        isinstance(a.attack, EOT) for a in default_suite(Run(evaluation=Evaluation(eot=3)), CIFAR).attacks.values()
    )


def test_says_where_a_randomised_network_is_attacked_blindly() -> None:
    suite = default_suite(Run(evaluation=Evaluation(eot=1)), CIFAR, randomised=True)
    assert any("what they leave right is no robustness" in note for note in suite.notes)


def test_names_of_attacks_made_of_others() -> None:
    assert name_of(Attacker(EOT(PGD(restarts=2)))) == "eot-20 pgd-10 linf 8/255 restarts=2"
    assert name_of(Attacker(WorstOf((PGD(), FGSM())))) == "worst_of(pgd-10+fgsm) linf 8/255"


def test_suite_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        default_suite(Run(), CIFAR).reported = "other"  # type: ignore[misc]
