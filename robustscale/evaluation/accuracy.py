"""Which images a network gets right, clean and attacked: per example, in float32, each image exactly once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robustscale.attacks.base import attacking, require_pair
from robustscale.errors import InputError
from robustscale.evaluation.verdicts import NONFINITE, Asked, attacked, classify
from robustscale.evaluation.words import Attacker, threat_of
from robustscale.noise import randomised
from robustscale.types import Backend, Batch, Loader

__all__ = ["DRAWS", "NONFINITE", "Examples", "Report", "classify", "exact_float32", "judge", "num_draws"]

DRAWS = 10
"""Predictions of each image that are judged where the network is randomised, unless told otherwise."""

Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Examples:
    """Every image of a data set, in order of its id; equal on all workers. All tensors int64, on the CPU.

    Predictions are (N,), or (N, draws) if a randomised network was asked several times. Draw d is the same network
    without randomness in every column.
    """

    index: Tensor
    """(N,)."""
    label: Tensor
    """(N,)."""
    predicted: Tensor
    """Of the clean image; NONFINITE where its logits were not finite."""
    adversarial: Mapping[str, Tensor]
    """Under each attack, by its name; NONFINITE where the attack met anything that is not finite."""

    @property
    def right(self) -> Tensor:
        """Bool, as `predicted`: the clean image is classified correctly."""
        return self._right(self.predicted)

    def robust(self, *names: str) -> Tensor:
        """Bool, as `predicted`: correct when clean and under every one of these attacks.

        Under a targeted attack too, correct means: still classified as its label, not: kept away from the target. Of
        several draws an image is given those under the attack that leaves the fewest right: an attacker chooses the
        attack, not the draw.
        """
        clean = self.right
        if not names:
            return clean
        left = torch.stack([clean & self._right(self.adversarial[name]) for name in names])
        worst = left.view(len(names), len(clean), -1).sum(2).argmin(0)
        return left[worst, torch.arange(len(clean))]

    def _right(self, predicted: Tensor) -> Tensor:
        return predicted == self.label.view(-1, *(1,) * (predicted.dim() - 1))


@contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """Plain float32: no autocast, no TF32 (10 bits of mantissa) in products or convolutions. Restored on leaving.

    An attack in lower precision is weaker, so that the figure it gives is too good.
    """
    backends: Any = torch.backends
    slots = [
        backends.cuda.matmul,
        backends.cudnn.conv,
        backends.cudnn.rnn,
        backends.mkldnn.matmul,
        backends.mkldnn.conv,
    ]
    before = [slot.fp32_precision for slot in slots]
    try:
        for slot in slots:
            slot.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for slot, precision in zip(slots, before, strict=True):
            slot.fp32_precision = precision


def num_draws(model: nn.Module, wanted: int | None = None) -> int:
    """How often each image is asked: once, or, of a randomised network, DRAWS times. Raises InputError where several
    draws of a network without randomness are wanted."""
    if randomised(model):
        return DRAWS if wanted is None else wanted
    if wanted not in (None, 1):
        raise InputError(f"evaluation.draws: {wanted} of a network that draws nothing; leave it out")
    return 1


def judge(
    model: nn.Module,
    loader: Loader,
    attacks: Mapping[str, Attacker],
    backend: Backend,
    seed: int,
    *,
    draws: int | None = None,
    expected: Tensor | None = None,
    report: Report | None = None,
) -> Examples:
    """Classify every image of the loader, clean and under each attack, on all workers together.

    `loader.num_examples` counts the images over all workers; `expected` holds their ids, by default any that differ.
    The network is in eval mode meanwhile. An attack's draws depend on (seed, id, its name) alone, and so do those of a
    randomised network, which is asked `draws` times (see `num_draws`): neither the batch nor the number of workers
    changes a verdict, but for the rounding of kernels that sum in another order. A randomised network is attacked as
    the attack says: wrap it in EOT. `report` gets {"event": "judge", "attack", "done", "total"} after each pass over a
    batch, in images times passes.

    Raises InputError if a parameter or an image is not float32, an image is outside [0, 1], an attack leaves its
    ball or the box, or an image is missing or comes twice.
    """
    _check_attacks(attacks)
    _check_parameters(model)
    draws = num_draws(model, draws)
    done, total = 0, loader.num_examples * (1 + len(attacks))
    tables = [torch.empty((0, 2 + draws * (1 + len(attacks))), dtype=torch.int64)]
    with attacking(model, relax=False) as f, exact_float32(backend.device):
        asked = Asked(f, seed, draws, randomised(model))
        for share in loader.epoch(0):
            columns = [share.batch.index[:, None], share.batch.y[:, None]]
            for name, predicted in _verdicts(asked, share.batch, attacks):
                columns.append(predicted)
                done += share.total
                if report is not None:
                    report({"event": "judge", "attack": name, "done": done, "total": total})
            tables.append(torch.cat([column.to(torch.int64) for column in columns], 1).cpu())
    table = _gather(torch.cat(tables), backend)
    _check_ids(table[:, 0], loader.num_examples, expected)
    table = table[torch.argsort(table[:, 0])]
    clean, *adversarial = (part if draws > 1 else part[:, 0] for part in table[:, 2:].split(draws, 1))
    return Examples(table[:, 0], table[:, 1], clean, dict(zip(attacks, adversarial, strict=True)))


def _verdicts(asked: Asked, batch: Batch, attacks: Mapping[str, Attacker]) -> Iterator[tuple[str, Tensor]]:
    if len(batch.y) == 0:
        # A worker's share of a small batch may be empty, and not every layer takes an empty input.
        yield from ((name, batch.y[:, None].expand(-1, asked.draws)) for name in ("clean", *attacks))
        return
    _check_images(batch)
    yield "clean", asked.predictions(batch.x, batch.index)
    for name, attacker in attacks.items():
        yield name, attacked(asked, batch, name, attacker)


def _check_attacks(attacks: Mapping[str, Attacker]) -> None:
    for name, attacker in attacks.items():
        threat_of(attacker.attack)
        require_pair(attacker.attack, attacker.goal, f"attack {name!r}")
        if name in ("index", "label", "clean"):
            raise InputError(f"attack {name!r}: this is the name of a column of the result; choose another")


def _check_parameters(model: nn.Module) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise InputError(f"model: {name} is {tensor.dtype}; evaluation is in float32, call model.float() first")


def _check_images(batch: Batch) -> None:
    if batch.x.dtype != torch.float32:
        raise InputError(f"images: are {batch.x.dtype}; evaluation is in float32, so load them as float32")
    # Written so that NaN is refused as well.
    if not bool(((batch.x >= 0) & (batch.x <= 1)).all()):
        raise InputError("images: a pixel is outside [0, 1]; normalise in the model's first layer, not in the loader")


def _gather(table: Tensor, backend: Backend) -> Tensor:
    """The rows of all workers, (n, columns) on the CPU. Workers may have different numbers of rows."""
    counts = backend.gather(torch.tensor([len(table)], device=backend.device)).flatten().tolist()
    padded = table.new_zeros((max(counts), table.shape[1]))
    padded[: len(table)] = table
    every = backend.gather(padded.to(backend.device)).cpu()
    return torch.cat([part[:count] for part, count in zip(every, counts, strict=True)])


def _check_ids(index: Tensor, num_examples: int, expected: Tensor | None) -> None:
    if num_examples == 0:
        raise InputError("evaluation: the data set has no images; give it at least one")
    distinct = index.unique()
    wanted = distinct if expected is None else expected.cpu().to(torch.int64).unique()
    if not len(index) == len(distinct) == len(wanted) == num_examples or not torch.equal(distinct, wanted):
        repeated, missing = len(index) - len(distinct), int((~torch.isin(wanted, distinct)).sum())
        raise InputError(
            f"evaluation: {len(index)} verdicts for {num_examples} images, {repeated} repeated, {missing} missing; "
            "the loader must give every image exactly once over all workers"
        )
