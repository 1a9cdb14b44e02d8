"""The words that every file shares."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from robustscale.noise import Noise

Score = Callable[[Tensor], Tensor]
"""x (N, C, H, W) -> (N,): larger is worse for the model. All that an attack knows of the model."""

Forward = Callable[..., Tensor]
"""The model: images (N, C, H, W) in [0, 1] -> logits (N, classes).
Conditional models take (N,) conditions after the images."""


class Batch(NamedTuple):
    """Examples on the device; `Batch.of` makes one of plain labelled images."""

    x: Tensor
    """(N, C, H, W) float32 in [0, 1]; never normalised."""
    y: Tensor
    """(N,) int64 class."""
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nothing uses
    """(N,) int64: the example's id in its data set, the key of all its randomness."""
    labelled: Tensor
    """(N,) bool: False where y is a pseudo-label."""
    target: Tensor
    """What the loss descends towards: y, or (N, classes) probabilities where labels are smoothed. Attacks take y."""

    @classmethod
    def of(cls, x: Tensor, y: Tensor, index: Tensor) -> Batch:
        return cls(x, y, index, torch.ones_like(y, dtype=torch.bool), y)

    def rows(self, rows: Tensor | slice) -> Batch:
        """Some of the examples."""
        return Batch(*(column[rows] for column in self))


class Share(NamedTuple):
    """One worker's part of one global batch: a whole number of logical shards, in order."""

    batch: Batch
    sizes: tuple[int, ...]
    """Examples in each of this worker's logical shards; they add up to the batch."""
    total: int
    """Examples in the global batch, over all workers."""


class Loss(NamedTuple):
    value: Tensor
    """Scalar: the mean over the examples of the batch."""
    metrics: Mapping[str, Tensor]
    """Detached scalars, left on the device; each a mean over the examples of the batch."""


class Progress(NamedTuple):
    """Where training stands. With an example's index it keys every random draw."""

    seed: int
    epoch: int
    step: int
    """Optimizer steps finished before this one, over all epochs."""
    total_steps: int


class DataSpec(NamedTuple):
    """What a network must know of its data."""

    channels: int
    height: int
    width: int
    classes: int
    mean: tuple[float, ...]
    """Per channel, in [0, 1] pixel units: the model's first layer subtracts it."""
    std: tuple[float, ...]


@runtime_checkable
class Attack(Protocol):
    """Projected ascent on a per-example score; it never sees the network, the labels or a loss."""

    def __call__(
        self, score: Score, x: Tensor, *, noise: Noise, on_step: Callable[[Tensor], None] | None = None
    ) -> Tensor: ...


class Objective(ABC):
    """A training objective: a frozen dataclass that is its own configuration.

    In two parts, the inner maximisation and the loss at what it found, so that weights may be moved in between
    (AWP). `perturb` runs on the bare module and touches no parameter gradient; `loss` runs on the model as given, so
    that gradients are averaged over the workers, and returns the mean over the batch.
    """

    @abstractmethod
    def perturb(self, model: nn.Module, batch: Batch, at: Progress) -> Any:
        """What `loss` needs of the attack: x' as a rule."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch, found: Any, at: Progress) -> Loss: ...

    def __call__(self, model: nn.Module, batch: Batch, at: Progress) -> Loss:
        return self.loss(model, batch, self.perturb(model, batch, at), at)


@runtime_checkable
class Model(Protocol):
    """A network's configuration; `build` makes the network, without its normalisation."""

    def build(self, data: DataSpec) -> nn.Module: ...


class Setting(NamedTuple):
    """What surrounds a component in its Run. A component with demands has a method `require(setting)`, which raises
    InputError; it is asked when the Run is built, and again, before Ray starts, once data and network are known."""

    model: Model
    unlabelled: bool
    """Whether the run has a source of pseudo-labelled images."""
    data: DataSpec | None = None
    network: nn.Module | None = None
    """In training mode, on the CPU."""


@runtime_checkable
class Optimizer(Protocol):
    """An optimizer's configuration."""

    def build(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer: ...


@runtime_checkable
class Schedule(Protocol):
    """A learning-rate schedule: a pure function of the step, so there is nothing to save."""

    def factor(self, step: int, total_steps: int, steps_per_epoch: int) -> float:
        """What the base learning rate is multiplied by at this step (0-based)."""
        ...


class Averaging(ABC):
    """How the weights are averaged over training: a pure function of the step."""

    reestimate: ClassVar[bool] = False
    """Whether BatchNorm's statistics are estimated anew on the training images, rather than averaged."""

    @abstractmethod
    def share(self, step: int, total_steps: int, steps_per_epoch: int) -> float:
        """Of the newest weights in the average after so many steps: w̄ ← w̄ + share (w - w̄). 1 starts anew."""


class Loader(Protocol):
    """A data set, cut for this worker."""

    num_examples: int
    num_batches: int
    """Global batches in an epoch; the same on every worker."""

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Share]:
        """This worker's share of global batches start, start + 1, ... of the given epoch."""
        ...


class Backend(Protocol):
    """What a training step needs of the machine: who we are, and how tensors are combined."""

    rank: int
    world: int
    device: torch.device

    def updater(self, network: nn.Module, run: Any) -> Any:
        """The `engine.updater.Updater` of this network, which is on the device, for this Run."""
        ...

    def gather(self, tensor: Tensor) -> Tensor:
        """(...) -> (world, ...), in rank order, on every worker. Shapes must be equal."""
        ...

    def mean_(self, tensors: list[Tensor]) -> None:
        """Average each tensor over the workers in place, in one collective."""
        ...

    def barrier(self) -> None: ...


State = dict[str, Any]
