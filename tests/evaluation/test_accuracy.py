from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from robustscale.attacks.base import Goal
from robustscale.attacks.fgsm import FGSM
from robustscale.attacks.pgd import PGD
from robustscale.engine.backend import LocalBackend
from robustscale.errors import InputError
from robustscale.evaluation.accuracy import NONFINITE, Examples, exact_float32, judge
from robustscale.evaluation.words import Attacker
from robustscale.noise import Noise
from robustscale.testing.gloo import run_ranks
from robustscale.testing.linear import Linear
from robustscale.threat import L2, Linf, Threat
from robustscale.types import Batch, Forward, Score, Share

SHAPE = (1, 3, 3)


class Slices:
    """A loader: rows of one tensor in global batches, cut among the workers; ids are not the row numbers."""

    def __init__(self, n: int, batch_size: int, rank: int = 0, world: int = 1, classes: int = 2) -> None:
        noise = Noise.of(0, torch.arange(n), "images")
        self.batch = Batch.of(noise.uniform(*SHAPE), noise.fold("y").below(classes), 7 + 3 * torch.arange(n))
        self.num_examples = n
        self.num_batches = -(-n // batch_size)
        self.batch_size, self.rank, self.world = batch_size, rank, world

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Share]:
        for rows in torch.arange(self.num_examples).split(self.batch_size):
            mine = rows.tensor_split(self.world)[self.rank]
            yield Share(Batch(*(part[mine] for part in self.batch)), (len(mine),), len(rows))


class GlooBackend(LocalBackend):
    def __init__(self, rank: int, world: int) -> None:
        super().__init__()
        self.rank, self.world = rank, world

    def gather(self, tensor: Tensor) -> Tensor:
        parts = [torch.empty_like(tensor) for _ in range(self.world)]
        dist.all_gather(parts, tensor)
        return torch.stack(parts)


@dataclasses.dataclass(frozen=True)
class Shift:
    """An attack of no strength: adds `by` to every pixel."""

    by: float
    clamp: bool = True
    threat: Threat = Linf(0.1)

    def __call__(
        self, score: Score, x: Tensor, *, noise: Noise, on_step: Callable[[Tensor], None] | None = None
    ) -> Tensor:
        del score, noise, on_step
        return (x + self.by).clamp(0, 1) if self.clamp else x + self.by


class Changed(nn.Module):
    """A linear network that spoils its logits where the first pixel is below `below`."""

    def __init__(self, spoil: Callable[[Tensor], Tensor], below: float = 0.5) -> None:
        super().__init__()
        self.inner = Linear.random(2, SHAPE)
        self.spoil, self.below = spoil, below

    def forward(self, x: Tensor) -> Tensor:
        logits = self.inner(x)
        return torch.where((x[:, 0, 0, 0] < self.below)[:, None], self.spoil(logits), logits)


PGD20 = {"pgd": Attacker(PGD(Linf(0.05), steps=20))}


@pytest.mark.parametrize("threat", [Linf(0.05), L2(0.15)])
def test_matches_the_closed_form_of_a_linear_network(threat: Threat) -> None:
    """With two classes PGD reaches the optimum if its steps are long enough, so every verdict is known."""
    model, loader = Linear.random(2, SHAPE), Slices(200, 64)
    x, y, *_ = loader.batch
    examples = judge(model, loader, {"pgd": Attacker(PGD(threat, steps=40, step_size=threat.eps))}, LocalBackend(), 0)
    clean = model.gap(x, y, 1 - y) < 0
    worst = model.gap(model.worst(x, y, 1 - y, threat), y, 1 - y)
    clear = worst.abs() > 1e-5
    assert not bool((~examples.robust("pgd") & (worst < -1e-6) & clean).any()), "stronger than the optimum"
    assert torch.equal(examples.right, clean)
    assert torch.equal(examples.robust("pgd")[clear], (worst < 0)[clear])
    assert 0.05 < float((worst < 0).double().mean()) < float(clean.double().mean()) - 0.05
    assert clear.double().mean() > 0.95


def verdicts(examples: Examples) -> list[list[int]]:
    columns = [examples.index, examples.label, examples.predicted, *examples.adversarial.values()]
    return torch.stack(columns).tolist()


