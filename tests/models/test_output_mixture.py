from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from robustscale.errors import InputError
from robustscale.models.output_mixture import OutputMixture
from robustscale.testing.contracts import TinyNet


class Fixed(nn.Module):
    """The same logits for every image."""

    def __init__(self, *logits: float) -> None:
        super().__init__()
        self.logits = torch.tensor(logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits.expand(len(x), -1)


def linear(seed: int, scale: float = 1.0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(4, 3).double()
    with torch.no_grad():
        layer.weight.copy_(scale * torch.randn(3, 4, generator=generator))
    return layer


def images(n: int) -> Tensor:
    return torch.rand(n, 4, generator=torch.Generator().manual_seed(9)).double()


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_value(alpha: float, seed: int) -> None:
    g, h, x = linear(seed), linear(seed + 10), images(5)
    p, q = g(x).softmax(1), h(x).softmax(1)
    found = OutputMixture(g, h, alpha)(x)
    torch.testing.assert_close(found, ((1 - alpha) * p + alpha * q).log(), rtol=1e-12, atol=1e-12)
    single = OutputMixture(g, h, alpha).float()(x.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("alpha", [0.2, 0.7])
def test_gradient_goes_through_both(alpha: float) -> None:
    mixture, x = OutputMixture(linear(0, 3), linear(1, 3), alpha), images(3).requires_grad_()
    assert torch.autograd.gradcheck(mixture, (x,))
    y = torch.tensor([0, 1, 2])
    (grad,) = torch.autograd.grad(mixture(x).gather(1, y[:, None]).sum(), x)
    step = 1e-6
    for k in range(4):
        moved = torch.zeros_like(x).index_fill(1, torch.tensor([k]), step)
        ahead, behind = (mixture(x + sign * moved).gather(1, y[:, None])[:, 0] for sign in (1, -1))
        torch.testing.assert_close(grad[:, k], (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-8)


def test_nothing_underflows() -> None:
    """Where both probabilities are below the smallest number, their logarithm is still known, and has a gradient."""
    mixture = OutputMixture(Fixed(0.0, -300.0, -900.0), Fixed(0.0, -500.0, -200.0), 0.5)
    found = mixture(torch.zeros(1, 4))
    expected = torch.tensor([[0.0, -300.0, -200.0]]) + torch.tensor([[0.0, 1.0, 1.0]]) * torch.log(torch.tensor(0.5))
    torch.testing.assert_close(found, expected)
    x = images(2).float().requires_grad_()
    sharp = OutputMixture(linear(0, 1e3).float(), linear(1, 1e3).float(), 0.5)
    assert bool(torch.autograd.grad(sharp(x).sum(), x)[0].isfinite().all())


def test_the_ends_ask_one_network() -> None:
    asked: list[str] = []
    g, h = TinyNet(), TinyNet()
    g.register_forward_hook(lambda *_: asked.append("accurate"))
    h.register_forward_hook(lambda *_: asked.append("robust"))
    x = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(OutputMixture(g, h, 0.0)(x).argmax(1), g(x).argmax(1))
    OutputMixture(g, h, 1.0)(x)
    assert asked == ["accurate", "accurate", "robust"]


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_a_ratio_that_is_none_is_refused(alpha: float) -> None:
    with pytest.raises(InputError, match="alpha"):
        OutputMixture(TinyNet(), TinyNet(), alpha)
