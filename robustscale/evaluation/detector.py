"""A small classifier over clues: multinomial logistic regression, of which there is one solution and so no seed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from robustscale.engine.folder import publish
from robustscale.errors import InputError
from robustscale.losses import cross_entropy
from robustscale.untrusted import open_tensors, parse_json

SCHEMA = 1
CLIP = 5.0
"""Standard deviations beyond which a clue says no more: an image unlike any seen must not decide by one number."""
STEPS = 300


@dataclass(frozen=True)
class Detector:
    """softmax(W [z, z²] + b), z = (clues - mean) / scale, clipped. All float64, on the CPU."""

    mean: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor

    @classmethod
    def fit(cls, clues: Tensor, y: Tensor, classes: int, penalty: float = 1e-3) -> Detector:
        """Minimises the mean cross-entropy + penalty · ‖W‖² on clues (N, F), classes y (N,): convex, by L-BFGS."""
        clues = clues.double().cpu()
        mean, scale = clues.mean(0), clues.std(0) + 1e-6
        features = _features(clues, mean, scale)
        weight = torch.zeros(classes, features.shape[1], dtype=torch.float64, requires_grad=True)
        bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=STEPS, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = cross_entropy(features @ weight.T + bias, y.cpu()).mean() + penalty * weight.square().sum()
            value.backward()
            return value

        optimizer.step(loss)
        return cls(mean, scale, weight.detach(), bias.detach())

    def probabilities(self, clues: Tensor) -> Tensor:
        """(N, classes) float64, on the CPU."""
        features = _features(clues.double().cpu(), self.mean, self.scale)
        return (features @ self.weight.T + self.bias).softmax(1)


def _features(clues: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    z = ((clues - mean) / scale).clamp(-CLIP, CLIP)
    return torch.cat([z, z.square()], 1)


def save_detector(path: Path, detector: Detector, levels: Tensor, facts: Mapping[str, Any]) -> None:
    """safetensors; the facts (JSON types) go into its metadata."""
    tensors = {name: getattr(detector, name).contiguous() for name in ("mean", "scale", "weight", "bias")}
    facts = {"schema": SCHEMA, **facts}
    publish(path, safetensors.torch.save({**tensors, "levels": levels}, {"facts": json.dumps(facts)}))


def load_detector(path: Path, names: Sequence[str]) -> tuple[Detector, Tensor, dict[str, Any]]:
    """Detector, levels and facts. Raises InputError where it is missing, damaged, or reads other clues than `names`."""
    anew = "the same command without --image writes it anew"
    try:
        with open_tensors(path, anew) as file:
            facts = dict(parse_json((file.metadata() or {})["facts"], f"{path}: metadata", anew))
            tensors = {name: file.get_tensor(name) for name in ("mean", "scale", "weight", "bias", "levels")}
    except FileNotFoundError:
        raise InputError(f"{path}: missing; the same command without --image trains the detector") from None
    except (LookupError, TypeError, ValueError) as error:
        raise InputError(f"{path}: no detector ({error}); {anew}") from None
    if facts.get("schema") != SCHEMA or facts.get("clues") != list(names):
        raise InputError(f"{path}: reads other clues than this version; the command without --image writes it anew")
    levels = tensors.pop("levels")
    return Detector(**tensors), levels, facts
