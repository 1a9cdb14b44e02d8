"""LWTA: who wins, how often, and what passes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from robustscale.attacks.base import attacking, relaxing
from robustscale.errors import InputError
from robustscale.models.basic import Basic
from robustscale.models.lwta import Lwta
from robustscale.models.network import build
from robustscale.models.resnet_cifar import ResNetCifar
from robustscale.models.torchvision_zoo import TorchvisionZoo
from robustscale.models.wide_resnet import WideResNet
from robustscale.noise import Noise, drawing
from robustscale.types import DataSpec, Model

SPEC = DataSpec(1, 8, 8, 10, (0.3,), (0.2,))
RGB = DataSpec(3, 32, 32, 10, (0.5,) * 3, (0.25,) * 3)


def layer(**fields: float) -> nn.Module:
    network = Lwta(Basic(channels=4, hidden=8), **fields).build(SPEC)  # type: ignore[arg-type]
    return network.get_submodule("act1")


def streams(n: int, key: int = 0) -> Noise:
    return Noise.of(key, torch.arange(n), "network", 3)


def passed(module: nn.Module, h: Tensor, noise: Noise) -> Tensor:
    with drawing(noise):
        found: Tensor = module(h)
    return found


@pytest.mark.parametrize("training, temperature", [(True, 0.67), (False, 0.01)])
@pytest.mark.parametrize("shape", [(4, 12, 3, 2), (4, 12)])
@pytest.mark.parametrize("seed", range(3))
def test_the_papers_formula(seed: int, shape: tuple[int, ...], training: bool, temperature: float) -> None:
    h = 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = passed(layer(units=4).train(training), h, streams(4, seed))
    u = streams(4, seed).fold("draw", 1).uniform(*shape[1:]).double()
    expected = torch.empty_like(h)
    for n in range(4):
        for group in range(3):
            rows = slice(4 * group, 4 * group + 4)
            g = -torch.log(-torch.log(u[n, rows]))
            weight = torch.exp((h[n, rows] + g - (h[n, rows] + g).max(0).values) / temperature)
            expected[n, rows] = h[n, rows] * weight / weight.sum(0)
    torch.testing.assert_close(found, expected, rtol=1e-4 if temperature == 0.01 else 1e-5, atol=1e-5)


def test_a_unit_wins_with_the_probability_of_its_softmax_and_negative_values_pass() -> None:
    h = torch.tensor([0.0, -1.0, 1.5, 0.5]).repeat(20_000, 1)
    found = passed(layer(units=4).eval(), h[:, :, None, None], streams(20_000))[:, :, 0, 0]
    # A value of 0 cannot be told from a loser; the other three can.
    share = (found.abs() > 0.9 * h.abs()).float().mean(0)[1:]
    # Four standard deviations of a share of 20,000 draws are 0.014 at most.
    torch.testing.assert_close(share, h[0].softmax(0)[1:], rtol=0, atol=0.014)
    assert found[:, 1].min() == -1


def test_at_most_one_unit_of_a_group_stands_in_eval_mode() -> None:
    h = torch.randn(64, 8, 5, 5, generator=torch.Generator().manual_seed(0))
    found = passed(layer().eval(), h, streams(64)).unflatten(1, (-1, 2))
    share = (found / h.unflatten(1, (-1, 2))).max(2).values
    assert (share > 0.99).float().mean() > 0.98
    relaxed = passed(layer().train(), h, streams(64)).unflatten(1, (-1, 2)) / h.unflatten(1, (-1, 2))
    torch.testing.assert_close(relaxed.sum(2), torch.ones(64, 4, 5, 5))
    assert (relaxed.max(2).values > 0.99).float().mean() < 0.5


def test_draws_are_each_images_own() -> None:
    module = layer().eval()
    h = torch.randn(1, 8, 4, 4, generator=torch.Generator().manual_seed(0)).repeat(6, 1, 1, 1)
    together = passed(module, h, streams(6))
    assert not torch.equal(together[0], together[1])
    part = Noise.of(0, torch.tensor([4, 2]), "network", 3)
    assert torch.equal(passed(module, h[:2], part), together[[4, 2]])


def test_under_bfloat16_the_same_unit_wins() -> None:
    module = layer().eval()
    h = torch.randn(8, 8, 4, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = passed(module, h, streams(8))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), passed(module, h.float(), streams(8)), rtol=0.02, atol=0.02)


def test_extreme_values_stay_finite() -> None:
    h = torch.tensor([1e30, -1e30, 0.0, 0.0]).view(1, 4, 1, 1).repeat(500, 1, 40, 40).requires_grad_()
    found = passed(layer().train(), h, streams(500))
    found.sum().backward()
    assert found.isfinite().all()
    assert h.grad is not None and h.grad.isfinite().all()


@pytest.mark.parametrize(
    "model, number", [(ResNetCifar(8, 4), 7), (WideResNet(10, 1, activation="silu"), 7)], ids=["relu", "silu"]
)
def test_every_activation_is_exchanged_and_every_name_kept(model: Model, number: int) -> None:
    network, plain = build(Lwta(model), SPEC, seed=2), build(model, SPEC, seed=2)
    assert sum(type(m).__name__ == "_Lwta" for m in network.modules()) == number
    assert not any(isinstance(m, (nn.ReLU, nn.SiLU)) for m in network.modules())
    state = network.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in plain.state_dict().items()) and len(state) > 0


def test_torchvisions_activations_too() -> None:
    network = build(Lwta(TorchvisionZoo("resnet18")), RGB)
    assert not any(isinstance(m, nn.ReLU) for m in network.modules())
    assert network.training


@pytest.mark.parametrize(
    "model, message",
    [
        (Lwta(ResNetCifar(8, 4), units=3), "model.units: 3 does not divide the 4 channels of a layer"),
        (Lwta(Basic(channels=3, hidden=8)), "model.units: 2 does not divide the 3 channels of a layer"),
        (Lwta(Lwta(ResNetCifar(8, 4))), "model.model: has no ReLU or SiLU module"),
    ],
    ids=["units", "odd", "twice"],
)
def test_networks_that_do_not_fit_are_refused(model: Model, message: str) -> None:
    with pytest.raises(InputError) as error:
        build(model, RGB)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("fields", [{"units": 1}, {"temperature": 0.0}, {"temperature_eval": -0.1}])
def test_fields_that_make_no_sense_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(fields))):
        Lwta(**fields)  # type: ignore[arg-type]


def test_attacks_go_through_the_temperature_of_training_and_predictions_do_not() -> None:
    """At T = 0.01 the softmax masks its gradient."""
    network = build(Lwta(model=ResNetCifar(depth=8, base=4)), DataSpec(1, 8, 8, 10, (0.3,), (0.37,))).train()
    competitions = [m for m in network.modules() if getattr(m, "relaxed", False)]
    assert len(competitions) == 7
    with attacking(network):
        assert all(m.training for m in competitions) and not network.body.training
    with attacking(network, relax=False) as f:
        assert not any(m.training for m in competitions)
        with relaxing(f):
            assert all(m.training for m in competitions)
        assert not any(m.training for m in competitions)
    assert all(m.training for m in network.modules())
