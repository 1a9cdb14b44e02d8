"""NoiseNet: a network whose weights are noisy, by an amount that it learns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustscale.fields import require
from robustscale.models.resnet_cifar import ResNetCifar
from robustscale.models.wrapping import send_one
from robustscale.noise import next_draw
from robustscale.types import DataSpec, Model

Granularity = Literal["layer", "channel", "element"]


@dataclass(frozen=True)
class NoiseNet:
    """w + α · std(w) · N(0, 1) in the place of every weight w of a network (PNI, He, Rakin and Fan 2019,
    https://arxiv.org/abs/1811.09310, equations 1 and 2; code: https://github.com/elliothe/CVPR_2019_PNI).

    In every convolution and linear layer, the first and the last included, while training and at inference alike; α is
    learnt, and starts at `alpha`. As in the authors' code std(w) is taken over the whole layer whatever the
    granularity, no gradient goes through it (the paper does not say), and weight decay leaves α alone. ResNet-20 has 20
    α by layer, 698 by channel, 268,336 by element. All other parameters are the plain network's, and named as there.

    The noise is drawn once a forward for the batch, the same on all workers, so that results do not depend on their
    number; the authors' DataParallel draws once a GPU. At inference an image shares its draw with its batch.

    The paper trains with ½ CE(f(x), y) + ½ CE(f(x'), y), the attack ascending the network's own prediction: objective
    pgd_at with beta 0.5 and goal.label predicted, PGD-7 at 8/255 and 0.01; the authors' script has 160 epochs, lr 0.1,
    ×0.1 at 80 and 120, and weight decay 3e-4. An attack's gradient is a random one here: evaluate with expectation over
    transformations.

    Use: to make a small network with adversarial training more robust at the cost of a few parameters.
    Breaks: where the attacker averages gradients over draws: part of what plain PGD measures is the gradient's noise
        (Athalye et al. 2018, https://arxiv.org/abs/1802.00420), and nothing keeps α from shrinking to 0.
    """

    model: Model = ResNetCifar(20)
    """The network whose weights are made noisy."""
    granularity: Granularity = "layer"
    """What has an α of its own: a layer (the paper), an output channel (the authors' best), or every weight."""
    alpha: float = 0.25
    """The value from which α is learnt."""

    def __post_init__(self) -> None:
        require(self.alpha > 0, f"alpha: {self.alpha!r} is not positive; at 0 the noise begins at none, 0.25 is usual")

    def build(self, data: DataSpec) -> nn.Module:
        """As `model` builds it. Raises InputError where it has layers with weights that cannot be made noisy."""
        network = self.model.build(data)
        for name, layer in list(network.named_modules()):
            if isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)):
                _make_noisy(name, layer, self.granularity, self.alpha)
        _require_called(network, data)
        return network


def _make_noisy(name: str, layer: nn.Module, granularity: Granularity, alpha: float) -> None:
    """Turn a layer into its noisy kind where it stands, so that its parameters keep their names."""
    require(
        type(layer) in _KINDS,
        f"model: {name} is a {type(layer).__name__}, to which noise_net can add no noise; only plain Conv2d and Linear "
        "layers will do, and other wrappers go around noise_net, not into it",
    )
    layer.__class__ = _KINDS[type(layer)]
    weight = layer.weight
    assert isinstance(weight, Tensor)
    shapes = {"layer": (1,), "channel": (len(weight), *(1,) * (weight.dim() - 1)), "element": tuple(weight.shape)}
    layer.alpha = nn.Parameter(torch.full(shapes[granularity], alpha, dtype=weight.dtype, device=weight.device))
    # As the authors do: decay would pull the noise to 0 for no reason of the loss.
    layer.alpha.weight_decay = False  # type: ignore[attr-defined]


def _require_called(network: nn.Module, data: DataSpec) -> None:
    """Raise InputError where a network reads a layer's weights past the layer: they would stay without noise."""
    called: set[nn.Module] = set()

    def note(layer: nn.Module, _inputs: object) -> None:
        called.add(layer)

    noisy = {name: m for name, m in network.named_modules() if isinstance(m, (_NoisyConv2d, _NoisyLinear))}
    handles = [layer.register_forward_pre_hook(note) for layer in noisy.values()]
    send_one(network, data)
    for handle in handles:
        handle.remove()
    for name, layer in noisy.items():
        require(layer in called, f"model: uses the weights of {name} past the layer; put noise_net inside that model")


def _noisy(weight: Tensor, alpha: Tensor, x: Tensor) -> Tensor:
    noise = next_draw(x).together().normal(*weight.shape)[0].to(weight.dtype)
    noise = noise * weight.detach().std()
    return weight + alpha * noise


class _NoisyConv2d(nn.Conv2d):
    randomised = True
    alpha: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, _noisy(self.weight, self.alpha, x), self.bias)  # type: ignore[no-any-return]


class _NoisyLinear(nn.Linear):
    randomised = True
    alpha: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, _noisy(self.weight, self.alpha, x), self.bias)


_KINDS: dict[type[nn.Module], type[_NoisyConv2d] | type[_NoisyLinear]] = {
    nn.Conv2d: _NoisyConv2d,
    nn.Linear: _NoisyLinear,
}
