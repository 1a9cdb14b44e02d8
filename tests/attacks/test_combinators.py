"""Restarts, WorstOf, RandomOf and Mixture: which attack an example gets, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from robustscale.attacks.base import Goal, boundary_attack, require_pair
from robustscale.attacks.carlini_wagner import CarliniWagner
from robustscale.attacks.eot import EOT
from robustscale.attacks.fgsm import FGSM
from robustscale.attacks.mi_fgsm import MIFGSM
from robustscale.attacks.mixture import Mixture, split
from robustscale.attacks.pgd import PGD
from robustscale.attacks.random_of import RandomOf
from robustscale.attacks.restarts import Restarts
from robustscale.attacks.worst_of import WorstOf
from robustscale.errors import InputError
from robustscale.noise import Noise
from robustscale.testing import contracts
from robustscale.testing.contracts import GOALS, TinyNet, counting, random_batch, shortfall
from robustscale.threat import L2, Linf
from robustscale.types import Attack, Score


def attack_noise(n: int, seed: int = 0) -> Noise:
    return Noise.of(seed, torch.arange(n), "attack")


@dataclass(frozen=True)
class Painting:
    """Sets every pixel to one value, in so many steps."""

    value: float
    steps: int = 1
    batches: list[int] = field(default_factory=list)

    def __call__(
        self, score: Score, x: Tensor, *, noise: Noise, on_step: Callable[[Tensor], None] | None = None
    ) -> Tensor:
        assert score(x).shape == (len(x),) and len(noise.keys) == len(x)
        self.batches.append(len(x))
        for step in range(self.steps):
            if on_step is not None:
                on_step(torch.full_like(x, self.value * (step + 1) / self.steps))
        return torch.full_like(x, self.value)


def level(x: Tensor) -> Tensor:
    return x.flatten(1).mean(1)


def painted(attack: Attack, n: int, seed: int = 0) -> Tensor:
    """(n,): the value that each example was painted with; 0 is left alone."""
    return level(attack(level, torch.zeros(n, 1, 2, 2), noise=attack_noise(n, seed)))


def run(attack: Attack, n: int = 16, seed: int = 0) -> tuple[Tensor, Tensor]:
    model, batch = TinyNet().eval(), random_batch(n)
    score = Goal().score(model, batch.x, batch.y, attack_noise(n))
    x_adv = attack(score, batch.x, noise=attack_noise(n, seed))
    with torch.no_grad():
        return x_adv, score(x_adv)


# Restarts and WorstOf


def test_restarts_are_pgds_own() -> None:
    for threat in (Linf(0.05), L2(0.5)):
        once = PGD(threat, steps=2)
        assert torch.equal(run(Restarts(once, 3))[0], run(PGD(threat, steps=2, restarts=3))[0])
        assert torch.equal(run(Restarts(once, 1))[0], run(once)[0])


def test_an_attack_with_restarts_of_its_own_is_refused() -> None:
    with pytest.raises(InputError, match="attack: has 3 restarts of its own"):
        Restarts(PGD(restarts=3))
    with pytest.raises(InputError, match="restarts: 0"):
        Restarts(restarts=0)


def test_worst_of_keeps_each_examples_highest_score() -> None:
    """In either order of the attacks; of equals the first."""
    weak, strong = Painting(0.25), Painting(0.5)
    assert painted(WorstOf((weak, strong)), 3).tolist() == [0.5] * 3
    assert painted(WorstOf((strong, weak)), 3).tolist() == [0.5] * 3

    def score(x: Tensor) -> Tensor:
        return torch.tensor([1.0, -1.0, 0.0]) * level(x)

    x_adv = WorstOf((weak, strong))(score, torch.zeros(3, 1, 2, 2), noise=attack_noise(3))
    assert level(x_adv).tolist() == [0.5, 0.25, 0.25]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_worst_of_is_the_maximum_over_the_attacks(seed: int) -> None:
    short = PGD(Linf(0.03), steps=1, step_size=0.01)
    attacks = short, short, PGD(L2(0.2), steps=1, step_size=0.05)
    model, batch = TinyNet(seed).double().eval(), random_batch(16, seed, torch.float64)
    score, noise = Goal().score(model, batch.x, batch.y, attack_noise(16)), attack_noise(16)
    with torch.no_grad():
        alone = [score(a(score, batch.x, noise=noise.fold("attack", k))) for k, a in enumerate(attacks)]
        worst = score(WorstOf(attacks)(score, batch.x, noise=noise))
    torch.testing.assert_close(worst, torch.stack(alone).amax(0), rtol=1e-12, atol=1e-12)
    assert len(torch.stack(alone).argmax(0).unique()) > 1, "one attack is worst for all: nothing was tested"


def test_cost_of_worst_of() -> None:
    batch, model = random_batch(4), TinyNet().eval()
    for attacks, forwards in (((PGD(steps=3), FGSM()), 3 + 1 + 2), ((PGD(steps=3),), 3)):
        with counting(model) as calls:
            WorstOf(attacks)(Goal().score(model, batch.x, batch.y, attack_noise(4)), batch.x, noise=attack_noise(4))
        assert calls == [4] * forwards


# RandomOf


def test_a_batch_draws_together_whatever_its_examples() -> None:
    """Every worker's and every shard's part of one step gets one attack; over steps both come up by their weights."""
    attack = RandomOf((Painting(0.25), Painting(0.5)), weights=(1, 3))
    values = []
    for step in range(400):
        parts = [
            level(attack(level, torch.zeros(len(index), 1, 2, 2), noise=Noise.of(0, index, "attack", step)))
            for index in (torch.arange(3), torch.arange(100, 105))
        ]
        assert len(torch.cat(parts).unique()) == 1
        values.append(float(parts[0][0]))
    assert values.count(0.5) == pytest.approx(300, abs=30)


def test_examples_draw_for_themselves_by_the_weights() -> None:
    attack = RandomOf((Painting(0.25), Painting(0.5), Painting(0.75)), per="sample", weights=(1, 0, 3))
    values = painted(attack, 4000)
    assert values.unique().tolist() == [0.25, 0.75]
    assert (values == 0.75).double().mean().item() == pytest.approx(0.75, abs=0.03)
    assert torch.equal(painted(attack, 50), values[:50]), "a draw depends on the batch"
    assert not torch.equal(painted(attack, 4000, seed=1), values)


def test_each_attack_runs_on_its_rows_alone() -> None:
    attacks = Painting(0.25), Painting(0.5)
    painted(RandomOf(attacks, per="sample"), 100)
    assert sum(attacks[0].batches + attacks[1].batches) == 100
    model, batch = TinyNet().eval(), random_batch(16)
    with counting(model) as calls:
        score = Goal().score(model, batch.x, batch.y, attack_noise(16))
        RandomOf((PGD(steps=3), FGSM()), per="sample")(score, batch.x, noise=attack_noise(16))
    assert len(calls) == 4 and calls[0] + calls[-1] == 16


def test_nested_draws_are_independent() -> None:
    inner = RandomOf((Painting(0.25), Painting(0.5)))
    seen = {
        float(level(RandomOf((inner, Painting(0.75)))(level, torch.zeros(1, 1, 2, 2), noise=attack_noise(1, seed))))
        for seed in range(40)
    }
    assert seen == {0.25, 0.5, 0.75}


@pytest.mark.parametrize("per", ["batch", "sample"])
def test_an_attack_that_is_certain_is_that_attack(per: str) -> None:
    pgd = PGD(L2(0.5), steps=3)
    found, _ = run(RandomOf((FGSM(), pgd), per=per, weights=(0, 1)))  # type: ignore[arg-type]
    model, batch = TinyNet().eval(), random_batch(16)
    score = Goal().score(model, batch.x, batch.y, attack_noise(16))
    torch.testing.assert_close(found, pgd(score, batch.x, noise=attack_noise(16).fold("attack", 1)))


@pytest.mark.parametrize(
    "attack, message",
    [
        (lambda: RandomOf(()), "attacks: is empty"),
        (lambda: WorstOf(()), "attacks: is empty"),
        (lambda: Mixture(()), "attacks: is empty"),
        (lambda: RandomOf(weights=(1.0,)), "weights: 1 of them for 2 attacks; give each one"),
        (lambda: RandomOf(weights=()), "weights: 0 of them for 2 attacks"),
        (lambda: RandomOf(weights=(1.0, -1.0)), r"weights: \(1.0, -1.0\) must not be negative"),
        (lambda: RandomOf(weights=(0.0, 0.0)), "weights: .* nor all be zero"),
        (lambda: Mixture(shares=(0.5,)), "shares: 1 of them for 2 attacks; give each one"),
        (lambda: Mixture(shares=(0.5, 0.6)), r"shares: \(0.5, 0.6\) add up to 1.1; they must add up to 1"),
        (lambda: Mixture(shares=(1.5, -0.5)), "shares: .* must not be negative"),
    ],
)
def test_what_does_not_add_up_is_refused(attack: Callable[[], Attack], message: str) -> None:
    with pytest.raises(InputError, match=message):
        attack()


# Mixture


@pytest.mark.parametrize("n", [1, 2, 7, 10, 128])
@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.1, 0.2, 0.7), (0.0, 1.0), (0.05, 0.95)], ids=str)
def test_shares_are_exact(shares: tuple[float, ...], n: int) -> None:
    """Floor or ceil of share · n, a whole number where it is one; every example exactly once."""
    for seed in range(30):
        rows = split(attack_noise(n, seed), shares)
        assert torch.equal(torch.cat(rows).sort().values, torch.arange(n))
        for mine, share in zip(rows, shares, strict=True):
            exact = round(share * n, 6)
            # Between two edges that are rounded together lie at most one example more or less.
            assert abs(len(mine) - exact) < (1e-9 if exact == int(exact) and len(shares) == 2 else 1)


def test_shares_hold_over_batches_of_one() -> None:
    firsts = [len(split(attack_noise(1, seed), (0.3, 0.7))[0]) for seed in range(2000)]
    assert sum(firsts) == pytest.approx(600, abs=80)


def test_lots_have_nothing_to_do_with_position() -> None:
    """An evaluation's images may be sorted by class."""
    counts = torch.zeros(10)
    for seed in range(1000):
        counts[split(attack_noise(10, seed), (0.5, 0.5))[0]] += 1
    torch.testing.assert_close(counts / 1000, torch.full((10,), 0.5), rtol=0, atol=0.06)


