"""Several targets, points visited on the way, and networks that draw: which images fall, and how it is judged."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from robustscale.attacks.apgd import APGD
from robustscale.attacks.base import Goal, attacking
from robustscale.attacks.carlini_wagner import CarliniWagner
from robustscale.attacks.eot import EOT
from robustscale.attacks.pgd import PGD
from robustscale.engine.backend import LocalBackend
from robustscale.errors import InputError
from robustscale.evaluation.accuracy import DRAWS, NONFINITE, Examples, judge
from robustscale.evaluation.images import Images, judge_images
from robustscale.evaluation.result import Figure, attack_results, robust, standard
from robustscale.evaluation.words import Attacker, name_of
from robustscale.noise import Noise, next_draw
from robustscale.testing.contracts import counting
from robustscale.testing.linear import Linear
from robustscale.threat import L2, Linf, Threat
from robustscale.types import Batch, Score, Share

SHAPE = (1, 4, 4)


def images(n: int, classes: int = 5, seed: int = 0) -> tuple[Linear, Tensor, Tensor]:
    """A linear network and images that it gets right."""
    model = Linear.random(classes, SHAPE, seed)
    x = Noise.of(seed, torch.arange(n), "images").uniform(*SHAPE)
    return model, x, model(x).argmax(1)


class Reversed(Images):
    """The same images in another order and other batches."""

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Share]:
        for rows in torch.arange(self.num_examples).flip(0).split(7):
            yield Share(self.batch.rows(rows), (len(rows),), len(rows))


class Shaky(nn.Module):
    """A linear network behind noise on the image, fresh at every call."""

    randomised: ClassVar[bool] = True

    def __init__(self, sigma: float, classes: int = 5) -> None:
        super().__init__()
        self.inner, self.sigma = Linear.random(classes, SHAPE), sigma

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.inner(x + self.sigma * next_draw(x).normal(*SHAPE))
        return logits


@dataclasses.dataclass(frozen=True)
class Passing:
    """Looks at one point on its way, and returns the image as it was."""

    visited: ClassVar[bool] = True

    by: float
    threat: Threat = Linf(0.3)

    def __call__(
        self, score: Score, x: Tensor, *, noise: Noise, on_step: Callable[[Tensor], None] | None = None
    ) -> Tensor:
        del noise, on_step
        score((x + self.by).clamp(0, 1))
        return x


def test_targets_reach_the_optimum_over_all_classes() -> None:
    """An image stands exactly where no other class can be made the likeliest in the ball: known for a linear network.
    One target after another finds all of it; the likeliest alone does not."""
    threat = Linf(0.06)
    model, x, y = images(300, 6)
    fooled = torch.zeros(300, dtype=torch.bool)
    close = fooled.clone()
    for step in range(1, 6):
        other = (y + step) % 6
        gap = model.gap(model.worst(x, y, other, threat), y, other)
        fooled |= gap > 0
        close |= gap.abs() < 1e-4
    every = Attacker(APGD(threat, steps=10), Goal(loss="margin"), targets=5)
    first = Attacker(APGD(threat, steps=10), Goal(loss="margin", target="ranked"))
    found = judge_images(model, x, y, [every, first])
    standing = found.robust(name_of(every))
    assert torch.equal(standing[~close], ~fooled[~close])
    assert int(found.robust(name_of(first)).sum()) > int(standing.sum()) > 0


def test_targets_are_run_on_the_images_still_standing() -> None:
    model, x, y = images(60)
    attacker = Attacker(PGD(Linf(0.05), steps=1), Goal(loss="margin"), targets=4)
    with counting(model) as calls:
        found = judge_images(model, x, y, [attacker], batch_size=60)
    # Clean; then for each target its ranking, one step, and the verdict.
    assert calls[:4] == [60] * 4 and len(calls) == 13
    assert calls[-1] == calls[-2] == calls[-3] < 60
    assert int(found.robust(name_of(attacker)).sum()) <= calls[-1]


@pytest.mark.parametrize(
    "attacker",
    [
        Attacker(APGD(Linf(0.05), steps=12, restarts=2), Goal(loss="dlr"), targets=3),
        Attacker(CarliniWagner(L2(0.15), steps=60, search_steps=3, c=1.0), Goal(loss="margin")),
    ],
    ids=name_of,
)
def test_verdicts_do_not_depend_on_the_batch(attacker: Attacker) -> None:
    model, x, y = images(40)
    together = judge_images(model, x, y, [attacker], batch_size=40)
    cut = judge(model, Reversed(x, y), {name_of(attacker): attacker}, LocalBackend(), 0)
    assert torch.equal(*(examples.adversarial[name_of(attacker)] for examples in (together, cut)))
    assert 0 < int(together.robust(name_of(attacker)).sum()) < 40


def test_carlini_and_wagner_at_eps_is_the_distance_at_most_eps() -> None:
    threat = L2(0.15)
    model, x, y = images(100, 2)
    distance = -model.gap(x, y, 1 - y) / (model.weight[1] - model.weight[0]).double().norm()
    attacker = Attacker(CarliniWagner(threat, steps=200, search_steps=5, c=1.0), Goal(loss="margin"))
    standing = judge_images(model, x, y, [attacker]).robust(name_of(attacker))
    assert bool(standing[distance > threat.eps * 1.001].all())
    # Within 3 %; pixels at the sides of the box make the way longer for some.
    assert (~standing[distance < threat.eps * 0.97]).double().mean() > 0.9


def test_an_attack_at_the_boundary_needs_a_margin() -> None:
    model, x, y = images(4)
    with pytest.raises(InputError, match="margin"):
        judge_images(model, x, y, [Attacker(CarliniWagner())])


def test_a_point_visited_within_the_ball_breaks_an_image() -> None:
    model, x, y = images(80)
    near, far = Attacker(Passing(0.25)), Attacker(Passing(0.35))
    found = judge_images(model, x, y, [near, far])
    there = model((x + 0.25).clamp(0, 1)).argmax(1)
    assert torch.equal(found.adversarial[name_of(near)], there)
    assert not torch.equal(there, y)
    # Only where the box keeps the point within the ball.
    inside = ((x + 0.35).clamp(0, 1) - x).flatten(1).amax(1) <= 0.3
    assert torch.equal(found.adversarial[name_of(far)][~inside], y[~inside])


def test_scores_that_break_on_some_rows_are_marked_on_those() -> None:
    """C&W asks for the score of the images that go on alone."""
    model, x, y = images(12)

    class Broken(Linear):
        def forward(self, x: Tensor) -> Tensor:
            moved = (x[:, 0, 0, 0] - 0.5).abs() < 1e-3
            return super().forward(x) + torch.where(moved, torch.nan, 0.0)[:, None]

    broken = Broken(*(p.detach() for p in model.parameters()))
    x[3, 0, 0, 0] = 0.4995
    attacker = Attacker(CarliniWagner(L2(0.3), steps=100, search_steps=4, c=1.0), Goal(loss="margin"))
    predicted = judge_images(broken, x, y, [attacker]).adversarial[name_of(attacker)]
    assert int(predicted[3]) == NONFINITE
    assert (predicted != NONFINITE).sum() >= 6


def test_a_randomised_network_is_judged_by_draws_of_it() -> None:
    model = Shaky(0.2)
    _, x, y = images(50)
    attackers = [Attacker(EOT(PGD(Linf(0.02), steps=3), 4))]
    found = judge_images(model, x, y, attackers)
    assert found.predicted.shape == found.adversarial[name_of(attackers[0])].shape == (50, DRAWS)
    assert (found.predicted != found.predicted[:, :1]).any(), "every draw is the same"
    sa = standard(found)
    assert sa.value == pytest.approx(float(found.right.double().mean()))
    assert sa.spread == pytest.approx(float(found.right.double().mean(0).std()))
    entry = attack_results(found, {name_of(a): a for a in attackers})
    assert entry["draws"] == DRAWS and entry["sa_spread"] == sa.spread
    torch.rand(7)
    again = judge(model, Reversed(x, y), {name_of(a): a for a in attackers}, LocalBackend(), 0)
    assert torch.equal(again.predicted, found.predicted)
    assert torch.equal(*(e.adversarial[name_of(attackers[0])] for e in (found, again)))
    assert not torch.equal(judge_images(model, x, y, attackers, seed=1).predicted, found.predicted)


def test_an_attack_that_does_nothing_leaves_a_randomised_network_its_accuracy() -> None:
    """Clean and attacked images meet the same draws: otherwise RA would count every mishap twice."""
    model = Shaky(0.4)
    _, x, y = images(50)
    still = [Attacker(EOT(PGD(Linf(0.0), steps=1), 2)), Attacker(EOT(PGD(Linf(0.0), steps=2), 2))]
    found = judge_images(model, x, y, still)
    assert 0.3 < standard(found).value < 0.95
    assert robust(found, *found.adversarial) == standard(found)


def test_one_draw_is_a_column_and_nothing_else_can_be_drawn_from() -> None:
    _, x, y = images(10)
    assert judge_images(Shaky(0.1), x, y, [], draws=1).predicted.shape == (10,)
    with pytest.raises(InputError, match=r"evaluation\.draws: 5 of a network that draws nothing"):
        judge_images(Linear.random(5, SHAPE), x, y, [], draws=5)


def test_the_attacker_chooses_the_attack_but_not_the_draw() -> None:
    """Of two attacks that each leave half the draws, other ones, the worst leaves half: not none."""
    y = torch.zeros(3, dtype=torch.int64)
    clean = y[:, None].expand(3, 4)
    a = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1]])
    b = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]])
    found = Examples(torch.arange(3), y, clean, {"a": a, "b": b})
    assert found.robust("a", "b").sum(1).tolist() == [2, 2, 0]
    assert robust(found, "a", "b") == Figure(
        pytest.approx(1.0), 3, pytest.approx(float(torch.tensor([1.0, 1, 1, 1]).div(3).std()))
    )


def test_restarts_of_a_randomised_network_keep_the_one_that_leaves_the_fewest_draws() -> None:
    model = Shaky(0.3)
    _, x, y = images(40)
    shares = [
        judge_images(model, x, y, [Attacker(PGD(Linf(0.1), steps=1, restarts=r))]).robust(name).double().mean(1)
        for r, name in ((1, "pgd-1 linf 0.1"), (4, "pgd-1 linf 0.1 restarts=4"))
    ]
    assert shares[1].mean() < shares[0].mean()


def test_images_is_a_loader() -> None:
    _, x, y = images(10)
    shares = list(Images(x, y, 4).epoch(0))
    assert [share.total for share in shares] == [4, 4, 2]
    assert torch.equal(torch.cat([share.batch.x for share in shares]), x)
    assert isinstance(shares[0].batch, Batch) and shares[-1].batch.index.tolist() == [8, 9]
    with attacking(Linear.random(5, SHAPE)):
        assert [len(share.batch.y) for share in Images(x, y, 4).epoch(0, start=2)] == [2]
