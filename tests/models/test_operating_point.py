from __future__ import annotations

import pytest
import torch

from robustscale.errors import InputError
from robustscale.models.conditional import Conditional
from robustscale.models.network import build
from robustscale.models.operating_point import at_point, point_name, read_at
from robustscale.models.resnet import ResNet
from robustscale.models.slimmable import Slimmable, at_width
from robustscale.types import DataSpec

SPEC = DataSpec(channels=1, height=8, width=8, classes=10, mean=(0.3,), std=(0.37,))
MODEL = Conditional(model=Slimmable(model=ResNet(18, width=1 / 16)))


@pytest.mark.parametrize("lam, width", [(0.2, 0.5), (0.0, 1.0), (0.7, 0.75)])
def test_answers_as_the_network_asked_for_it(lam: float, width: float) -> None:
    network = build(MODEL, SPEC).eval()
    there = build(at_point(MODEL, lam=lam, width=width), SPEC).eval()
    there.load_state_dict(network.state_dict())
    x = torch.linspace(0, 1, 3 * 64).view(3, 1, 8, 8)
    with torch.no_grad(), at_width(network, width):
        expected = network(x, torch.full((3,), lam))
    assert torch.equal(there(x), expected)
    assert not torch.equal(there(x), network(x))


def test_none_changes_nothing() -> None:
    assert at_point(MODEL) is MODEL and point_name() == ""
    assert point_name(lam=0.2, width=0.5) == "-lam-0.2-width-0.5"


@pytest.mark.parametrize(
    "change, says",
    [
        ({"lam": 1.5}, "lam: 1.5 is outside"),
        ({"width": 0.6}, "width: 0.6 is not one of"),
    ],
)
def test_what_the_network_has_not_is_refused(change: dict[str, float], says: str) -> None:
    with pytest.raises(InputError, match=says):
        at_point(MODEL, **change)
    with pytest.raises(InputError, match="leave it out"):
        at_point(ResNet(), **change)


@pytest.mark.parametrize("lam, width", [(0.0, None), (0.2, 0.5), (None, 0.75)])
def test_a_network_in_memory_is_read_as_one_built_there(lam: float | None, width: float | None) -> None:
    network = build(MODEL, SPEC).eval()
    there = build(at_point(MODEL, lam=lam, width=width), SPEC).eval()
    there.load_state_dict(network.state_dict())
    x = torch.linspace(0, 1, 3 * 64).view(3, 1, 8, 8)
    with torch.no_grad():
        before = network(x)
        with read_at(network, lam=lam, width=width):
            assert torch.equal(network(x), there(x))
        assert torch.equal(network(x), before)
    with pytest.raises(InputError, match="not conditional"), read_at(build(ResNet(18, width=1 / 16), SPEC), lam=0.5):
        pass
