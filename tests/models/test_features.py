from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from robustscale.errors import InputError
from robustscale.models.features import features, require_features
from robustscale.models.network import build
from robustscale.models.resnet_cifar import ResNetCifar
from robustscale.types import DataSpec

SPEC = DataSpec(3, 16, 16, 10, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))


class Scaled(nn.Module):
    """Logits that are not those of its linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3 * 16 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.fc(x.flatten(1))  # type: ignore[no-any-return]


class Tokens(nn.Module):
    """A linear layer that is given more than a vector an image."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)  # type: ignore[no-any-return]


def test_features_of_each_forward_in_order_with_their_graph() -> None:
    network = build(ResNetCifar(), SPEC).eval()
    last = [m for m in network.modules() if isinstance(m, nn.Linear)][-1]
    x = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with features(network) as kept:
        logits = [network(x), network(1 - x)]
    network(x)
    assert len(kept) == 2 and kept[0].requires_grad
    for h, z in zip(kept, logits, strict=True):
        assert torch.equal(last(h), z)


def test_the_hook_is_gone_after_an_error() -> None:
    network = build(ResNetCifar(), SPEC)
    with pytest.raises(ZeroDivisionError), features(network) as kept:
        raise ZeroDivisionError
    network(torch.zeros(2, 3, 16, 16))
    assert kept == []


@pytest.mark.parametrize("network", [Scaled(), Tokens()], ids=["other logits", "no vector"])
def test_networks_whose_logits_are_not_of_a_vector_are_refused(network: nn.Module) -> None:
    with pytest.raises(InputError, match="features: the network's logits"):
        require_features(network, SPEC)


def test_a_network_without_a_linear_layer_is_refused() -> None:
    with pytest.raises(InputError, match="features: the network has no linear layer"), features(nn.Conv2d(3, 10, 1)):
        pass


def test_asking_leaves_modes_buffers_and_the_global_generator_alone() -> None:
    network = build(ResNetCifar(), SPEC).train()
    before = torch.random.get_rng_state()
    require_features(network, SPEC)
    assert all(m.training for m in network.modules())
    assert torch.equal(torch.random.get_rng_state(), before)
    fresh = build(ResNetCifar(), SPEC)
    assert all(
        torch.equal(a, b) for a, b in zip(network.state_dict().values(), fresh.state_dict().values(), strict=True)
    )