def on_rank(rank: int, world: int, cases: list[tuple[int, int]]) -> list[list[list[int]]]:
    attacks = {"pgd": Attacker(PGD(Linf(0.05), steps=3)), "fgsm": Attacker(FGSM(Linf(0.05)))}
    backend = GlooBackend(rank, world) if world > 1 else LocalBackend()
    return [
        verdicts(judge(Linear.random(5, SHAPE), Slices(n, size, rank, world, 5), attacks, backend, 3))
        for n, size in cases
    ]


CASES = [(1, 1), (2, 5), (5, 1), (5, 2), (7, 3), (13, 4), (13, 13), (16, 6)]


@pytest.mark.parametrize("world", [2, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_every_image_once_whatever_the_number_of_workers(world: int) -> None:
    """Shares may be uneven or empty; verdicts and their order are those of one worker, on every worker."""
    alone = on_rank(0, 1, CASES)
    for n, columns in zip([n for n, _ in CASES], alone, strict=True):
        assert columns[0] == [7 + 3 * i for i in range(n)]
    assert run_ranks(on_rank, world, world, CASES) == [alone] * world


@pytest.mark.parametrize("batch_size", [1, 2, 3, 50])
def test_verdicts_do_not_depend_on_the_batch(batch_size: int) -> None:
    model = Linear.random(5, SHAPE)
    attacks = {"pgd": Attacker(PGD(Linf(0.03), steps=3, restarts=2), Goal(target="random"))}
    together = judge(model, Slices(50, 50, classes=5), attacks, LocalBackend(), 1)
    cut = judge(model, Slices(50, batch_size, classes=5), attacks, LocalBackend(), 1)
    assert verdicts(cut) == verdicts(together)


def test_order_of_the_images_does_not_matter() -> None:
    loader, reverse = Slices(20, 6), Slices(20, 6)
    reverse.batch = Batch(*(part.flip(0) for part in reverse.batch))
    model = Linear.random(2, SHAPE)
    assert verdicts(judge(model, reverse, PGD20, LocalBackend(), 0)) == verdicts(
        judge(model, loader, PGD20, LocalBackend(), 0)
    )


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_not_finite_are_wrong(value: float) -> None:
    """argmax would give class 0, and the attack would stand still."""
    loader = Slices(40, 16)
    loader.batch = loader.batch._replace(y=torch.zeros_like(loader.batch.y))
    broken = loader.batch.x[:, 0, 0, 0] < 0.5
    model = Changed(lambda logits: torch.full_like(logits, value))
    examples = judge(model, loader, {"linf": PGD20["pgd"], "l2": Attacker(PGD(L2(0.1)))}, LocalBackend(), 0)
    assert 5 < int(broken.sum()) < 35
    assert torch.equal(examples.predicted == NONFINITE, broken)
    for predicted in examples.adversarial.values():
        assert bool((predicted[broken] == NONFINITE).all())
    assert not bool(examples.right[broken].any())
    assert not bool(examples.robust("l2")[broken].any())


def test_gradients_that_are_not_finite_are_not_robustness() -> None:
    """The logits are finite and right; only the slope is NaN, so that sign(NaN) = 0 leaves the image as it is."""
    loader = Slices(40, 16)

    class Steep(Linear):
        def forward(self, x: Tensor) -> Tensor:
            logits = super().forward(x)
            broken = (x[:, 0, 0, 0] < 0.5)[:, None]
            # d sqrt at 0 is infinite, and 0 times that is NaN.
            return logits + 0 * torch.where(broken, logits - logits.detach(), 1.0).sqrt()

    model = Steep(*(p.detach() for p in Linear.random(2, SHAPE).parameters()))
    examples = judge(model, loader, {"pgd": Attacker(PGD(Linf(0.01), start="none"))}, LocalBackend(), 0)
    broken = loader.batch.x[:, 0, 0, 0] < 0.5
    assert bool(examples.right[broken].any())
    assert torch.equal(examples.adversarial["pgd"] == NONFINITE, broken)
    assert not bool(examples.robust("pgd")[broken].any())


def test_an_image_that_is_wrong_when_clean_is_not_robust() -> None:
    """Even where an attack happens to mend it, and even where the target is the label."""
    model, loader = Linear.random(2, SHAPE), Slices(60, 60)
    examples = judge(model, loader, {"to 0": Attacker(PGD(Linf(0.2)), Goal(target=0))}, LocalBackend(), 0)
    mended = ~examples.right & (examples.adversarial["to 0"] == examples.label)
    assert bool(mended.any())
    assert not bool(examples.robust("to 0")[mended].any())


@pytest.mark.parametrize(
    "attack, message",
    [
        (Shift(0.11), "is 0.11 away, over eps 0.1"),
        (Shift(0.1001), "over eps 0.1"),
        (Shift(0.09, clamp=False), "is outside"),
        (Shift(0.05, threat=L2(0.1)), "over eps 0.1"),
    ],
)
def test_refuses_an_attack_that_leaves_ball_or_box(attack: Shift, message: str) -> None:
    with pytest.raises(InputError, match=message):
        judge(Linear.random(2, SHAPE), Slices(30, 8), {"shift": Attacker(attack)}, LocalBackend(), 0)


@pytest.mark.parametrize(
    "attack", [Shift(0.1), Shift(1e-4, threat=Linf(1e-4)), Shift(0.0), Shift(0.0333, threat=L2(0.1))]
)
def test_accepts_an_attack_on_the_edge(attack: Shift) -> None:
    judge(Linear.random(2, SHAPE), Slices(300, 100), {"shift": Attacker(attack)}, LocalBackend(), 0)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda b: b._replace(index=torch.zeros_like(b.index)), "19 repeated"),
        (lambda b: Batch(*(part[:15] for part in b)), "15 verdicts for 20 images"),
        (lambda b: b._replace(index=b.index + 1), "0 repeated, 20 missing"),
        (lambda b: b._replace(x=b.x * 2), "outside"),
        (lambda b: b._replace(x=b.x - 0.5), "normalise in the model"),
        (lambda b: b._replace(x=b.x * torch.nan), "outside"),
        (lambda b: b._replace(x=b.x.double()), "float64"),
    ],
)
def test_refuses_images_that_are_not_the_data_set(change: Callable[[Batch], Batch], message: str) -> None:
    class Wrong(Slices):
        def epoch(self, epoch: int, start: int = 0) -> Iterator[Share]:
            yield Share(change(self.batch), (20,), 20)

    loader = Wrong(20, 20)
    with pytest.raises(InputError, match=message):
        judge(Linear.random(2, SHAPE), loader, PGD20, LocalBackend(), 0, expected=loader.batch.index)


