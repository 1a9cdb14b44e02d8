"""What every attack and every objective must hold, as checks that raise AssertionError.

`tests/contracts` walks the components and runs these on each, so a new one is held without a line of test. They serve
components kept elsewhere as well: `check_inside(MyAttack(Linf(8 / 255)))`.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from robustscale.attacks.base import BatchNormMode, Goal, attacking, boundary_attack
from robustscale.config import decode, encode
from robustscale.errors import InputError
from robustscale.losses import margin
from robustscale.models.conditional import Conditional
from robustscale.models.slimmable import Slimmable
from robustscale.noise import Noise
from robustscale.testing.linear import Linear
from robustscale.threat import Linf, Threat
from robustscale.types import Attack, Batch, DataSpec, Forward, Model, Objective, Progress, Score, Setting

AT = Progress(seed=0, epoch=0, step=3, total_steps=10)
SHAPE = (1, 8, 8)
CLASSES = 10


class TinyNet(nn.Module):
    """Two convolutions with BatchNorm, and a linear layer; smooth, so that float64 comparisons are sharp."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.conv1, self.bn1 = nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
            self.conv2, self.bn2 = nn.Conv2d(6, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
            self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.bn1(self.conv1(x - 0.5)))
        h = F.silu(self.bn2(self.conv2(h)))
        return self.fc(h.mean((2, 3)))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Tiny:
    """The configuration of TinyNet."""

    def build(self, data: DataSpec) -> nn.Module:
        return TinyNet()


def network_for(objective: Objective) -> nn.Module:
    """TinyNet, or, for an objective that refuses it, TinyNet told λ, or at several widths as well: the first of them
    that it takes. Weights are always the same."""
    demand = getattr(objective, "require", lambda setting: None)
    models: tuple[Model, ...] = (Tiny(), Conditional(Tiny()), Conditional(Slimmable(Tiny())))
    model = next((m for m in models if _takes(demand, m)), Tiny())
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return model.build(DataSpec(*SHAPE, CLASSES, (0.0,), (1.0,)))


def _takes(demand: Callable[[Setting], None], model: Model) -> bool:
    try:
        demand(Setting(model, unlabelled=True))
    except InputError:
        return False
    return True


