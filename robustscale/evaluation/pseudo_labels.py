"""What a trained network takes unlabelled images for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from robustscale.attacks.base import attacking
from robustscale.engine.folder import publish
from robustscale.errors import InputError
from robustscale.evaluation.accuracy import NONFINITE, exact_float32
from robustscale.noise import Noise, drawing
from robustscale.types import Backend, Batch, Forward, Loader


@dataclass(frozen=True)
class Predictions:
    """Of every image of a file, by row, on the CPU."""

    label: Tensor
    """(N,) int64; NONFINITE where a logit was not finite."""
    confidence: Tensor
    """(N,) float32: the softmax of the label's logit."""

    def save(self, path: Path) -> None:
        publish(path, safetensors.torch.save({"label": self.label, "confidence": self.confidence}))

    @classmethod
    def load(cls, path: Path) -> Predictions:
        return cls(**safetensors.torch.load_file(path))


def predict(
    network: nn.Module,
    loader: Loader,
    backend: Backend,
    seed: int,
    report: Callable[[dict[str, Any]], None] | None = None,
) -> Predictions:
    """The network's classes on all workers together, in eval mode and float32; the loader's ids are 0 ... N - 1.

    A randomised network draws by (seed, id). `report` gets {"event": "labelling", "done", "total"} after each batch.
    """
    table = torch.zeros((loader.num_examples, 3))  # how often it came, class, confidence: float32 holds them exactly
    done = 0
    with attacking(network, relax=False) as f, exact_float32(backend.device), torch.no_grad():
        for share in loader.epoch(0):
            if len(share.batch.y):
                table[share.batch.index.cpu()] += _classify(f, share.batch, seed).cpu()
            done += share.total
            if report is not None:
                report({"event": "labelling", "done": done, "total": loader.num_examples})
    times, label, confidence = backend.gather(table.to(backend.device)).sum(0).cpu().unbind(1)
    if not bool((times == 1).all()):
        raise InputError(
            f"labelling: {int((times != 1).sum())} images came never or twice; the loader must give each once"
        )
    return Predictions(label.to(torch.int64), confidence.contiguous())


def _classify(f: Forward, batch: Batch, seed: int) -> Tensor:
    """(N, 3): 1, class, confidence."""
    with drawing(Noise.of(seed, batch.index, "pseudo_label")):
        logits = f(batch.x)
    confidence, label = logits.softmax(1).max(1)
    finite = logits.isfinite().all(1)
    label = torch.where(finite, label, NONFINITE)
    return torch.stack([torch.ones_like(confidence), label.to(confidence.dtype), confidence.where(finite, 0)], 1)
