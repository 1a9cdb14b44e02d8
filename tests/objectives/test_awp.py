from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cluster.group import Group
from robustscale.attacks.pgd import PGD
from robustscale.errors import InputError
from robustscale.objectives.awp import Awp
from robustscale.objectives.natural import Natural
from robustscale.objectives.pgd_at import PgdAt
from robustscale.objectives.trades import Trades
from robustscale.parallel import averaging
from robustscale.testing.contracts import AT, Recording, TinyNet, gradients, random_batch
from robustscale.testing.gloo import run_ranks
from robustscale.types import Batch, Loss, Objective, Progress

Value = Callable[[nn.Module, Batch, Tensor], Tensor]
BASES: dict[str, tuple[Callable[[Any], Any], Value]] = {
    "pgd_at": (lambda attack: PgdAt(attack), lambda f, b, x: nn.functional.cross_entropy(f(x), b.y)),
    "trades": (
        lambda attack: Trades(attack, beta=3.0),
        lambda f, b, x: (
            nn.functional.cross_entropy(f(b.x), b.y)
            + 3 * (f(b.x).softmax(1) * (f(b.x).log_softmax(1) - f(x).log_softmax(1))).sum(1).mean()
        ),
    ),
}


def move(model: nn.Module, gradients: dict[str, Tensor], gamma: float) -> None:
    """w += γ ‖w‖ g / ‖g‖ in place, for tensors of more than one dimension."""
    with torch.no_grad():
        for name, w in model.named_parameters():
            if w.dim() > 1:
                g = gradients[name]
                w += gamma * w.square().sum().sqrt() * g / g.square().sum().sqrt()


def gradients_of(model: nn.Module, value: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(value, parameters), strict=True))


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("base", BASES)
def test_value(base: str, seed: int) -> None:
    """The authors' way: move the weights in place, and take the loss and its gradients there."""
    make, formula = BASES[base]
    attack = Recording(PGD(steps=3))
    batch = random_batch(6, seed, torch.float64)
    model = TinyNet(seed).double().train()
    loss = Awp(make(attack), gamma=0.02)(model, batch, AT)
    loss.value.backward()

    reference = TinyNet(seed).double().train()
    clean = formula(reference, batch, attack.found[0])
    move(reference, gradients_of(reference, clean), 0.02)
    expected = formula(reference, batch, attack.found[0])
    assert expected.item() > clean.item() + 1e-4
    torch.testing.assert_close(loss.value, expected, rtol=1e-12, atol=1e-12)
    for (name, p), g in zip(model.named_parameters(), gradients_of(reference, expected).values(), strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("objective, forwards_of_the_loss", [(PgdAt(PGD(steps=4)), 1), (Trades(PGD(steps=4)), 2)])
def test_the_loss_takes_twice_its_forwards(
    objective: Objective, forwards_of_the_loss: int, forwards: Callable[[Objective], int]
) -> None:
    assert forwards(Awp(objective)) == forwards(objective) + forwards_of_the_loss


@dataclass(frozen=True)
class Watching(Natural):
    """Notes the weights' own storage at both passes, and may fail at one of them."""

    seen: tuple[list[bool], ...]
    model: nn.Module
    fail_at: int = 0

    def loss(self, model: nn.Module, batch: Batch, found: None, at: Progress) -> Loss:
        value = super().loss(model, batch, found, at)
        self.seen[0].append(unmoved(self.model))
        if len(self.seen[0]) == self.fail_at:
            raise KeyboardInterrupt
        return value


WEIGHTS: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}


def remember(model: nn.Module) -> None:
    WEIGHTS[model] = [(p, p.detach().clone()) for p in model.parameters()]


def unmoved(model: nn.Module) -> bool:
    return all(torch.equal(p, before) for p, before in WEIGHTS[model])


def test_the_weights_are_never_moved() -> None:
    model = TinyNet().train()
    remember(model)
    seen: list[bool] = []
    loss = Awp(Watching((seen,), model), gamma=0.5)(model, random_batch(4), AT)
    assert seen == [True, True]
    loss.value.backward()
    assert unmoved(model)
    assert [id(p) for p in model.parameters()] == [id(p) for p, _ in WEIGHTS[model]]


@pytest.mark.parametrize("fail_at", [1, 2])
def test_an_exception_leaves_weights_buffers_and_gradients_as_they_were(fail_at: int) -> None:
    model = TinyNet().train()
    remember(model)
    buffers = copy.deepcopy(dict(model.named_buffers()))
    marks = {name: torch.full_like(p, 7) for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        p.grad = marks[name]
    with pytest.raises(KeyboardInterrupt):
        Awp(Watching(([],), model, fail_at), gamma=0.5)(model, random_batch(4), AT)
    assert unmoved(model) and [id(p) for p in model.parameters()] == [id(p) for p, _ in WEIGHTS[model]]
    assert all(p.grad is marks[name] and bool((p.grad == 7).all()) for name, p in model.named_parameters())
    assert fail_at == 2 or all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())


