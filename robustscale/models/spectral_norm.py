"""Spectral normalisation of every layer of a network."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from robustscale.fields import require
from robustscale.models.resnet import ResNet
from robustscale.types import DataSpec, Model


@dataclass(frozen=True)
class SpectralNorm:
    """w / σ(w) in the place of every weight w of a network (Miyato et al. 2018, https://arxiv.org/abs/1802.05957).

    σ is the largest singular value of w as a matrix of output channels by all the rest, estimated by power iteration
    (algorithm 1): u and v are buffers, which a forward in training mode turns `iterations` steps further and a forward
    in eval mode leaves alone, so that attacks with batchnorm `eval` do not move them. The values are those of
    torch.nn.utils.parametrizations.spectral_norm; here autocast stays out: σ is of float32, not rounded to bfloat16.

    u and v depend on the weights and the number of forwards alone, so that they stay equal on all workers. An attack in
    BatchNorm mode `train` or `batch` turns them at each of its steps.

    Use: to bound each layer's amplification as a regulariser on top of adversarial training.
    Breaks: as a certificate: the reshaped matrix's σ is not the convolution's norm, which may be larger by a factor up
        to the kernel's side (Tsuzuku, Sato and Sugiyama 2018, https://arxiv.org/abs/1802.04034), and a BatchNorm
        behind the layer scales freely; without BatchNorm the logits are bounded, and with them the loss from below.
    """

    model: Model = ResNet()
    """The network whose weights are normalised."""
    iterations: int = 1
    """Steps of power iteration at each forward in training mode."""

    def __post_init__(self) -> None:
        require(self.iterations >= 1, f"iterations: {self.iterations} is below 1; 1 is the paper's")

    def build(self, data: DataSpec) -> nn.Module:
        """As `model` builds it. Raises InputError where a layer's weights are all 0, or are normalised already."""
        network = self.model.build(data)
        for name, layer in list(network.named_modules()):
            if isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)):
                require(
                    not parametrize.is_parametrized(layer, "weight"),
                    f"model: {name} is normalised already; leave one spectral_norm out",
                )
                _normalise(name, layer, self.iterations)
        return network


def _normalise(name: str, layer: nn.Module, iterations: int) -> None:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    require(
        weight.is_meta or bool(weight.any()),
        f"model: {name} starts with weights that are all 0, which have no norm to divide by; take another model",
    )
    parametrize.register_parametrization(layer, "weight", _Spectral(weight, iterations))


def _plain(device_type: str) -> AbstractContextManager[object]:
    """No autocast, which the meta device does not know."""
    known = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if known else nullcontext()


class _Spectral(nn.Module):
    def __init__(self, weight: Tensor, iterations: int) -> None:
        super().__init__()
        self.iterations = iterations
        self.u: Tensor
        self.v: Tensor
        matrix = weight.detach().flatten(1)
        self.register_buffer("u", F.normalize(torch.empty_like(matrix[:, 0]).normal_(), dim=0))
        self.register_buffer("v", F.normalize(torch.empty_like(matrix[0]).normal_(), dim=0))
        # So that the first forwards start from a fair estimate, and eval mode is right without any.
        self._turn(matrix, 15)

    @torch.no_grad()
    def _turn(self, matrix: Tensor, iterations: int) -> None:
        for _ in range(iterations):
            self.u.copy_(F.normalize(matrix @ self.v, dim=0))
            self.v.copy_(F.normalize(matrix.T @ self.u, dim=0))

    def forward(self, weight: Tensor) -> Tensor:
        with _plain(weight.device.type):
            matrix = weight.flatten(1)
            if self.training:
                self._turn(matrix, self.iterations)
            # Copies: a second forward turns the buffers before the first one's backward.
            return weight / (self.u.clone() @ (matrix @ self.v.clone()))