def test_mixture_gives_each_row_its_attack() -> None:
    attack = Mixture((Painting(0.25), Painting(0.5)), shares=(0.25, 0.75))
    values = painted(attack, 40)
    rows = split(attack_noise(40), (0.25, 0.75))
    assert (values[rows[0]] == 0.25).all() and (values[rows[1]] == 0.5).all() and len(rows[0]) == 10
    assert [a.batches for a in attack.attacks] == [[10], [30]]  # type: ignore[attr-defined]


def test_an_example_gets_from_its_attack_what_it_would_alone() -> None:
    attack = Mixture((FGSM(Linf(0.05)), PGD(L2(0.5), steps=3)))
    model, batch = TinyNet().double().eval(), random_batch(8, dtype=torch.float64)
    noise = attack_noise(8)
    score = Goal().score(model, batch.x, batch.y, noise)
    found = attack(score, batch.x, noise=noise)
    for number, (mine, rows) in enumerate(zip(attack.attacks, split(noise, (0.5, 0.5)), strict=True)):
        alone = mine(score, batch.x, noise=noise.fold("attack", number))
        torch.testing.assert_close(found[rows], alone[rows], rtol=0, atol=1e-12)


# What they share


@pytest.mark.parametrize(
    "attack",
    [
        RandomOf((Painting(0.5, steps=2), Painting(1.0, steps=4)), per="sample"),
        Mixture((Painting(0.5, steps=2), Painting(1.0, steps=4))),
    ],
    ids=["random_of", "mixture"],
)
def test_on_step_sees_whole_batches_of_which_one_part_moves(attack: Attack) -> None:
    seen: list[Tensor] = []
    x_adv = attack(level, torch.zeros(20, 1, 2, 2), noise=attack_noise(20), on_step=seen.append)
    first = level(x_adv) == 0.5
    values = [(sorted(set(level(x)[first].tolist())), sorted(set(level(x)[~first].tolist()))) for x in seen]
    assert values == [([0.25], [0.0]), ([0.5], [0.0])] + [([0.5], [v]) for v in (0.25, 0.5, 0.75, 1.0)]


