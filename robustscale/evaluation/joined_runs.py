"""Finished runs that are read together: what must be equal of them, and the network between two of them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from robustscale.engine.folder import RunFolder, Weights, publish
from robustscale.errors import InputError
from robustscale.fields import require
from robustscale.models.interpolation import interpolated
from robustscale.models.statistics import statistics
from robustscale.untrusted import open_tensors, read_tensors


def kept_weights(folder: RunFolder, wanted: Weights | None) -> Weights:
    """Those that a run reports; a training of a search, which was not read on the test set, stands for its last ones.
    Raises InputError where the run is not finished."""
    if wanted is not None:
        return wanted
    searched = (folder.path / "trial.json").exists() and not (folder.path / "result.json").exists()
    return "last" if searched else folder.reported_weights()


def load(folder: RunFolder, weights: Weights, device: torch.device) -> nn.Module:
    return folder.network(weights).to(device)


def statistics_path(folder: RunFolder, other: RunFolder, t: float) -> Path:
    """Where BatchNorm's statistics of a judged interpolation are kept: all of it that the two runs don't have."""
    return folder.path / "frontier" / f"towards-{other.path.name}" / f"t-{float(t)!r}.safetensors"


def _ends(folder: RunFolder, other: RunFolder, weights: tuple[Weights, Weights]) -> str:
    """What the statistics belong to."""
    pairs = zip((folder, other), weights, strict=True)
    return json.dumps([hashlib.sha256(each.weights_path(which).read_bytes()).hexdigest() for each, which in pairs])


def save_statistics(
    folder: RunFolder, other: RunFolder, weights: tuple[Weights, Weights], t: float, network: nn.Module
) -> None:
    tensors = {name: buffer.detach().cpu().contiguous() for name, buffer in statistics(network).items()}
    content = safetensors.torch.save(tensors, {"ends": _ends(folder, other, weights)})
    publish(statistics_path(folder, other, t), content)


def interpolated_network(folder: RunFolder, other: RunFolder, t: float, wanted: Weights | None) -> nn.Module:
    """The interpolation that was judged, on the CPU. Raises InputError where none was judged at this t, or of other
    weights."""
    require_same_model(folder, other)
    weights = kept_weights(folder, wanted), kept_weights(other, wanted)
    ends = [load(each, which, torch.device("cpu")) for each, which in zip((folder, other), weights, strict=True)]
    state = interpolated(ends[0], ends[1], t)
    if t not in (0, 1) and statistics(ends[0]):
        state |= _read_statistics(folder, other, weights, t, statistics(ends[0]))
    ends[0].load_state_dict(state)
    return ends[0]


def _read_statistics(
    folder: RunFolder, other: RunFolder, weights: tuple[Weights, Weights], t: float, like: dict[str, Tensor]
) -> dict[str, Tensor]:
    path = statistics_path(folder, other, t)
    judge_first = f"judge it: python -m robustscale.frontier --interpolate {folder.path} {other.path} --at {t!r}"
    try:
        with open_tensors(path, judge_first) as file:
            found, ends = read_tensors(file, like), (file.metadata() or {}).get("ends")
    except FileNotFoundError:
        raise InputError(f"{path}: missing; BatchNorm has no statistics there yet, {judge_first}") from None
    except ValueError as error:
        raise InputError(f"{path}: cannot be read ({error}); {judge_first}") from None
    require(ends == _ends(folder, other, weights), f"{path}: of other weights than the runs have now; {judge_first}")
    return found


def require_same_data(folder: RunFolder, other: RunFolder) -> None:
    """Raise InputError where the second run has other images or classes, or trained on what the first holds out."""
    first, second = folder.read("data.json"), other.read("data.json")
    try:
        for part in ("train", "test"):
            require(
                first[part]["fingerprint"] == second[part]["fingerprint"],
                f"{other.path}: has another {part} set than {folder.path} (other fingerprint); take runs of one set",
            )
        shape = ("channels", "height", "width", "classes")
        here, there = ([facts["spec"][name] for name in shape] for facts in (first, second))
        require(here == there, f"{other.path}: images of {there}, {folder.path}: of {here} ({', '.join(shape)})")
        held_out = first["held_out"], second["held_out"]
    except (KeyError, TypeError):
        raise InputError(f"{other.path}/data.json: not what pretrain writes; restore it from a copy") from None
    # Rows are held out by one order for all runs, so that more of them hold these too.
    require(
        held_out[1] >= held_out[0],
        f"{other.path}: holds out {held_out[1]} images and {folder.path} {held_out[0]}, so it was trained on some that "
        "it would be judged by; take runs with one data.held_out",
    )


def require_same_model(folder: RunFolder, other: RunFolder) -> None:
    """Raise InputError, which names the first difference, where the two have not one architecture."""
    first, second = (_flat(each.read("run.json").get("model")) for each in (folder, other))
    for path in {**first, **second}:
        require(
            first.get(path) == second.get(path),
            f"interpolation: the runs have other networks: model{path} is {first.get(path)!r} in {folder.path}, "
            f"{second.get(path)!r} in {other.path}; mix their outputs instead, by --mix",
        )


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {path: value}
    return {name: leaf for key, part in value.items() for name, leaf in _flat(part, f"{path}.{key}").items()}
