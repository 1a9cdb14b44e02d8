"""A network that is told λ, the weight of robustness: OAT's FiLM layers and dual BatchNorm."""

from __future__ import annotations

import copy
import fnmatch
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustscale.errors import InputError
from robustscale.fields import require
from robustscale.models.resnet import ResNet
from robustscale.models.slimmable import SwitchableBatchNorm2d
from robustscale.models.sync_batch_norm import over_workers, track
from robustscale.models.wrapping import replace
from robustscale.types import DataSpec, Model

Encoding = Literal["orthonormal", "dct", "none"]


@dataclass(frozen=True)
class Conditional:
    """f(x, λ), λ in [0, 1] for each image (OAT: Wang et al. 2020, https://arxiv.org/abs/2010.11828).

    Around any network with BatchNorm2d, each of which becomes FiLM(BN(h), λ) = γ(λ) · BN(h) + β(λ), channel by
    channel. (γ, β) = a(W2 a(W1 e(λ) + b1) + b2), a the leaky ReLU of slope 0.01, 2 C hidden units for C channels,
    weights as torch draws them: as the authors' code, so FiLM is not the identity at first. e(λ) encodes λ: row j of
    the encoding matrix for the j-th of `lambdas`. Elsewhere the paper leaves e undefined; here it is linear between
    the rows of the neighbours, and constant beyond the first and the last.

    Dual BatchNorm has one set of parameters and statistics for images with λ = 0 and another for λ > 0, chosen image
    by image. The authors put λ = 0 first in the batch and cut it there; here the images may stand in any order, at the
    same result. A group without images, or with a single value, leaves its running statistics as they were. They are
    averaged over workers like any other: a worker whose group is empty counts as one that saw no change.

    An unconditioned call f(x) is answered at `lam`. With encoding "none" and a single BatchNorm, ResNet-34 has
    31,403,978 parameters, the 31.4040 M of the authors' code.

    Use: to choose between accuracy and robustness after training, by one network for all λ (objectives oat and oats).
    Breaks: BatchNorm changes from one set to the other between λ = 0 and any λ > 0, so the curve may jump there, and
    between the λ that were trained nothing but the interpolation of e holds it.
    """

    model: Model = ResNet(34)
    encoding: Encoding = "orthonormal"
    """orthonormal: a random orthonormal matrix. dct: the matrix of the cosine transform. none: λ itself."""
    dimensions: int = 128
    """Length of e(λ); without meaning for encoding none, where it is 1."""
    lambdas: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 1.0)
    """The λ that have a row of their own in the encoding matrix: those of the objective."""
    dual_batchnorm: bool = True
    lam: float = 1.0
    """λ of an unconditioned call, and so of evaluation and export."""
    without_film: tuple[str, ...] = ("*shortcut*", "*downsample*")
    """Paths of BatchNorm layers in the network, with * for any characters, that get no FiLM: in the authors' code those
    of a ResNet's shortcuts, and the last one of a WRN, "bn1"."""

    def __post_init__(self) -> None:
        require(0 <= self.lam <= 1, f"lam: {self.lam!r} is outside [0, 1]; 1 is the most robust")
        rising = all(a < b for a, b in zip(self.lambdas, self.lambdas[1:], strict=False))
        require(
            len(self.lambdas) >= 2 and rising and all(0 <= lam <= 1 for lam in self.lambdas),
            f"lambdas: {self.lambdas!r} must be at least two values that rise within [0, 1]; (0, 0.5, 1), for example",
        )
        require(
            self.encoding == "none" or self.dimensions >= len(self.lambdas),
            f"dimensions: {self.dimensions} is below the {len(self.lambdas)} lambdas, which need a row each",
        )

    def build(self, data: DataSpec) -> nn.Module:
        """Images (N, C, H, W) and λ (N,) -> logits (N, classes). Raises InputError where no BatchNorm2d is."""
        return ConditionalNetwork(self, self.model.build(data))


class _Condition:
    """What the layers of one network are told while it runs; an object of its own, so that the layers of a copy share
    the copy's."""

    code: Tensor | None = None
    """(N, dimensions): e(λ)."""
    zero: Tensor | None = None
    """(N,) bool: λ = 0."""