NESTED = [
    RandomOf((PGD(steps=3), MIFGSM(steps=3)), per="sample"),
    RandomOf((WorstOf((FGSM(), PGD(steps=3))), RandomOf((PGD(steps=2), FGSM()))), per="sample"),
    EOT(WorstOf((FGSM(), Restarts(PGD(steps=3), 2))), draws=2),
    Restarts(RandomOf((FGSM(random_start=True), PGD(steps=2)), per="sample"), 3),
]


@pytest.mark.parametrize("attack", NESTED, ids=lambda attack: repr(attack)[:40])
@pytest.mark.parametrize("threat", [Linf(0.05), L2(0.5)], ids=["linf", "l2"])
def test_contract_of_combinations(attack: Attack, threat: Linf | L2) -> None:
    attack = contracts.in_threat(attack, threat)
    assert attack.threat == threat  # type: ignore[attr-defined]
    contracts.check_inside(attack, threat)
    contracts.check_ascends(attack)
    contracts.check_deterministic(attack)
    contracts.check_batch_independent(attack)
    contracts.check_leaves_no_trace(attack)


@pytest.mark.parametrize("goal", GOALS, ids=str)
@pytest.mark.parametrize("attack", NESTED, ids=lambda attack: repr(attack)[:40])
def test_optimal_on_a_linear_model(attack: Attack, goal: Goal) -> None:
    assert shortfall(contracts.in_threat(attack, Linf(0.1)), Linf(0.1), 8, goal).abs().max() < 1e-5


def test_threats_that_differ_are_no_threat() -> None:
    assert RandomOf().threat is None and WorstOf().threat is None
    assert Restarts(RandomOf()).threat is None and EOT(WorstOf()).threat is None
    assert WorstOf((PGD(Linf(0.1)), FGSM(Linf(0.1)))).threat == Linf(0.1)
    assert WorstOf((PGD(Linf(0.1)), FGSM(Linf(0.2)))).threat is None
    assert Mixture((PGD(), Painting(0.5))).threat is None, "an attack that names no ball may leave any"


def test_a_seeker_of_the_boundary_needs_a_margin() -> None:
    seeker = CarliniWagner()
    nested = EOT(RandomOf((PGD(), WorstOf((FGSM(), seeker)))))
    assert boundary_attack(nested) is seeker and boundary_attack(RandomOf()) is None
    require_pair(nested, Goal(loss="margin"))
    require_pair(RandomOf(), None)
    for goal, message in (
        (Goal(), "monitor: CarliniWagner looks .* no cross_entropy tells; set goal.loss to margin"),
        (Goal(loss="dlr"), "no dlr tells"),
        (None, "no goal tells; take pgd"),
    ):
        with pytest.raises(InputError, match=message):
            require_pair(nested, goal, "monitor")
