"""On several workers BatchNorm is that of the whole batch on one: outputs, first and second derivatives, statistics."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from robustscale import parallel
from robustscale.engine.backend import LocalBackend
from robustscale.errors import InputError
from robustscale.models.basic import Basic
from robustscale.models.conditional import Conditional, DualBatchNorm2d
from robustscale.models.network import build
from robustscale.models.resnet import ResNet
from robustscale.models.resnet_cifar import ResNetCifar
from robustscale.models.slimmable import Slimmable
from robustscale.models.sync_batch_norm import over_workers, synchronise
from robustscale.noise import Noise
from robustscale.testing.collectives import counting_collectives
from robustscale.testing.gloo import run_ranks
from robustscale.types import DataSpec, Model

SPEC = DataSpec(channels=1, height=8, width=8, classes=10, mean=(0.3,), std=(0.37,))
SHARES = {1: (9,), 2: (6, 3), 4: (3, 1, 4, 1)}
"""Images of each of so many workers."""
ZERO = torch.tensor([True, False, True, False, False, True, False, False, False])
"""Images with λ = 0: in dual BatchNorm a group spans workers, of which one has both groups and one has one."""


class Gloo(LocalBackend):
    def __init__(self) -> None:
        super().__init__()
        self.rank, self.world = dist.get_rank(), dist.get_world_size()

    def mean_(self, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            dist.all_reduce(tensor)
            tensor /= self.world


class Dual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.told = type("Told", (), {"zero": None})()
        self.norm = DualBatchNorm2d(nn.BatchNorm2d(3), self.told)

    def forward(self, x: Tensor, zero: Tensor) -> Tensor:
        self.told.zero = zero
        return self.norm(x)  # type: ignore[no-any-return]


class Case(NamedTuple):
    module: Callable[[], nn.Module]
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float64
    mean: float = 0.5


CASES: dict[str, Case] = {
    "2d": Case(lambda: nn.BatchNorm2d(3), (3, 4, 4)),
    "2d float32": Case(lambda: nn.BatchNorm2d(3), (3, 4, 4), torch.float32),
    "2d far from zero": Case(lambda: nn.BatchNorm2d(3), (3, 4, 4), mean=1e4),
    "2d plain": Case(lambda: nn.BatchNorm2d(3, affine=False, track_running_stats=False), (3, 4, 4)),
    "1d": Case(lambda: nn.BatchNorm1d(3), (3,)),
    "1d of sequences": Case(lambda: nn.BatchNorm1d(3, momentum=None), (3, 5)),
    "3d": Case(lambda: nn.BatchNorm3d(2, momentum=0.3, eps=1e-3), (2, 2, 3, 2)),
    "dual": Case(Dual, (3, 4, 4)),
}
NETWORKS: dict[str, Model] = {
    "resnet_cifar": ResNetCifar(depth=8, base=4),
    "slimmable": Slimmable(model=ResNet(width=1 / 16)),
    "conditional": Conditional(model=ResNetCifar(depth=8, base=4)),
    "conditional, one set": Conditional(model=ResNetCifar(depth=8, base=4), dual_batchnorm=False),
}


class Found(NamedTuple):
    y: Tensor
    x_grad: Tensor
    grads: dict[str, Tensor]
    state: dict[str, Tensor]


def inputs(case: Case) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """x, the weights of its loss, and the condition."""
    noise = Noise.of(0, torch.arange(9), "input")
    scale = torch.linspace(0.5, 2, case.shape[0]).view(-1, *(1,) * (len(case.shape) - 1))
    x = (noise.normal(*case.shape) * scale + case.mean).to(case.dtype)
    condition = (ZERO,) if case.module is Dual else ()
    return x, noise.fold("weight").normal(*case.shape).to(case.dtype), condition


def module_of(case: Case) -> nn.Module:
    module = case.module().to(case.dtype).train()
    for number, parameter in enumerate(module.parameters()):
        nn.init.constant_(parameter, 0.7 + 0.2 * number)
    return module


def passes(module: nn.Module, x: Tensor, weight: Tensor, condition: tuple[Tensor, ...]) -> Found:
    """Of Σ sin(w y) + Σ |∇_x Σ sin(w y)|², as LLR's loss holds a gradient; twice, for the running statistics."""
    module(x, *condition)
    x = x.clone().requires_grad_()
    y = module(x, *condition)
    loss = (y * weight).sin().sum()
    (slope,) = torch.autograd.grad(loss, x, create_graph=True)
    (loss + slope.square().sum()).backward()
    assert x.grad is not None
    grads = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return Found(y.detach(), x.grad, grads, {k: v.clone() for k, v in module.state_dict().items()})


