"""Spectral normalisation: the value, and when its buffers move."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustscale.attacks.base import attacking
from robustscale.config import override
from robustscale.errors import InputError
from robustscale.models.basic import Basic
from robustscale.models.lwta import Lwta
from robustscale.models.network import build
from robustscale.models.noise_net import NoiseNet
from robustscale.models.resnet_cifar import ResNetCifar
from robustscale.models.spectral_norm import SpectralNorm
from robustscale.models.torchvision_zoo import TorchvisionZoo
from robustscale.run import Run
from robustscale.testing.gloo import run_ranks
from robustscale.types import DataSpec, Model
from tests.engine.small import small_run, train, train_rank

SPEC = DataSpec(1, 8, 8, 10, (0.3,), (0.2,))
RGB = DataSpec(3, 32, 32, 10, (0.5,) * 3, (0.25,) * 3)
SMALL = SpectralNorm(ResNetCifar(8, base=4))


def vectors(network: nn.Module) -> dict[str, Tensor]:
    found = {name: b.clone() for name, b in network.named_buffers() if name.endswith(("weight.0.u", "weight.0.v"))}
    assert len(found) == 16
    return found


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    return any(not torch.equal(before[name], after[name]) for name in before)


def layers(network: nn.Module) -> list[nn.Conv2d | nn.Linear]:
    return [m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]


def test_every_layer_has_norm_one_once_the_iteration_has_settled() -> None:
    network = build(SpectralNorm(ResNetCifar(8, base=4), iterations=50), SPEC)
    network(torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert len(layers(network)) == 8
    for layer in layers(network.eval()):
        assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("training", [True, False])
def test_values_and_gradients_are_torchs(training: bool) -> None:
    ours = build(SpectralNorm(Basic(channels=4, hidden=8)), SPEC).double().body.get_submodule("conv2")
    theirs = nn.Conv2d(4, 8, 3, padding=1).double()
    original = ours.parametrizations.weight.original
    theirs.weight.data, theirs.bias.data = original.detach().clone(), ours.bias.detach().clone()
    nn.utils.parametrizations.spectral_norm(theirs)
    theirs.parametrizations.weight[0]._u.copy_(ours.parametrizations.weight[0].u)
    theirs.parametrizations.weight[0]._v.copy_(ours.parametrizations.weight[0].v)
    x = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for layer in (ours, theirs):
        layer.train(training)
        # Two forwards before one backward, as TRADES does.
        (layer(x).square().sum() + layer(-x).abs().sum()).backward()
    torch.testing.assert_close(ours.weight, theirs.weight)
    torch.testing.assert_close(original.grad, theirs.parametrizations.weight.original.grad)


def test_vectors_move_in_training_forwards_alone() -> None:
    network, x = build(SMALL, SPEC), torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    start = vectors(network)
    with attacking(network, "eval") as f:
        f(x)
    assert not moved(start, vectors(network))
    network(x)
    assert moved(start, vectors(network))
    after = vectors(network)
    with attacking(network, "batch") as f:
        f(x)
    assert moved(after, vectors(network))


def test_eval_mode_is_a_fixed_function_of_the_state() -> None:
    network = build(SMALL, SPEC, seed=1)
    x = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    network(x)
    twin, fresh = copy.deepcopy(network), build(SMALL, SPEC, seed=2)
    fresh.load_state_dict(network.state_dict())
    with torch.no_grad():
        assert torch.equal(network.eval()(x), twin.eval()(x))
        assert torch.equal(network(x), fresh.eval()(x))


def test_autocast_leaves_the_norm_in_float32() -> None:
    layer = layers(build(SMALL, SPEC).eval())[2]
    exact = layer.weight
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.weight, exact) and layer.weight.dtype == torch.float32


def train_all(rank: int, *runs: Run) -> list[tuple[list[float], dict[str, Tensor]]]:
    """For `run_ranks`: starting the ranks takes longer than the runs."""
    return [train_rank(rank, run, 2) for run in runs]


def test_workers_hold_equal_vectors() -> None:
    """Around the randomised networks too: after every step each worker holds the state of the run."""
    inner = {"name": "lwta", "model": {"name": "resnet_cifar", "depth": 8, "base": 4}}
    model = {"name": "spectral_norm", "model": {"name": "noise_net", "model": inner}}
    fast = small_run(model=model, epochs=1, shards=2, objective={"attack": {"steps": 1}})
    deterministic = override(fast, {"reduction": "deterministic"})
    # Of moved weights the vectors differ from shard to shard.
    awp = override(deterministic, {"objective": {"name": "awp", "objective": {"attack": {"steps": 1}}}})
    first, second = run_ranks(train_all, 2, fast, deterministic, awp)
    for (_, one), (_, other) in zip(first, second, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    for run, (found, state) in zip((deterministic, awp), first[1:], strict=True):
        losses, expected, _ = train(run)
        assert any(name.endswith("weight.0.u") for name in state)
        assert found == losses
        assert all(torch.equal(state[name], value) for name, value in expected.items())


@pytest.mark.parametrize("averaging", [{"name": "ema", "decay": 0.9}, {"name": "swa", "start": 0.2}])
def test_an_average_of_weights_is_normalised_too(averaging: dict[str, Any]) -> None:
    """The mean of the vectors of several steps is shorter than 1, and would let every layer through larger."""
    run = small_run(
        model={"name": "spectral_norm", "model": {"name": "resnet_cifar", "depth": 8, "base": 4}},
        objective={"attack": {"steps": 1}},
        optimizer={"lr": 0.1},
        epochs=4,
        averaging=averaging,
    )
    network = train(run)[2].judged
    for vector in vectors(network).values():
        assert vector.norm().item() == pytest.approx(1, abs=1e-4)
    for layer in layers(network.eval()):
        assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(
    "model, message",
    [
        (SpectralNorm(SMALL), "is normalised already"),
        (SpectralNorm(TorchvisionZoo("vit_b_32")), "model.model: heads.head starts with weights that are all 0"),
    ],
    ids=["twice", "zeros"],
)
def test_layers_that_have_no_norm_are_refused(model: Model, message: str) -> None:
    with pytest.raises(InputError) as error:
        build(model, RGB)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_it_goes_around_the_randomised_ones() -> None:
    network = build(SpectralNorm(NoiseNet(Lwta(ResNetCifar(8, 4)))), SPEC)
    assert network(torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))).isfinite().all()


def test_iterations_are_counted_from_one() -> None:
    with pytest.raises(InputError, match="iterations: 0 is below 1"):
        SpectralNorm(iterations=0)