class ConditionalNetwork(nn.Module):
    """What `Conditional` builds."""

    def __init__(self, model: Conditional, body: nn.Module) -> None:
        super().__init__()
        self.lam = model.lam
        self.encode = LambdaEncoding(model.encoding, model.lambdas, model.dimensions)
        self.condition = _Condition()
        require(
            not any(isinstance(m, ConditionalNetwork) for m in body.modules()),
            "model: is told λ already; leave one conditional out",
        )
        if not any(isinstance(m, nn.BatchNorm2d) for m in body.modules()):
            raise InputError(f"model: {type(model.model).__name__} has no BatchNorm2d to condition; take resnet")
        self.body = _conditioned(body, model, self.encode.dimensions, self.condition)

    def forward(self, x: Tensor, lam: Tensor | None = None) -> Tensor:
        """λ (N,), or of one element for all; outside [0, 1] it is taken for the nearer end."""
        if lam is None:
            lam = x.new_full((x.shape[0],), self.lam)
        lam = lam.expand(x.shape[0])
        self.condition.code, self.condition.zero = self.encode(lam), lam <= 0
        try:
            return self.body(x)  # type: ignore[no-any-return]
        finally:
            self.condition.code = self.condition.zero = None


def _conditioned(body: nn.Module, model: Conditional, inputs: int, condition: _Condition) -> nn.Module:
    """Every BatchNorm2d made dual, then every place of one, which may have a set for each width, followed by FiLM."""
    if model.dual_batchnorm:
        replace(body, (nn.BatchNorm2d,), lambda path, norm: DualBatchNorm2d(norm, condition))

    def film(path: str, norm: nn.Module) -> nn.Module:
        if any(fnmatch.fnmatchcase(path, pattern) for pattern in model.without_film):
            return norm
        channels = max(m.num_features for m in norm.modules() if isinstance(m, nn.BatchNorm2d))
        return FiLM(norm, channels, inputs, condition)

    replace(body, (SwitchableBatchNorm2d, DualBatchNorm2d, nn.BatchNorm2d), film)
    return body


class LambdaEncoding(nn.Module):
    """λ (N,) -> e(λ) (N, dimensions). Grid and matrix are buffers, so part of every checkpoint."""

    def __init__(self, encoding: Encoding, lambdas: tuple[float, ...], dimensions: int) -> None:
        super().__init__()
        self.dimensions = 1 if encoding == "none" else dimensions
        self.grid: Tensor
        self.matrix: Tensor | None
        self.register_buffer("grid", torch.tensor(lambdas))
        self.register_buffer("matrix", _matrix(encoding, len(lambdas), dimensions))

    def forward(self, lam: Tensor) -> Tensor:
        if self.matrix is None:
            return lam[:, None].clamp(0, 1)
        # In float32 even in a float64 network: 0.1 must meet the grid's 0.1 exactly.
        lam, grid = lam.float()[:, None], self.grid.float()
        t = (lam - grid[:-1]) / (grid[1:] - grid[:-1])
        end = torch.ones_like(lam)
        # How much of each row: it rises from the neighbour on the left, and falls towards that on the right.
        share = torch.minimum(torch.cat([end, t], 1), torch.cat([1 - t, end], 1)).clamp(0, 1)
        return share.to(self.matrix.dtype) @ self.matrix  # exactly a row where λ is on the grid


def _matrix(encoding: Encoding, rows: int, dimensions: int) -> Tensor | None:
    """The rows of the authors' (dimensions, dimensions) matrix that are used."""
    if encoding == "none":
        return None
    if encoding == "orthonormal":
        return nn.init.orthogonal_(torch.empty(rows, dimensions))
    # 2 cos(π j (2 n + 1) / 2 d), the DCT-II without normalisation, as the authors use it.
    angle = torch.arange(rows)[:, None] * (2 * torch.arange(dimensions) + 1) * (math.pi / (2 * dimensions))
    return 2 * angle.cos()


