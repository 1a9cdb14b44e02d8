from __future__ import annotations

import pytest
import torch
from torch import Tensor

from robustscale.engine.backend import LocalBackend
from robustscale.errors import InputError
from robustscale.models.conditional import Conditional
from robustscale.models.interpolation import interpolated
from robustscale.models.network import Network, build
from robustscale.models.resnet_cifar import ResNetCifar
from robustscale.models.statistics import reestimate, statistics
from robustscale.noise import Noise
from robustscale.types import Batch, DataSpec

SPEC = DataSpec(channels=1, height=8, width=8, classes=10, mean=(0.3,), std=(0.37,))
MODEL = ResNetCifar(8, base=4)


def images(n: int, seed: int) -> Tensor:
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def network(seed: int) -> Network:
    made = build(MODEL, SPEC, seed)
    made(images(16, seed))  # moves BatchNorm's running statistics
    return made.eval()


def test_the_ends_are_the_networks_to_the_bit() -> None:
    a, b = network(0), network(1)
    for t, end in ((0.0, a), (1.0, b)):
        state = interpolated(a, b, t)
        assert state.keys() == end.state_dict().keys()
        assert all(torch.equal(state[name], value) for name, value in end.state_dict().items())


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_in_between_is_the_weighted_mean(t: float) -> None:
    a, b = network(0), network(1)
    first, second = a.state_dict(), b.state_dict()
    for name, value in interpolated(a, b, t).items():
        if value.is_floating_point():
            expected = (1 - t) * first[name].double() + t * second[name].double()
            torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-7)
    same = interpolated(a, a, t)
    assert all(torch.equal(same[name], value) for name, value in first.items())


def test_statistics_are_those_of_the_images() -> None:
    """Of the first BatchNorm, whose input no other one changes: mean and unbiased variance of each part."""
    moved, inputs = network(0), []
    name = next(iter(statistics(moved))).rpartition(".")[0]
    moved.get_submodule(name).register_forward_hook(lambda _m, given, _o: inputs.append(given[0]))
    parts = [
        [Batch.of(images(8, k), torch.zeros(8, dtype=torch.int64), torch.arange(8)) for k in pair]
        for pair in ((1, 2), (3, 4))
    ]
    reestimate(moved, parts, LocalBackend(), lambda index: Noise.of(0, index))
    assert len(inputs) == 4 and not any(m.training for m in moved.modules())
    mean = torch.stack([x.mean((0, 2, 3)) for x in inputs]).mean(0)
    var = torch.stack([x.var((0, 2, 3)) for x in inputs]).mean(0)
    torch.testing.assert_close(moved.get_buffer(f"{name}.running_mean"), mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moved.get_buffer(f"{name}.running_var"), var, rtol=1e-4, atol=1e-5)


def test_what_has_no_mean_is_refused() -> None:
    a, b = network(0), network(1)
    with pytest.raises(InputError, match=r"t: 1\.5 is outside"):
        interpolated(a, b, 1.5)
    with pytest.raises(InputError, match="different names or shapes"):
        interpolated(a, build(ResNetCifar(8, base=8), SPEC), 0.5)
    told = [build(Conditional(MODEL, dimensions=8), SPEC, seed) for seed in (0, 1)]
    with pytest.raises(InputError, match="matrix differs"):
        interpolated(told[0], told[1], 0.5)
    interpolated(told[0], told[0], 0.5)
    with pytest.raises(InputError, match="mean differs"):
        interpolated(a, build(MODEL, SPEC._replace(mean=(0.2,))), 0.5)
