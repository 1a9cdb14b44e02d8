"""How many floating-point operations a training step and a look at held-out images cost, counted exactly.

A multiplication with its addition counts as 2, as in torch.utils.flop_counter, whose formulas these are: products of
matrices and convolutions, forward and backward, by their shapes. All else is not counted: activations, normalisation
(spectral too), losses, an attack's own steps, the optimizer; it grows with the activations or the weights, not with
their product.

The count is of the mathematics, so equal on every device and in every precision. It is made by running the real step on
a few synthetic images, without a trace left in the network, its gradients or torch's generators.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from math import prod
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from robustscale.engine.backend import LocalBackend
from robustscale.engine.step import TrainStep
from robustscale.engine.synthetic import images_like
from robustscale.evaluation.accuracy import judge
from robustscale.evaluation.words import Attacker
from robustscale.run import Run
from robustscale.types import Backend, Batch, DataSpec, Progress, Share

LOOKED_AT = 8
"""Images of the look that is counted."""


def flops_of(function: Callable[[], object]) -> int:
    """Of one call, backward passes included."""
    counting = _Counting()  # type: ignore[no-untyped-call]
    with counting, sdpa_kernel(SDPBackend.MATH), _no_fast_path():
        function()
    return counting.total


def step_flops(run: Run, network: nn.Module, spec: DataSpec) -> float:
    """Of one training step, for each image of the global batch: attack, forwards and backwards of the objective.

    It is what a batch of three costs more than a batch of two, so that nothing counts that is paid once a batch, such
    as OAT's first image, and a triplet's distances, of all pairs, count as those of few. Expected, where the cost
    depends on draws: components that tell what they may draw, by a method `outcomes`, are counted for every outcome.
    Others are deterministic, or counted as these few images have it. `network` may be in use: a copy is counted, on its
    device.
    """
    plain = dataclasses.replace(
        run, precision="fp32", reduction="fast", clip=None, accumulation=1, batch_norm="worker", compression="none"
    )

    def count(objective: Any) -> int:
        step = TrainStep(dataclasses.replace(plain, objective=objective), copy.deepcopy(network), _backend(network))

        def of_batch(n: int) -> int:
            batch = images_like(network, spec, n)
            if run.data.unlabelled is not None:
                batch = batch._replace(labelled=batch.index % 2 == 0)
            # The learning rate 0: the weights stay, so that both batches meet the same network.
            return flops_of(lambda: step(Share(batch, (n,), n), Progress(0, 0, 0, 1), 0.0))

        return of_batch(3) - of_batch(2)  # BatchNorm takes no single image

    with _untouched(network):
        return sum(p * count(objective) for p, objective in outcomes(run.objective))


def training_flops(run: Run, network: nn.Module, spec: DataSpec) -> float:
    """`step_flops`, as a mean over the epochs of a run whose images grow in the course of it."""
    sides = Counter(run.image_size_at(epoch) for epoch in range(run.epochs)) if run.data.progressive else {}
    stages = [(count, spec._replace(height=side, width=side)) for side, count in sides.items() if side is not None]
    stages = stages or [(run.epochs, spec)]
    return sum(count * step_flops(run, network, stage) for count, stage in stages) / run.epochs


def look_flops(run: Run, network: nn.Module, spec: DataSpec) -> float:
    """Of the monitor's look, for each held-out image: clean and attacked, as `judge` asks.

    An attack with restarts goes on with the images still standing, and others end early; how many those are is taken
    from synthetic images, on which a network is wrong sooner than on real ones.
    """
    evaluation, model = run.evaluation, copy.deepcopy(network).float()
    attackers = {"monitor": Attacker(evaluation.monitor, evaluation.goal)}
    images = _Images(images_like(model, spec, LOOKED_AT))

    def look() -> None:
        judge(model, images, attackers, _backend(model), 0, draws=evaluation.draws)

    with _untouched(network):
        return flops_of(look) / LOOKED_AT


def outcomes(part: Any) -> list[tuple[float, Any]]:
    """(probability, what a component comes to when it has drawn), over all the draws that it and its parts tell of by a
    method `outcomes`; an empty answer is that nothing is drawn."""
    own = part.outcomes() if hasattr(part, "outcomes") else ()
    if own:
        return [(p * q, leaf) for p, drawn in own if p > 0 for q, leaf in outcomes(drawn)]
    if isinstance(part, tuple) and not hasattr(part, "_fields"):
        return [(p, tuple(items)) for p, items in _every([outcomes(item) for item in part])]
    names = _fields(part)
    every = _every([outcomes(getattr(part, name)) for name in names])
    if len(every) == 1:
        return [(1.0, part)]
    return [(p, dataclasses.replace(part, **dict(zip(names, values, strict=True)))) for p, values in every]


def _fields(part: Any) -> list[str]:
    is_component = dataclasses.is_dataclass(part) and not isinstance(part, type)
    return [f.name for f in dataclasses.fields(part)] if is_component else []


def _every(parts: list[list[tuple[float, Any]]]) -> list[tuple[float, list[Any]]]:
    """What independent draws come to together."""
    return [(prod(p for p, _ in chosen), [value for _, value in chosen]) for chosen in product(*parts)]


class _Counting(TorchDispatchMode):
    """Adds up what torch's formulas say of every operation.

    FlopCounterMode itself follows modules by hooks, which raise where `autograd.grad` is taken for an input.
    """

    total: int = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        packet = func._overloadpacket
        counted = packet in flop_registry
        if not counted and torch.is_inference_mode_enabled() and func._can_decompose():
            # Operations arrive whole in this mode alone; in others autograd has taken them apart before.
            with self:
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        if counted:
            self.total += flop_registry[packet](*args, **kwargs, out_val=out)
        return out


@contextmanager
def _no_fast_path() -> Iterator[None]:
    """nn.MultiheadAttention in eval mode may call one fused operation, of which there is no formula."""
    mha: Any = torch.backends.mha
    before = mha.get_fastpath_enabled()
    mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        mha.set_fastpath_enabled(before)


@contextmanager
def _untouched(network: nn.Module) -> Iterator[None]:
    """Generators are as before on leaving, and gradients may be taken, in float32, whatever surrounds the count."""
    device = _device(network)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.autocast(device.type, enabled=False), torch.enable_grad():
        yield


def _device(network: nn.Module) -> torch.device:
    return next(network.parameters()).device


def _backend(network: nn.Module) -> Backend:
    return LocalBackend(_device(network))


class _Images:
    """A loader of one batch."""

    num_batches = 1

    def __init__(self, batch: Batch) -> None:
        self.batch, self.num_examples = batch, len(batch.y)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Share]:
        yield Share(self.batch, (self.num_examples,), self.num_examples)
