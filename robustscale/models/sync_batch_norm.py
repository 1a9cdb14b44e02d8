"""BatchNorm over the global batch: on CPUs too, and differentiable twice, neither of which torch's SyncBatchNorm is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from robustscale import parallel
from robustscale.errors import InputError
from robustscale.types import Backend


def synchronise(network: nn.Module) -> None:
    """From now on, within `parallel.averaging`, BatchNorm layers in training mode normalise by the mean and variance of
    the global batch, and their running statistics follow it. One collective a forward and one a backward pass, of
    2 C + 1 numbers, in each layer.

    Elsewhere (attacks, evaluation) they are what they were. In place: parameters, buffers, hooks and names stay. A
    layer computes in float32 at least and, unlike cuDNN's, with several kernels. Raises InputError for BatchNorm of
    another kind.
    """
    for path, layer in network.named_modules():
        if hasattr(layer, "synchronised"):
            layer.synchronised = True
        elif type(layer) in _SYNCHRONISED:
            layer.__class__ = _SYNCHRONISED[type(layer)]
        elif isinstance(layer, _BatchNorm):
            raise InputError(f"batch_norm: {path} is a {type(layer).__name__}, which has no global form; take worker")


class _Synchronised(_BatchNorm):
    synchronised = True

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  torch's name
        if not self.training or parallel.workers() is None:
            return super().forward(input)
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        others = [dim for dim in range(x.dim()) if dim != 1]
        var, mean = torch.var_mean(x, others, unbiased=False)
        mean, var, count = over_workers(mean, var, x.new_full((1,), x.numel() / x.shape[1]))
        track(self, mean, var, count)
        scale = (var + self.eps).rsqrt()
        scale = scale * self.weight if self.affine else scale
        shift = self.bias - mean * scale if self.affine else -mean * scale
        each = (-1, *(1,) * (x.dim() - 2))
        return (x * scale.view(each) + shift.view(each)).to(input.dtype)


class _BatchNorm1d(_Synchronised, nn.BatchNorm1d):
    pass


class _BatchNorm2d(_Synchronised, nn.BatchNorm2d):
    pass


class _BatchNorm3d(_Synchronised, nn.BatchNorm3d):
    pass


_SYNCHRONISED = {nn.BatchNorm1d: _BatchNorm1d, nn.BatchNorm2d: _BatchNorm2d, nn.BatchNorm3d: _BatchNorm3d}


def over_workers(mean: Tensor, var: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the values of all workers, from those of this one: mean (..., C), variance (..., C) and count (..., 1), which
    may be 0. Differentiable; one collective. Outside `parallel.averaging` what was given.

    n = Σ n_w, mean = Σ n_w mean_w / n, var = Σ n_w (var_w + mean_w²) / n - mean². In float64, where the difference of
    squares of float32 statistics loses nothing that counts.
    """
    workers = parallel.workers()
    if workers is None:
        return mean, var, count
    m, v, n = (t.double() for t in (mean, var, count))
    sums = _Mean.apply(workers, torch.cat([n * m, n * (v + m.square()), n], -1))  # type: ignore[no-untyped-call]
    first, second, n = sums.split([mean.shape[-1], mean.shape[-1], 1], -1)
    # n is a mean over the workers here, 1 / world at least where there is any value.
    first, second = first / n.clamp_min(1e-9), second / n.clamp_min(1e-9)
    var = (second - first.square()).clamp_min(0).to(var.dtype)
    return first.to(mean.dtype), var, (n * workers.world).to(count.dtype)


class _Mean(torch.autograd.Function):
    """y_w = Σ_v t_v / world, on every worker w. The gradient of Σ_w L_w for t_v is Σ_w (∂L_w / ∂y_w) / world: the same
    map, so that it can be differentiated any number of times."""

    @staticmethod
    def forward(ctx: Any, workers: Backend, tensor: Tensor) -> Tensor:
        # Kept for the backward pass, which on a GPU runs in a thread that knows nothing of contexts.
        ctx.workers = workers
        mean = tensor.clone()
        workers.mean_([mean])
        return mean

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        return None, _Mean.apply(ctx.workers, grads[0])  # type: ignore[no-untyped-call]


@torch.no_grad()
def track(norm: _BatchNorm, mean: Tensor, var: Tensor, count: Tensor) -> None:
    """Running statistics of a layer, from mean (C,) and biased variance (C,) of `count` values; of one value there is
    no variance, and nothing is tracked."""
    if not norm.training or not norm.track_running_stats or norm.running_mean is None:
        return
    assert norm.running_var is not None
    momentum: float | Tensor | None = norm.momentum
    if norm.num_batches_tracked is not None:
        # Whatever the count, so that all workers count alike.
        norm.num_batches_tracked.add_(1)
        momentum = 1 / norm.num_batches_tracked if momentum is None else momentum
    assert momentum is not None
    weight = momentum * (count > 1).to(norm.running_mean.dtype)
    unbiased = var * (count / (count - 1).clamp_min(1))
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), weight)
    norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), weight)