def random_batch(n: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Batch:
    """Images of uniform noise with a quarter of the pixels on the edge of the box, where projections go wrong; every
    other one pseudo-labelled."""
    index = torch.arange(n) + 1000 * seed
    noise = Noise.of(seed, index, "contract")
    x = (2 * noise.fold("x").uniform(*SHAPE) - 0.5).clamp(0, 1)
    batch = Batch.of(x.to(dtype), noise.fold("y").below(CLASSES), index)
    return batch._replace(labelled=index % 2 == 0)


@dataclass
class Recording:
    """An attack that keeps what it returned, to recompute a loss from outside."""

    inner: Attack
    found: list[Tensor] = field(default_factory=list)

    def __call__(
        self, score: Score, x: Tensor, *, noise: Noise, on_step: Callable[[Tensor], None] | None = None
    ) -> Tensor:
        self.found.append(self.inner(score, x, noise=noise, on_step=on_step))
        return self.found[-1]


@dataclass
class Probing:
    """An attack that stays where it is, and keeps the score of other images: what an objective asks to be ascended."""

    images: Tensor
    scores: list[Tensor] = field(default_factory=list)

    def __call__(
        self, score: Score, x: Tensor, *, noise: Noise, on_step: Callable[[Tensor], None] | None = None
    ) -> Tensor:
        self.scores.append(score(self.images).detach())
        return x


@contextmanager
def counting(model: nn.Module) -> Iterator[list[int]]:
    """The batch size of each forward of the module while the block runs."""
    calls: list[int] = []
    handle = model.register_forward_hook(lambda _module, inputs, _output: calls.append(len(inputs[0])))
    try:
        yield calls
    finally:
        handle.remove()


# Attacks


def in_threat(attack: Attack, threat: Threat) -> Attack:
    """The same attack with this threat model in the place of every one inside, its attacks' as well."""

    def walk(part: Any) -> Any:
        if isinstance(part, Threat):
            return threat
        if isinstance(part, tuple):
            return tuple(walk(item) for item in part)
        if not dataclasses.is_dataclass(part) or isinstance(part, type):
            return part
        return dataclasses.replace(part, **{f.name: walk(getattr(part, f.name)) for f in dataclasses.fields(part)})

    changed: Attack = walk(attack)
    return changed


def _attack_noise(batch: Batch, seed: int = 0) -> Noise:
    return Noise.of(seed, batch.index, "attack")


def attack_score(attack: Attack, f: Forward, batch: Batch) -> Score:
    """Cross entropy, or the margin for an attack that needs it."""
    goal = Goal(loss="cross_entropy" if boundary_attack(attack) is None else "margin")
    return goal.score(f, batch.x, batch.y, _attack_noise(batch))


def _as_seen(model: nn.Module, batch: Batch) -> Batch:
    """Every image labelled as the network has it: an attack that ends at the boundary leaves the wrong ones alone."""
    with torch.no_grad():
        return batch._replace(y=model(batch.x).argmax(1))


def _run(attack: Attack, model: nn.Module, batch: Batch, seed: int = 0) -> Tensor:
    with attacking(model) as f:
        return attack(attack_score(attack, f, batch), batch.x, noise=_attack_noise(batch, seed))


def shortfall(attack: Attack, threat: Threat, n: int, goal: Goal, inset: float = 0.0) -> Tensor:
    """(n,) float64: how far the attack stays below the closed-form optimum of a linear two-class model.

    In units of the distance from the clean image's gap to the optimal one: 0 is optimal, 1 is no attack at all.
    `inset` keeps images that far from the box's sides.
    """
    model = Linear.random(2, SHAPE)
    batch = random_batch(n)
    batch = batch._replace(x=batch.x * (1 - 2 * inset) + inset, y=batch.y % 2)
    noise = _attack_noise(batch)
    with attacking(model) as f:
        x_adv = attack(goal.score(f, batch.x, batch.y, noise), batch.x, noise=noise)
    # With two classes every score is monotone in one gap: away from the label, or towards the target.
    predicted = model(batch.x).argmax(1)
    up = 1 - (predicted if goal.label == "predicted" else batch.y)
    if goal.target == "least_likely":
        up = 1 - predicted
    elif isinstance(goal.target, int):
        up = torch.full_like(batch.y, goal.target)
    best = model.gap(model.worst(batch.x, 1 - up, up, threat), 1 - up, up)
    clean = model.gap(batch.x, 1 - up, up)
    return (best - model.gap(x_adv, 1 - up, up)) / (best - clean)


GOALS = (Goal(), Goal("predicted"), Goal(target=0), Goal(target=1), Goal(target="least_likely"), Goal(target="random"))


def check_inside(attack: Attack, threat: Threat) -> None:
    """Ball and box hold, up to the rounding of one float32 addition a pixel."""
    batch = random_batch(8)
    steps: list[Tensor] = []
    with attacking(TinyNet()) as f:
        score = attack_score(attack, f, batch)
        x_adv = attack(score, batch.x, noise=_attack_noise(batch), on_step=steps.append)
    assert steps, "on_step was never called"
    for x in [*steps, x_adv]:
        assert x.shape == batch.x.shape and x.dtype == batch.x.dtype and not x.requires_grad
        assert float(x.min()) >= 0 and float(x.max()) <= 1, "an attack left the box"
        slack = 2**-24 * (1 if isinstance(threat, Linf) else math.sqrt(x[0].numel()))
        assert float(threat.size(x.double() - batch.x.double()).max()) <= threat.eps + slack, "an attack left the ball"


def check_ascends(attack: Attack) -> None:
    """The attack raises the mean score of a network that is not linear."""
    model, batch = TinyNet().eval(), random_batch(8)
    batch = _as_seen(model, batch)
    score = attack_score(attack, model, batch)
    x_adv = _run(attack, model, batch)
    with torch.no_grad():
        assert score(x_adv).mean() > score(batch.x).mean()


def check_keeps_best(attack: Attack) -> None:
    """Of an attack whose class says `keeps_best`: no example ends with a lower score than any it was seen with."""
    model, batch = TinyNet().eval(), random_batch(8)
    score, seen = attack_score(attack, model, batch), []

    def watched(x: Tensor) -> Tensor:
        values = score(x)
        seen.append(values.detach())
        return values

    x_adv = attack(watched, batch.x, noise=_attack_noise(batch))
    with torch.no_grad():
        assert (score(x_adv) >= torch.stack(seen).amax(0) - 1e-6).all(), "an attack lost the best image it met"


def forwards_per_example(attack: Attack) -> float:
    """How many forwards of the network an example costs, on average over a batch of 8."""
    model, batch = TinyNet().eval(), random_batch(8)
    with counting(model) as calls:
        _run(attack, model, batch)
    return sum(calls) / 8


def check_deterministic(attack: Attack) -> None:
    batch = random_batch(8)
    first = _run(attack, TinyNet(), batch)
    torch.rand(7)  # The global generator must not matter.
    assert torch.equal(first, _run(attack, TinyNet(), batch)), "equal noise gave different images"


def check_batch_independent(attack: Attack) -> None:
    """An example's x' is the same whatever it is batched with; in float64, so that a sign can't flip by rounding."""
    model, batch = TinyNet().double().eval(), random_batch(8, dtype=torch.float64)
    together = _run(attack, model, batch)
    for part in (slice(0, 1), slice(2, 5), slice(7, 8)):
        alone = _run(attack, model, batch.rows(part))
        torch.testing.assert_close(alone, together[part], rtol=0, atol=1e-9)


def check_leaves_no_trace(attack: Attack) -> None:
    """No parameter gradient, no flag, no mode, no buffer and no input is changed by an attack."""
    model, batch = TinyNet().train(), random_batch(4)
    model.bn2.eval()
    model.conv1.weight.requires_grad_(False)
    modes = [m.training for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    state = copy.deepcopy(model.state_dict())
    x = batch.x.clone()
    _run(attack, model, batch)
    assert all(p.grad is None for p in model.parameters()), "an attack left a parameter gradient"
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items()), "a buffer changed"
    assert torch.equal(batch.x, x) and not batch.x.requires_grad, "an attack changed its input"


def check_margin_score(attack: Attack) -> None:
    """An attack knows nothing of the loss: it serves a margin as well as a cross entropy."""
    model, batch = TinyNet().eval(), random_batch(8)
    batch = _as_seen(model, batch)
    x_adv = attack(lambda x: margin(model(x), batch.y), batch.x, noise=_attack_noise(batch))
    with torch.no_grad():
        assert margin(model(x_adv), batch.y).mean() > margin(model(batch.x), batch.y).mean()


# Objectives


def check_round_trip(objective: Objective) -> None:
    assert decode(Objective, encode(objective)) == objective  # type: ignore[type-abstract]


def check_gradients(objective: Objective, precision: torch.dtype = torch.float32) -> None:
    """The loss is a finite scalar, its metrics are detached finite scalars, and every parameter gets a gradient."""
    model, batch = network_for(objective).train(), random_batch(8)
    # Under autocast, casts of weights that were cached without a graph would cut parameters off.
    with torch.autocast("cpu", dtype=precision, enabled=precision != torch.float32):
        loss = objective(model, batch, AT)
    assert loss.value.shape == () and bool(loss.value.isfinite())
    assert loss.metrics, "an objective reports at least one metric"
    for name, metric in loss.metrics.items():
        assert metric.shape == () and not metric.requires_grad and bool(metric.isfinite()), name
    assert all(p.grad is None for p in model.parameters()), "an objective ran a backward pass of its own"
    loss.value.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name
        assert float(parameter.grad.abs().sum()) > 0, f"no gradient reaches {name}"


def forwards_of_loss(objective: Objective) -> float:
    """How many forwards of the network an example costs, attack and loss, on average over a batch of 8."""
    model = network_for(objective).train()
    with counting(model) as calls:
        objective(model, random_batch(8), AT)
    return sum(calls) / 8


def check_pure(objective: Objective) -> None:
    """Equal model, batch and progress give an equal loss; another step draws other noise but no other flag."""
    batch = random_batch(8)
    values = []
    for _ in range(2):
        torch.rand(7)
        values.append(objective(network_for(objective).train(), batch, AT).value)
    assert torch.equal(*values), "an objective is not a function of model, batch and progress"


def check_batchnorm(objective: Objective, mode: BatchNormMode) -> None:
    """Of an objective whose field `batchnorm` is `mode`: the attack updates running statistics only in mode `train`."""
    model = network_for(objective).train()
    in_attack: list[bool] = []
    handle = model.register_forward_hook(lambda module, _inputs, _output: in_attack.append(not module.training))
    evaluated = dataclasses.replace(objective, batchnorm="eval")  # type: ignore[type-var]
    evaluated(model, random_batch(8), AT)
    handle.remove()
    assert any(in_attack), "the attack ran in training mode though `batchnorm` is eval"
    of_the_loss = in_attack.count(False)
    model = network_for(objective).train()
    tracked = [0]
    model.register_forward_hook(lambda *_: tracked.append(_num_tracked(model)))
    objective(model, random_batch(8), AT)
    expected = len(in_attack) if mode == "train" else of_the_loss
    updates = sum(after > before for before, after in itertools.pairwise(tracked))
    assert updates == expected, f"{mode}: {updates} updates of running statistics, not {expected}"


def _num_tracked(model: nn.Module) -> int:
    return sum(int(count) for name, count in model.named_buffers() if name.endswith("num_batches_tracked"))


def learn(objective: Objective, model: nn.Module, batch: Batch, steps: int = 8, lr: float = 0.05) -> list[float]:
    """The loss before each of a few steps of SGD on one batch, with one fixed noise."""
    optimizer = torch.optim.SGD(model.parameters(), lr)
    values = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = objective(model.train(), batch, AT)
        loss.value.backward()
        optimizer.step()
        values.append(loss.value.item())
    return values


def gradients(objective: Objective, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    model.zero_grad()
    objective(model, batch, AT).value.backward()
    bare = model.module if isinstance(model, DistributedDataParallel) else model
    return {name: p.grad.clone() for name, p in bare.named_parameters() if p.grad is not None}


def ddp_gradients(rank: int, objectives: dict[str, Objective], batch: Batch) -> dict[str, dict[str, Tensor]]:
    """For `run_ranks`: each objective's gradients on this rank's slice of the batch, averaged by DDP."""
    world = dist.get_world_size()
    mine = Batch(*(part.chunk(world)[rank] for part in batch))
    found = {}
    for name, objective in objectives.items():
        model = DistributedDataParallel(network_for(objective).double().train())
        # BatchNorm's running statistics stay each worker's own. Set here: torch 2.13 renamed the argument.
        model.broadcast_buffers = False
        found[name] = gradients(objective, model, mine)
    return found


def mean_gradients(objective: Objective, batch: Batch, world: int) -> dict[str, Tensor]:
    """What `ddp_gradients` must give: the mean over slices, in one process."""
    slices = [Batch(*(part.chunk(world)[rank] for part in batch)) for rank in range(world)]
    parts = [gradients(objective, network_for(objective).double().train(), mine) for mine in slices]
    return {name: torch.stack([part[name] for part in parts]).mean(0) for name in parts[0]}
