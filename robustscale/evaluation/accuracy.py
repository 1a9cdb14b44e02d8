"""Which images a network gets right, clean and attacked: per example, in float32, each image exactly once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robustscale.attacks.base import attacking
from robustscale.errors import InputError
from robustscale.evaluation.words import Attacker, threat_of
from robustscale.noise import Noise
from robustscale.threat import Threat
from robustscale.types import Backend, Batch, Forward, Loader, Score

NONFINITE = -1
"""The predicted class where a logit, a score or an input gradient was NaN or infinite: never equal to a label.
argmax of NaN logits is class 0, and sign(NaN) is 0, so that a broken network would look right and robust."""

Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Examples:
    """Every image of a data set, in order of its id; equal on all workers. All tensors (N,) int64, on the CPU."""

    index: Tensor
    label: Tensor
    predicted: Tensor
    """Of the clean image; NONFINITE where its logits were not finite."""
    adversarial: Mapping[str, Tensor]
    """Under each attack, by its name; NONFINITE where the attack met anything that is not finite."""

    @property
    def right(self) -> Tensor:
        """(N,) bool: the clean image is classified correctly."""
        return self.predicted == self.label

    def robust(self, *names: str) -> Tensor:
        """(N,) bool: correct when clean and under every one of these attacks. Under a targeted attack too,
        correct means: still classified as its label, not: kept away from the target."""
        robust = self.right
        for name in names:
            robust = robust & (self.adversarial[name] == self.label)
        return robust


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


def judge(
    model: nn.Module,
    loader: Loader,
    attacks: Mapping[str, Attacker],
    backend: Backend,
    seed: int,
    *,
    expected: Tensor | None = None,
    report: Report | None = None,
) -> Examples:
    """Classify every image of the loader, clean and under each attack, on all workers together.

    `loader.num_examples` counts the images over all workers; `expected` holds their ids, by default any that differ.
    The network is in eval mode meanwhile. An attack's draws depend on (seed, id, its name) alone, so that neither the
    batch nor the number of workers changes a verdict, but for the rounding of kernels that sum in another order.
    `report` gets {"event": "judge", "attack", "done", "total"} after each pass over a batch, in images times passes.

    Raises InputError if a parameter or an image is not float32, an image is outside [0, 1], an attack leaves its
    ball or the box, or an image is missing or comes twice.
    """
    _check_attacks(attacks)
    _check_parameters(model)
    done, total = 0, loader.num_examples * (1 + len(attacks))
    tables = [torch.empty((0, 3 + len(attacks)), dtype=torch.int64)]
    with attacking(model) as f, exact_float32(backend.device):
        for share in loader.epoch(0):
            columns = [share.batch.index, share.batch.y]
            for name, predicted in _verdicts(f, share.batch, attacks, seed):
                columns.append(predicted)
                done += share.total
                if report is not None:
                    report({"event": "judge", "attack": name, "done": done, "total": total})
            tables.append(torch.stack([column.to(torch.int64) for column in columns], 1).cpu())
    table = _gather(torch.cat(tables), backend)
    _check_ids(table[:, 0], loader.num_examples, expected)
    table = table[torch.argsort(table[:, 0])]
    adversarial = {name: table[:, 3 + k] for k, name in enumerate(attacks)}
    return Examples(table[:, 0], table[:, 1], table[:, 2], adversarial)


def _verdicts(f: Forward, batch: Batch, attacks: Mapping[str, Attacker], seed: int) -> Iterator[tuple[str, Tensor]]:
    if len(batch.y) == 0:
        # A worker's share of a small batch may be empty, and not every layer takes an empty input.
        yield from ((name, batch.y) for name in ("clean", *attacks))
        return
    _check_images(batch)
    yield "clean", classify(f, batch.x)
    for name, attacker in attacks.items():
        yield name, _attacked(f, batch, name, attacker, seed)


def classify(f: Forward, x: Tensor) -> Tensor:
    """(N,) predicted classes; NONFINITE where a logit is not finite."""
    with torch.no_grad():
        logits = f(x)
    return torch.where(logits.isfinite().all(1), logits.argmax(1), NONFINITE)


def _attacked(f: Forward, batch: Batch, name: str, attacker: Attacker, seed: int) -> Tensor:
    """Restarts are judged one by one: the one with the highest loss may be right where another fooled the network."""
    noise = Noise.of(seed, batch.index, "evaluate", name)
    restarts = getattr(attacker.attack, "restarts", 1)
    if restarts == 1:
        return _attacked_once(f, batch, name, attacker, noise, noise)
    once = Attacker(dataclasses.replace(attacker.attack, restarts=1), attacker.goal)  # type: ignore[type-var]
    verdict = batch.y
    for restart in range(restarts):
        start = noise.fold("restart", restart) if restart else noise
        predicted = _attacked_once(f, batch, name, once, noise, start)
        verdict = torch.where(verdict == batch.y, predicted, verdict)
    return verdict


def _attacked_once(f: Forward, batch: Batch, name: str, attacker: Attacker, goal: Noise, start: Noise) -> Tensor:
    """`goal` draws the target, one for all restarts; `start` the start."""
    broken = torch.zeros(len(batch.y), dtype=torch.bool, device=batch.x.device)
    score = _watched(attacker.goal.score(f, batch.x, batch.y, goal), broken)
    x_adv = attacker.attack(score, batch.x, noise=start)
    broken |= ~x_adv.isfinite().flatten(1).all(1)
    x_adv = torch.where(broken.view(-1, *(1,) * (x_adv.dim() - 1)), batch.x, x_adv)
    _check_inside(name, threat_of(attacker.attack), x_adv, batch)
    return torch.where(broken, NONFINITE, classify(f, x_adv))


def _watched(score: Score, broken: Tensor) -> Score:
    """The same score, which marks in `broken` each example whose score or input gradient is not finite."""

    def mark(values: Tensor) -> None:
        broken.logical_or_(~values.detach().isfinite().flatten(1).all(1))

    def watched(x: Tensor) -> Tensor:
        if x.requires_grad:
            x.register_hook(mark)
        values = score(x)
        mark(values[:, None])
        return values

    return watched


def _check_attacks(attacks: Mapping[str, Attacker]) -> None:
    for name, attacker in attacks.items():
        threat_of(attacker.attack)
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


def _check_inside(name: str, threat: Threat, x_adv: Tensor, batch: Batch) -> None:
    if x_adv.shape != batch.x.shape or x_adv.dtype != batch.x.dtype:
        raise InputError(
            f"attack {name}: gave {x_adv.dtype} {tuple(x_adv.shape)}; it must keep the images' type and shape"
        )
    # The slack: x + δ was rounded to float32, by up to 3e-8 a pixel, and `project` computed its norm in float32,
    # good to about 1e-6. The difference taken here, in float64, is exact.
    size = threat.size(x_adv.double() - batch.x.double())
    outside = size > threat.eps * (1 + 1e-5) + 1e-7
    off_box = ((x_adv < 0) | (x_adv > 1)).flatten(1).any(1)
    if bool((outside | off_box).any()):
        worst = int(torch.argmax(size + off_box * 1e9))
        what = (
            "is outside [0, 1]"
            if bool(off_box[worst])
            else f"is {float(size[worst]):.6g} away, over eps {threat.eps:.6g}"
        )
        raise InputError(
            f"attack {name}: its image {int(batch.index[worst])} {what}; end the attack with threat.project"
        )


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
