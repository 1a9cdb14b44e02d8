"""A slim network is the network of its sliced weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustscale.errors import InputError
from robustscale.models.basic import Basic
from robustscale.models.conditional import Conditional
from robustscale.models.network import build
from robustscale.models.noise_net import NoiseNet
from robustscale.models.resnet import ResNet
from robustscale.models.resnet_cifar import ResNetCifar
from robustscale.models.slimmable import Slimmable, at_width, slimmable_part
from robustscale.models.spectral_norm import SpectralNorm
from robustscale.models.torchvision_zoo import TorchvisionZoo
from robustscale.models.wide_resnet import WideResNet
from robustscale.types import DataSpec, Model

SPEC = DataSpec(1, 8, 8, 10, (0.0,), (1.0,))
SMALL = ResNet(width=1 / 8)
X = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def by_hand(slim: nn.Module, plain: nn.Module, number: int) -> nn.Module:
    """The plain, thinner network with the first channels of the slimmable one's weights."""
    source = slimmable_part(slim).body.state_dict()
    state = {}
    for name, tensor in plain.state_dict().items():
        parent, _, leaf = name.rpartition(".")
        full = source.get(name, source.get(f"{parent}.norms.{number}.{leaf}"))
        assert full is not None, name
        state[name] = full[tuple(slice(0, size) for size in tensor.shape)]
    plain.load_state_dict(state)
    return plain


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("number, width", [(0, 0.5), (1, 0.75), (2, 1.0)])
@pytest.mark.parametrize("depth", [18, 50])
def test_a_slim_network_is_the_sliced_one(depth: Any, number: int, width: float, training: bool) -> None:
    network = build(Slimmable(ResNet(depth, width=1 / 8)), SPEC)
    with at_width(network, width), torch.no_grad():
        network(X)  # this width's running statistics move
        plain = by_hand(network, ResNet(depth, width=width / 8).build(SPEC), number).train(training)
        torch.testing.assert_close(network.train(training)(X), plain(X))


def test_at_width_1_it_is_the_network_itself() -> None:
    network, plain = build(Slimmable(SMALL), SPEC), build(SMALL, SPEC)
    with torch.no_grad():
        assert torch.equal(network(X), plain(X))


def test_each_width_moves_its_own_statistics() -> None:
    network = build(Slimmable(SMALL), SPEC)
    before = copy.deepcopy(network.state_dict())
    with at_width(network, 0.75):
        network(X)
    changed = [name for name, value in network.state_dict().items() if not torch.equal(value, before[name])]
    assert changed and all(".norms.1." in name for name in changed)


def test_the_width_is_the_networks_own_and_comes_back() -> None:
    network = build(Slimmable(SMALL, width=0.5), SPEC).eval()
    copied = copy.deepcopy(network)

    def logits(of: nn.Module) -> Tensor:
        with torch.no_grad():
            return of(X)  # type: ignore[no-any-return]

    half = logits(network)
    with at_width(network, 1.0):
        assert not torch.allclose(logits(network), half)
        assert torch.equal(logits(copied), half)
    assert torch.equal(logits(network), half)
    with pytest.raises(RuntimeError), at_width(network, 1.0):
        network(X[:, :, :0])
    assert torch.equal(logits(network), half)


@pytest.mark.parametrize("width", [0.5, 1.0])
def test_film_of_a_slim_network_keeps_each_channels_scale_and_shift(width: float) -> None:
    """γ and β of channel c are rows c and C + c of W2 at every width; the hidden units are the first."""
    network = build(Conditional(Slimmable(SMALL)), SPEC).body
    film: Any = network.get_submodule("body.body.bn1")
    c, code = round(width * 8), torch.rand(3, 128, generator=torch.Generator().manual_seed(1))
    film.condition.code = code
    hidden = nn.functional.leaky_relu(code @ film.hidden.weight[: 2 * c].T + film.hidden.bias[: 2 * c])
    rows = [*range(c), *range(8, 8 + c)]
    expected = nn.functional.leaky_relu(hidden @ film.out.weight[rows, : 2 * c].T + film.out.bias[rows])
    torch.testing.assert_close(film._modulation(c).flatten(1), expected)


@pytest.mark.parametrize("model", [SMALL, WideResNet(10, 1), TorchvisionZoo("resnet18")], ids=str)
def test_every_parameter_gets_a_gradient_whatever_the_width(model: Model) -> None:
    """DDP waits for a gradient of every parameter."""
    for wrapped in (Slimmable(model), Conditional(Slimmable(model))):
        network = build(wrapped, SPEC._replace(height=32, width=32))
        with at_width(network, 0.5):
            network(torch.rand(4, 1, 32, 32)).square().sum().backward()
        assert [name for name, p in network.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(
    "model, message",
    [
        (ResNetCifar(8, 4), "ResNetCifar does not run at width 0.5"),
        (TorchvisionZoo("mobilenet_v3_small"), "convolutions in groups"),
        (Basic(4), "has no BatchNorm2d"),
        (Conditional(SMALL), "put slimmable inside conditional"),
        (SpectralNorm(SMALL), "conv1 is a ParametrizedConv2d, .* put spectral_norm around slimmable"),
        (NoiseNet(SMALL), "conv1 is a _NoisyConv2d, which cannot be slimmed"),
        (Slimmable(SMALL), "body.conv1 is a SlimConv2d, which cannot be slimmed"),
    ],
    ids=str,
)
def test_networks_that_cannot_be_slimmed_are_refused(model: Model, message: str) -> None:
    with pytest.raises(InputError, match=rf"model\.model: .*{message}"):
        build(Slimmable(model), SPEC._replace(height=32, width=32))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"widths": (0.5, 0.75)}, "widths: "),
        ({"widths": (0.5, 0.5, 1.0)}, "widths: "),
        ({"widths": (0.0, 1.0)}, "widths: "),
        ({"widths": ()}, "widths: "),
        ({"width": 0.6}, "width: 0.6 is not one of"),
    ],
)
def test_fields_that_make_no_sense_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Slimmable(**fields)


def test_a_width_that_was_not_built_is_refused() -> None:
    with pytest.raises(InputError, match=r"width: 0\.6 is not one of"), at_width(build(Slimmable(SMALL), SPEC), 0.6):
        pass
    with pytest.raises(InputError, match="take model slimmable"), at_width(build(SMALL, SPEC), 0.5):
        pass