def test_running_statistics_see_the_pass_at_the_moved_weights_alone() -> None:
    attack = Recording(PGD(steps=2))
    batch = random_batch(6, dtype=torch.float64)
    model, reference = TinyNet().double().train(), TinyNet().double().train()
    Awp(PgdAt(attack))(model, batch, AT)
    first = copy.deepcopy(reference)
    move(reference, gradients_of(first, nn.functional.cross_entropy(first(attack.found[0]), batch.y)), 0.01)
    reference(attack.found[0])
    for name, expected in reference.named_buffers():
        torch.testing.assert_close(model.get_buffer(name), expected, rtol=1e-9, atol=1e-12)
    assert int(model.get_buffer("bn1.num_batches_tracked")) == 1


def test_biases_and_batchnorm_stay_and_what_is_frozen_too() -> None:
    """Every moved tensor is moved by γ of its norm: 1 % and no other."""
    model = TinyNet().train()
    model.conv2.weight.requires_grad_(False)
    given: dict[str, float] = {}

    @dataclass(frozen=True)
    class Peeking(Natural):
        def loss(self, network: nn.Module, batch: Batch, found: None, at: Progress) -> Loss:
            for name, module in network.named_modules():
                for part in ("weight", "bias"):
                    w = getattr(module, part, None)
                    if w is not None:
                        given[f"{name}.{part}"] = float((w.detach() - start[f"{name}.{part}"]).norm())
            return super().loss(network, batch, found, at)

    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    Awp(Peeking(), gamma=0.01)(model, random_batch(6), AT)
    for name, moved in given.items():
        share = 0.01 if name in ("conv1.weight", "fc.weight") else 0
        assert moved == pytest.approx(share * float(start[name].norm()), rel=1e-3, abs=1e-9), name


def test_a_layer_without_a_gradient_stays_finite() -> None:
    model = TinyNet().train()
    with torch.no_grad():
        model.fc.weight.zero_()
    loss = Awp(Natural())(model, random_batch(4), AT)
    assert bool(loss.value.isfinite())
    loss.value.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


def test_before_its_start_it_is_the_objective() -> None:
    batch, base = random_batch(4), PgdAt(PGD(steps=2))
    for step, same in ((0, True), (3, True), (4, False)):
        at = AT._replace(step=step, total_steps=10)
        moved, plain = Awp(base, start=0.4)(TinyNet().train(), batch, at), base(TinyNet().train(), batch, at)
        assert torch.equal(moved.value, plain.value) == same


def on_two_ranks(rank: int, objective: Awp, batch: Batch) -> tuple[dict[str, Tensor], bool]:
    mine = Batch(*(part.chunk(dist.get_world_size())[rank] for part in batch))
    model = DistributedDataParallel(TinyNet().double().train())
    model.broadcast_buffers = False
    before = [p.detach().clone() for p in model.parameters()]
    with averaging(Group(torch.device("cpu"))):
        found = gradients(objective, model, mine)
        # Once more: after the first backward pass DDP lays its buckets out anew.
        again = gradients(objective, model, mine)
    assert all(torch.allclose(found[name], again[name], rtol=1e-12, atol=1e-14) for name in found)
    return found, all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_two_workers_move_along_the_mean_gradient_of_both() -> None:
    batch = random_batch(8, dtype=torch.float64)
    ranks = run_ranks(on_two_ranks, 2, Awp(Natural(), gamma=0.05), batch)
    halves = [batch.rows(slice(0, 4)), batch.rows(slice(4, 8))]

    def mean_gradients(model: nn.Module) -> dict[str, Tensor]:
        parts = [gradients_of(model, nn.functional.cross_entropy(model(h.x), h.y)) for h in halves]
        return {name: (parts[0][name] + parts[1][name]) / 2 for name in parts[0]}

    model = TinyNet().double().train()
    move(model, mean_gradients(model), 0.05)
    for found, kept in ranks:
        assert kept, "the weights moved"
        for name, expected in mean_gradients(model).items():
            torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=1e-12)


def test_what_makes_no_sense_is_refused() -> None:
    for wrong, match in (
        ({"gamma": 0.0}, "gamma"),
        ({"gamma": -0.01}, "gamma"),
        ({"start": 1.0}, "start"),
        ({"objective": Awp()}, "awp inside awp"),
    ):
        with pytest.raises(InputError, match=match):
            Awp(**wrong)  # type: ignore[arg-type]