def network_of(model: Model) -> nn.Module:
    return build(model, SPEC).double().train()


def network_input(model: Model) -> tuple[Tensor, ...]:
    x = Noise.of(0, torch.arange(9), "images").uniform(1, 8, 8).double()
    return (x, (~ZERO).double()) if isinstance(model, Conditional) else (x,)


def on_rank(rank: int) -> dict[str, Any]:
    workers = Gloo()
    shares = SHARES[workers.world]
    mine = slice(sum(shares[:rank]), sum(shares[: rank + 1]))
    found: dict[str, Any] = {}
    for name, case in CASES.items():
        module = module_of(case)
        synchronise(module)
        x, weight, condition = inputs(case)
        with parallel.averaging(workers):
            found[name] = passes(module, x[mine], weight[mine], tuple(c[mine] for c in condition))
    for name, model in NETWORKS.items():
        network = network_of(model)
        synchronise(network)
        with parallel.averaging(workers):
            logits = network(*(part[mine] for part in network_input(model)))
        found[name] = (logits.detach(), {k: v.clone() for k, v in network.state_dict().items()})
    found["collectives"] = collectives(workers)
    if workers.world == 2:
        check_derivatives(workers)
    return found


def collectives(workers: Gloo) -> dict[str, list[int]]:
    """Bytes of each, where they may be and where they may not."""
    layer = nn.Sequential(nn.BatchNorm2d(3))
    synchronise(layer)
    x = torch.ones(2, 3, 4, 4, requires_grad=True)
    found = {}
    with counting_collectives() as found["outside"]:
        layer(x).sum().backward()
    with parallel.averaging(workers):
        with counting_collectives() as found["forward"]:
            y = layer(x)
        layer.eval()
        with counting_collectives() as found["eval"]:
            layer(x).sum().backward()
    with counting_collectives() as found["backward"]:
        y.sum().backward()
    return {name: [call.num_bytes for call in calls] for name, calls in found.items()}


class _Whole(torch.autograd.Function):
    """The whole batch, which every worker has a copy of: its gradient is the mean of the workers', as of a DDP
    parameter."""

    @staticmethod
    def forward(ctx: Any, workers: Gloo, x: Tensor) -> Tensor:
        ctx.workers = workers
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        return None, mean(ctx.workers, grads[0])


def mean(workers: Gloo, tensor: Tensor) -> Tensor:
    """By `over_workers`, which weighs each worker alike where their counts are equal."""
    with parallel.averaging(workers):
        return over_workers(tensor, torch.ones_like(tensor), torch.ones_like(tensor[..., :1]))[0]


