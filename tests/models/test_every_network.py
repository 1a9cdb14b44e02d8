"""What a run asks of every network: the digits, a seed, a copy, a step in either precision, and a docstring."""

from __future__ import annotations

import copy

import pytest
import torch

from robustscale.config import components, encode, override
from robustscale.engine.backend import LocalBackend
from robustscale.engine.step import TrainStep
from robustscale.errors import InputError
from robustscale.models.basic import Basic
from robustscale.models.convnext import ConvNeXt
from robustscale.models.lwta import Lwta
from robustscale.models.network import Network, build
from robustscale.models.noise_net import NoiseNet
from robustscale.models.resnet import ResNet
from robustscale.models.resnet_cifar import ResNetCifar
from robustscale.models.spectral_norm import SpectralNorm
from robustscale.models.torchvision_zoo import TorchvisionZoo
from robustscale.models.vgg import VGG
from robustscale.models.vit import ViT
from robustscale.models.wide_resnet import WideResNet
from robustscale.noise import Noise, drawing, randomised
from robustscale.types import Model, Progress
from tests.engine.small import SPEC, MemoryLoader, small_run

THIN = ResNetCifar(8, base=4)
DIGITS: list[Model] = [
    Basic(channels=4, hidden=8),
    ResNet(width=0.125, activation="silu"),
    THIN,
    WideResNet(10, 1, dropout=0.3),
    ConvNeXt((1, 1), (8, 16), layer_scale=1.0),
    ViT(dimension=16, depth=1, heads=2, patch=4),
    TorchvisionZoo("shufflenet_v2_x0_5"),
    NoiseNet(THIN),
    NoiseNet(Basic(channels=4, hidden=8), "element"),
    Lwta(THIN),
    SpectralNorm(THIN),
    SpectralNorm(NoiseNet(Lwta(THIN), "channel")),
]
each = pytest.mark.parametrize("model", DIGITS, ids=lambda model: encode(model)["name"])


def test_all_components_are_here() -> None:
    """A new network is either added to DIGITS, or cannot take the digits, or has tests of its own for all of this."""
    refuses = {type(VGG())}
    own_tests = {components(Model)[name] for name in ("conditional", "slimmable")}
    assert {type(model) for model in DIGITS} | refuses | own_tests == set(components(Model).values())
    with pytest.raises(InputError, match="take model resnet_cifar or basic"):
        build(VGG(), SPEC)


def logits(network: Network) -> torch.Tensor:
    x = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), drawing(Noise.of(0, torch.arange(4), "test")):
        found: torch.Tensor = network(x)
    return found


@each
def test_weights_are_a_function_of_the_seed_and_no_generator_is_touched(model: Model) -> None:
    before = torch.random.get_rng_state()
    first, other = build(model, SPEC, seed=7), build(model, SPEC, seed=8)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(1)
    again = build(model, SPEC, seed=7).state_dict()
    assert first.training
    assert all(torch.equal(value, again[name]) for name, value in first.state_dict().items())
    assert any(not torch.equal(value, again[name]) for name, value in other.state_dict().items())


@each
def test_a_copy_computes_the_same_and_shares_nothing(model: Model) -> None:
    network = build(model, SPEC).eval()
    twin = copy.deepcopy(network)
    expected = logits(network)
    assert torch.equal(logits(twin), expected)
    with torch.no_grad():
        for tensor in [*twin.parameters(), *twin.buffers()]:
            tensor.zero_()
    assert torch.equal(logits(network), expected)


@each
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_training_step_moves_every_parameter(model: Model, precision: str) -> None:
    run = override(small_run(objective={"attack": {"steps": 1}}), {"model": encode(model), "precision": precision})
    network, loader = build(model, SPEC, run.seed), MemoryLoader(run, 0, 1)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    step = TrainStep(run, network, LocalBackend())
    metrics = step(next(iter(loader.epoch(0))), Progress(0, 0, 0, 10), 1.0).metrics
    assert metrics["loss"].isfinite()
    for name, p in network.named_parameters():
        assert p.dtype == torch.float32 and p.isfinite().all() and not torch.equal(p, before[name]), name


@each
def test_float64_stays_float64(model: Model) -> None:
    network = build(model, SPEC).double().eval()
    with torch.no_grad(), drawing(Noise.of(0, torch.arange(2), "test")):
        assert network(torch.zeros(2, 1, 8, 8, dtype=torch.float64)).dtype == torch.float64


@each
def test_randomised_networks_say_so(model: Model) -> None:
    network = build(model, SPEC).eval()
    first = logits(network)
    with torch.no_grad(), drawing(Noise.of(1, torch.arange(4), "test")):
        other = network(torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(first, other) == (not randomised(network))


@pytest.mark.parametrize("name", sorted(components(Model)))
def test_the_docstring_says_when_to_use_it_and_what_breaks_it(name: str) -> None:
    lines = [line.strip() for line in (components(Model)[name].__doc__ or "").splitlines()]
    assert sum(line.startswith("Use: ") for line in lines) == sum(line.startswith("Breaks: ") for line in lines) == 1