class FiLM(nn.Module):
    """γ(λ) · norm(x) + β(λ); of a slim input, (γ, β) are those of its channels.

    At a smaller width the authors take the first 2 c of all 2 C outputs of W2, so that the shift of one channel at one
    width is the scale of another at the next. Here a channel keeps its γ and its β; the hidden units are the first 2 c,
    as theirs.
    """

    def __init__(self, norm: nn.Module, channels: int, inputs: int, condition: _Condition) -> None:
        super().__init__()
        self.norm, self.condition, self.channels = norm, condition, channels
        self.hidden = nn.Linear(inputs, 2 * channels)
        self.out = nn.Linear(2 * channels, 2 * channels)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x)
        gamma, beta = self._modulation(y.shape[1]).unbind(1)
        return y * gamma[:, :, None, None] + beta[:, :, None, None]

    def _modulation(self, c: int) -> Tensor:
        """(N, 2, c)."""
        assert self.condition.code is not None, "a layer of a conditional network was called outside of it"
        code = self.condition.code.to(self.hidden.weight.dtype)
        hidden = F.leaky_relu(F.linear(code, self.hidden.weight[: 2 * c], self.hidden.bias[: 2 * c]))
        weight = self.out.weight.view(2, self.channels, -1)[:, :c, : 2 * c].reshape(2 * c, 2 * c)
        bias = self.out.bias.view(2, self.channels)[:, :c].reshape(-1)
        return F.leaky_relu(F.linear(hidden, weight, bias)).view(-1, 2, c)


class DualBatchNorm2d(nn.Module):
    """One BatchNorm for images with λ = 0 and another for λ > 0: as if each group were a batch of its own.

    Group sums are taken with masks, so nothing waits for the device to count a group. `clean` and `adversarial` hold
    parameters and statistics, and their modes decide, as in a BatchNorm2d; their own forward is never called.
    """

    synchronised = False
    """Whether, within `parallel.averaging`, a group is that of all workers."""

    def __init__(self, norm: nn.BatchNorm2d, condition: _Condition) -> None:
        super().__init__()
        require(norm.momentum is not None, "model: has BatchNorm of cumulative average (momentum None); give it 0.1")
        self.clean, self.adversarial = norm, copy.deepcopy(norm)
        self.condition = condition

    def forward(self, x: Tensor) -> Tensor:
        zero = self.condition.zero
        assert zero is not None, "a layer of a conditional network was called outside of it"
        wide = x.to(torch.promote_types(x.dtype, torch.float32))  # as BatchNorm itself computes
        if self.clean.training or self.clean.running_mean is None:
            y = self._by_batch(wide, zero)
        else:
            y = self._by_running(wide, zero)
        return y.to(x.dtype)

    def _by_batch(self, x: Tensor, zero: Tensor) -> Tensor:
        member = torch.stack([zero, ~zero]).to(x.dtype)  # (2, N)
        count = member.sum(1)
        share = member / count.clamp_min(1)[:, None]

        def group(moment: Tensor) -> Tensor:
            """(N, C) -> (2, C): the mean over each group. Not a product of matrices, which autocast would round."""
            return (share[:, :, None] * moment).sum(1)

        mean = own = group(x.mean((2, 3)))
        centred = x - _each(own, zero)
        var = group(centred.square().mean((2, 3)))
        values = count[:, None] * (x.shape[2] * x.shape[3])
        if self.synchronised:
            mean, var, values = over_workers(own, var, values)
        for number, norm in enumerate((self.clean, self.adversarial)):
            track(norm, mean[number], var[number], values[number])
        scale, shift = self._affine(var)
        if mean is not own:
            shift = shift + (own - mean) * scale
        return centred * _each(scale, zero) + _each(shift, zero)

    def _by_running(self, x: Tensor, zero: Tensor) -> Tensor:
        scale, shift = self._affine(torch.stack([self.clean.running_var, self.adversarial.running_var]))  # type: ignore[list-item]
        mean = torch.stack([self.clean.running_mean, self.adversarial.running_mean])  # type: ignore[list-item]
        return x * _each(scale, zero) + _each(shift - mean * scale, zero)

    def _affine(self, var: Tensor) -> tuple[Tensor, Tensor]:
        """(2, C) each: scale and shift of a centred input."""
        scale = (var + self.clean.eps).rsqrt()
        if not self.clean.affine:
            return scale, torch.zeros_like(scale)
        weight = torch.stack([self.clean.weight, self.adversarial.weight])
        return scale * weight, torch.stack([self.clean.bias, self.adversarial.bias])


def _each(groups: Tensor, zero: Tensor) -> Tensor:
    """(2, C) -> (N, C, 1, 1): each image's own."""
    return torch.where(zero[:, None], groups[0], groups[1])[:, :, None, None]