def test_refuses_half_precision_empty_data_and_attacks_without_a_ball() -> None:
    with pytest.raises(InputError, match=r"weight is torch\.bfloat16"):
        judge(Linear.random(2, SHAPE).bfloat16(), Slices(4, 4), PGD20, LocalBackend(), 0)
    with pytest.raises(InputError, match="no images"):
        judge(Linear.random(2, SHAPE), Slices(0, 4), PGD20, LocalBackend(), 0)
    with pytest.raises(InputError, match="no field `threat`"):
        judge(Linear.random(2, SHAPE), Slices(4, 4), {"a": Attacker(lambda s, x, **_: x)}, LocalBackend(), 0)
    with pytest.raises(InputError, match="name of a column"):
        judge(Linear.random(2, SHAPE), Slices(4, 4), {"clean": PGD20["pgd"]}, LocalBackend(), 0)


def test_leaves_the_network_as_it_was() -> None:
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Dropout(0.5), Linear.random(2, SHAPE)).train()
    model[1].eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    first = judge(model, Slices(20, 8), PGD20, LocalBackend(), 0)
    assert [m.training for m in model] == [True, False, True]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert verdicts(judge(model, Slices(20, 20), PGD20, LocalBackend(), 0)) == verdicts(first)


def test_autocast_outside_changes_nothing() -> None:
    seen = []

    class Spy(Linear):
        def forward(self, x: Tensor) -> Tensor:
            logits = super().forward(x)
            product = x.flatten(1) @ self.weight.T
            seen.append((product.dtype, torch.backends.cudnn.conv.fp32_precision))
            return logits

    model = Spy(*(p.detach() for p in Linear.random(2, SHAPE).parameters()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        judge(model, Slices(20, 8), PGD20, LocalBackend(), 0)
    assert set(seen) == {(torch.float32, "ieee")}


def test_tf32_is_as_it_was_afterwards() -> None:
    switches: list[Any] = [torch.backends.cudnn.conv, torch.backends.cudnn.rnn]
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "tf32"
        with pytest.raises(RuntimeError, match="inside"), exact_float32(torch.device("cpu")):
            raise RuntimeError("inside")
        assert [switch.fp32_precision for switch in switches] == ["tf32", "tf32"]
        assert torch.backends.cudnn.allow_tf32, "the old switch and the new ones disagree"
    finally:
        for switch, precision in zip(switches, before, strict=True):
            switch.fp32_precision = precision


def test_an_empty_share_never_reaches_the_network() -> None:
    """Batch 5 of 5 images over 2 workers and the like; many layers refuse an empty input."""

    class Gaps(Slices):
        def epoch(self, epoch: int, start: int = 0) -> Iterator[Share]:
            for share in super().epoch(epoch, start):
                yield Share(Batch(*(part[:0] for part in share.batch)), (0,), share.total)
                yield share

    class Picky(Linear):
        def forward(self, x: Tensor) -> Tensor:
            assert len(x) > 0
            return super().forward(x)

    model = Picky(*(p.detach() for p in Linear.random(2, SHAPE).parameters()))
    assert len(judge(model, Gaps(7, 3), PGD20, LocalBackend(), 0).index) == 7


def test_reports_every_pass() -> None:
    records: list[dict[str, Any]] = []
    judge(Linear.random(2, SHAPE), Slices(10, 4), PGD20, LocalBackend(), 0, report=records.append)
    assert [(r["attack"], r["done"], r["total"]) for r in records] == [
        ("clean", 4, 20), ("pgd", 8, 20), ("clean", 12, 20), ("pgd", 16, 20), ("clean", 18, 20), ("pgd", 20, 20),
    ]  # fmt: skip


def test_restarts_count_as_broken_where_any_of_them_fools_the_network() -> None:
    """PGD itself keeps the restart with the highest loss, at which an image may be right although another fooled it."""
    loader = Slices(400, 400, classes=10)
    x, _, index, *_ = loader.batch
    linear = nn.Linear(x[0].numel(), 10)
    model = nn.Sequential(nn.Flatten(), linear).requires_grad_(False)
    linear.weight.copy_(torch.randn(linear.weight.shape, generator=torch.Generator().manual_seed(0)))
    y = model(x).argmax(1)
    loader.batch = Batch.of(x, y, index)
    attack = PGD(Linf(0.5), steps=1, step_size=1e-4, restarts=8)
    examples = judge(model, loader, {"pgd": Attacker(attack)}, LocalBackend(), 0)
    noise = Noise.of(0, index, "evaluate", "pgd")
    score = Goal().score(model, x, y, noise)
    kept = model(attack(score, x, noise=noise)).argmax(1) == y
    survived = torch.ones(len(y), dtype=torch.bool)
    for restart in range(8):
        once = PGD(Linf(0.5), steps=1, step_size=1e-4)
        x_adv = once(score, x, noise=noise.fold("restart", restart) if restart else noise)
        survived &= model(x_adv).argmax(1) == y
    assert torch.equal(examples.robust("pgd"), survived)
    assert int(survived.sum()) < int(kept.sum())


def test_restarts_have_one_target() -> None:
    """A random target is drawn per example, not per restart: it is the same threat with one restart and with four."""
    loader = Slices(60, 60, classes=10)
    targets: list[dict[int, int]] = []

    class Asked(Goal):
        def score(self, f: Forward, x: Tensor, y: Tensor, noise: Noise) -> Score:
            targets.append(dict(zip(noise.keys.tolist(), noise.fold("target").below(9).tolist(), strict=True)))
            return super().score(f, x, y, noise)

    judge(
        Linear.random(10, SHAPE),
        loader,
        {"pgd": Attacker(PGD(Linf(0.1), steps=1, restarts=4), Asked(target="random"))},
        LocalBackend(),
        0,
    )
    assert len(targets) == 4
    assert all(later.items() <= targets[0].items() for later in targets)
    assert len(targets[0]) == 60 > len(targets[1]) > 1, "restarts are for the images still standing"
