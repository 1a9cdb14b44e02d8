"""LWTA: groups of units that compete at random, in the place of activations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustscale.errors import InputError
from robustscale.fields import require
from robustscale.models.wide_resnet import WideResNet
from robustscale.models.wrapping import replace, send_one
from robustscale.noise import next_draw
from robustscale.types import DataSpec, Model


@dataclass(frozen=True)
class Lwta:
    """Stochastic local winner-takes-all (Panousis et al. 2021, https://arxiv.org/abs/2112.02671 and
    https://arxiv.org/abs/2101.01121; code: https://github.com/konpanousis/Adversarial-LWTA-AutoAttack).

    Every ReLU and SiLU module becomes a competition: neighbouring channels in groups of U, at each pixel

        h · ξ,  ξ = softmax((h + g) / T) over the group,  g ~ Gumbel(0, 1),

    h being the group's U values: a unit wins with probability softmax(h), and passes its value on, negative ones too. ξ
    is relaxed, never rounded, in training (T = 0.67) and at test, where T = 0.01 leaves one unit standing, nearly
    always; the paper writes of exact samples at test, the authors' code relaxes as here, which is followed.

    The paper's loss is an ELBO with KL(q(ξ) ‖ uniform over the group). The authors' code computes that term, and leaves
    it out of the loss that it trains; so does this. The paper's other part, the Indian buffet process that prunes
    units, is not used by that code either, nor here. Noise is drawn for each image, channel and pixel, which costs
    several times the activation that it replaces.

    A module is exchanged, a call of F.relu is not seen: torchvision's densenet, googlenet and inception_v3 would keep
    theirs. Parameters and their names are the plain network's.

    Use: as the randomised activation, to compare with ReLU under the same adversarial training (the paper: PGD-10).
    Breaks: at T = 0.01 the softmax is saturated and masks its gradient: trained with attacks at that T, a network kept
        65 % under PGD-20 with EOT at T = 0.01, and 38 % of the same images under the same attack at T = 0.67
        (`benchmarks/methods.md`); AutoAttack's standard version, which measured the published figures, goes through
        T = 0.01 and is not meant for randomised networks (https://github.com/fra31/auto-attack).
    """

    model: Model = WideResNet(34)
    """The network whose activations are exchanged."""
    units: int = 2
    """U, the units of a group; every layer's channels must be a multiple of it."""
    temperature: float = 0.67
    """T in training."""
    temperature_eval: float = 0.01
    """T of predictions. The gradients of every attack, in training and in evaluation, are those at `temperature`."""

    def __post_init__(self) -> None:
        require(self.units >= 2, f"units: {self.units} is below 2; a unit alone always wins")
        for name in ("temperature", "temperature_eval"):
            require(
                getattr(self, name) > 0, f"{name}: {getattr(self, name)!r} is not positive; 0.67 and 0.01 are usual"
            )

    def build(self, data: DataSpec) -> nn.Module:
        """As `model` builds it. Raises InputError where it has no ReLU or SiLU, or a layer's channels are not a
        multiple of `units`."""
        network = self.model.build(data)
        require(
            any(isinstance(m, (nn.ReLU, nn.SiLU)) for m in network.modules()),
            "model: has no ReLU or SiLU module for lwta to exchange; take resnet or wide_resnet",
        )
        replace(network, (nn.ReLU, nn.SiLU), lambda path, activation: _Lwta(self))
        send_one(network, data)
        return network


class _Lwta(nn.Module):
    randomised = True
    relaxed = True

    def __init__(self, config: Lwta) -> None:
        super().__init__()
        self.units, self.temperatures = config.units, (config.temperature_eval, config.temperature)

    def forward(self, h: Tensor) -> Tensor:
        channels = h.shape[1]
        if channels % self.units:
            raise InputError(f"units: {self.units} does not divide the {channels} channels of a layer; take a divisor")
        # 0 occurs among 2^24 draws, and its logarithm is infinite.
        uniform = next_draw(h).uniform(*h.shape[1:]).clamp(min=2.0**-25)
        gumbel = -(-uniform.log()).log()
        # In float32 under autocast too: at T = 0.01 the roundings of bfloat16 would choose the winner.
        t = (h.to(torch.promote_types(h.dtype, torch.float32)) + gumbel) / self.temperatures[self.training]
        xi = t.unflatten(1, (-1, self.units)).softmax(2).flatten(1, 2)
        return h * xi.to(h.dtype)  # type: ignore[no-any-return]