def check_derivatives(workers: Gloo) -> None:
    """Against finite differences, all workers in lockstep on the same numbers, of the mean of their losses."""
    layer = nn.BatchNorm1d(2, track_running_stats=False).double()
    synchronise(layer)
    mine = slice(0, 3) if workers.rank == 0 else slice(3, 5)
    noise = Noise.of(0, torch.arange(5), "derivatives")
    weight = noise.fold("weight").normal(2).double()

    def loss(x: Tensor) -> Tensor:
        x = _Whole.apply(workers, x)[mine]  # type: ignore[no-untyped-call]
        with parallel.averaging(workers):
            y = layer(x)
        return mean(workers, (y * weight[mine]).sin().sum().reshape(1))

    x = noise.normal(2).double().requires_grad_()
    assert torch.autograd.gradcheck(loss, (x,))
    assert torch.autograd.gradgradcheck(loss, (x,), (torch.ones(1, dtype=torch.float64, requires_grad=True),))


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def ranks(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return run_ranks(on_rank, request.param)


def check_equal(whole: Found, parts: list[Found], tolerance: float) -> None:
    def close(a: Tensor, b: Tensor) -> None:
        size = float(b.abs().max())
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * max(size, 1.0))

    close(torch.cat([part.y for part in parts]), whole.y)
    close(torch.cat([part.x_grad for part in parts]), whole.x_grad)
    for name, grad in whole.grads.items():
        close(sum((part.grads[name] for part in parts), torch.zeros(())), grad)
    for part in parts:
        assert part.state.keys() == whole.state.keys()
        for name, value in whole.state.items():
            close(part.state[name].double(), value.double())


@pytest.mark.parametrize("name", CASES)
def test_several_workers_are_one(name: str, ranks: list[dict[str, Any]]) -> None:
    case = CASES[name]
    tolerance = {"2d float32": 1e-6, "2d far from zero": 1e-7}.get(name, 1e-12)
    check_equal(passes(module_of(case), *inputs(case)), [rank[name] for rank in ranks], tolerance)


@pytest.mark.parametrize("name", CASES)
def test_one_worker_is_torchs(name: str) -> None:
    case = CASES[name]
    module = module_of(case)
    synchronise(module)
    with parallel.averaging(LocalBackend()):
        found = passes(module, *inputs(case))
    tolerance = {"2d float32": 1e-6, "2d far from zero": 1e-7}.get(name, 1e-12)
    check_equal(passes(module_of(case), *inputs(case)), [found], tolerance)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_several_workers_are_those_of_one(name: str, ranks: list[dict[str, Any]]) -> None:
    network = network_of(NETWORKS[name])
    logits = network(*network_input(NETWORKS[name])).detach()
    torch.testing.assert_close(torch.cat([rank[name][0] for rank in ranks]), logits, rtol=0, atol=1e-10)
    for rank in ranks:
        torch.testing.assert_close(rank[name][1], dict(network.state_dict()), rtol=0, atol=1e-10)


def test_one_collective_forward_and_one_backward_and_none_elsewhere(ranks: list[dict[str, Any]]) -> None:
    vector = 8 * (2 * 3 + 1)
    for rank in ranks:
        assert rank["collectives"] == {"outside": [], "forward": [vector], "eval": [], "backward": [vector]}


def test_names_and_tensors_stay_and_a_copy_is_its_own() -> None:
    network = network_of(NETWORKS["conditional"])
    before = {name: value.data_ptr() for name, value in network.state_dict().items()}
    synchronise(network)
    synchronise(network)
    assert {name: value.data_ptr() for name, value in network.state_dict().items()} == before
    other = copy.deepcopy(network)
    with parallel.averaging(LocalBackend()):
        other(*network_input(NETWORKS["conditional"]))
    fresh = network_of(NETWORKS["conditional"]).state_dict()
    assert all(torch.equal(value, fresh[name]) for name, value in network.state_dict().items())


def test_half_precision_comes_back_as_it_came() -> None:
    layer = nn.BatchNorm2d(3)
    x = inputs(CASES["2d"])[0].bfloat16()
    expected = layer(x)
    synchronise(layer)
    with parallel.averaging(LocalBackend()), torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02)


def test_a_network_without_batchnorm_has_nothing_to_synchronise() -> None:
    network = network_of(Basic())
    kinds = [type(m) for m in network.modules()]
    synchronise(network)
    assert [type(m) for m in network.modules()] == kinds


def test_batchnorm_of_another_kind_is_refused() -> None:
    with pytest.raises(InputError, match=r"batch_norm: 0 is a SyncBatchNorm, .* take worker"):
        synchronise(nn.Sequential(nn.SyncBatchNorm(3)))
