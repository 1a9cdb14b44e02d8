"""Curves of operating points of finished runs: judged on the run's workers, and written to RUN/frontier/.

Each function takes `run`, the first folder's, maybe on another number of workers or with its data elsewhere, and
returns a curve: {"name", "kind", "points", "flops"}, each point {"at", "sa", "ra", "sa_interval", "ra_interval", "n",
"test", "command"}. `show` gets the workers' records. Before anything starts, InputError is raised for runs that are not
finished, that don't fit each other, or that hold nothing out, and for points that are no points; later, as
`cluster.launch.launch` does.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shlex
from collections.abc import Sequence
from typing import Any

from cluster.attempt import Show
from cluster.launch import launch
from robustscale.config import encode
from robustscale.engine.folder import RunFolder
from robustscale.evaluation.joined_runs import kept_weights, require_same_data, require_same_model
from robustscale.evaluation.operating_points import Judging, Kind, Point
from robustscale.fields import require
from robustscale.models.interpolation import interpolated, require_t
from robustscale.models.operating_point import at_point, point_name
from robustscale.models.output_mixture import require_alpha
from robustscale.run import Run

Curve = dict[str, Any]


def lambda_curves(
    run: Run, folder: RunFolder, lams: Sequence[float], widths: Sequence[float], judging: Judging, show: Show
) -> list[Curve]:
    """One network at each λ: a curve for each width; or, without λ, one curve over the widths.

    Its weights are loaded once. Raises InputError, too, where the network has no such knob, or not this value.
    """
    require(len(lams) + len(widths) > 0, "lam: no point to judge; give values of lam, or of width")
    _require_distinct("lam", lams)
    _require_distinct("width", widths)
    all_lams: Sequence[float | None] = lams or [None]
    all_widths: Sequence[float | None] = widths or [None]
    at: list[dict[str, Any]] = [_point(lam, width) for width in all_widths for lam in all_lams]
    for each in at:
        at_point(run.model, **each)
    points = _judged("lambda" if lams else "width", run, folder, [folder], at, judging, show)
    for point in points:
        words = "".join(f" --{name} {value}" for name, value in point["at"].items())
        point["command"] = _export(folder, judging, words)
    if not lams:
        return [_written(folder, "width", run.name, "width", points)]
    curves = []
    for width in all_widths:
        group = [point for point in points if point["at"].get("width") == width]
        name = run.name if width is None else f"{run.name}, width {width:g}"
        curves.append(_written(folder, "lambda", name, f"lambda{point_name(width=width)}", group))
    return curves


def runs_curve(run: Run, folder: RunFolder, others: Sequence[RunFolder], judging: Judging, show: Show) -> Curve:
    """Dedicated runs, judged as the points of `folder` are: by the attacks of `run`, on its images. Never by the
    figures of their own folders, which are of their own attacks."""
    require(len(others) > 0, "beside: no run to judge")
    for other in others:
        require_same_data(folder, other)
    at = [{"run": number} for number in range(len(others))]
    points = _judged("runs", run, folder, others, at, judging, show)
    for point, other in zip(points, others, strict=True):
        point |= {"at": {"run": other.path.name}, "command": _export(other, judging, "")}
    return _written(folder, "runs", "dedicated runs", "runs", points)


def interpolation_curve(
    run: Run, folder: RunFolder, other: RunFolder, ts: Sequence[float], judging: Judging, show: Show
) -> Curve:
    """Weights (1 - t) `folder` + t `other`: see `models.interpolation`. Raises InputError, too, where the two have not
    one architecture."""
    require_same_model(folder, other)
    require_same_data(folder, other)
    require_same_data(other, folder)  # the training images of its statistics must not be held out by either
    first, second = (each.network(kept_weights(each, judging.weights)) for each in (folder, other))
    interpolated(first, second, 0.5)
    _require_distinct("t", ts)
    for t in ts:
        require_t(t)
    points = _judged("interpolation", run, folder, [folder, other], [{"t": t} for t in ts], judging, show)
    for point in points:
        words = f" --towards {shlex.quote(str(other.path))} --t {point['at']['t']}"
        point["command"] = _export(folder, judging, words)
    name = f"weights of {folder.path.name} and {other.path.name}"
    return _written(folder, "interpolation", name, f"interpolation-{other.path.name}", points)


def mixture_curve(
    run: Run, folder: RunFolder, robust: RunFolder, alphas: Sequence[float], judging: Judging, show: Show
) -> Curve:
    """Outputs (1 - α) `folder` + α `robust`, of any two architectures: see `models.output_mixture`. `run` is that of
    the robust one, whose attack and ball judge; the curve is written to the folder of the accurate one."""
    require_same_data(folder, robust)
    require_same_data(robust, folder)
    _require_distinct("alpha", alphas)
    for alpha in alphas:
        require_alpha(alpha)
    at = [{"alpha": alpha} for alpha in alphas]
    points = _judged("mixture", run, folder, [folder, robust], at, judging, show)
    for point in points:
        words = f" --mixed-with {shlex.quote(str(robust.path))} --alpha {point['at']['alpha']}"
        point["command"] = _export(folder, judging, words)
    name = f"outputs of {folder.path.name} and {robust.path.name}"
    return _written(folder, "mixture", name, f"mixture-{robust.path.name}", points)


def _point(lam: float | None, width: float | None) -> dict[str, float]:
    return {name: value for name, value in (("lam", lam), ("width", width)) if value is not None}


def _require_distinct(name: str, values: Sequence[float]) -> None:
    require(len(set(values)) == len(values), f"{name}: {list(values)} names a point twice; leave one out")


def _judged(
    kind: Kind,
    run: Run,
    folder: RunFolder,
    folders: Sequence[RunFolder],
    at: Sequence[dict[str, Any]],
    judging: Judging,
    show: Show,
) -> list[Point]:
    require(len(at) > 0, f"{kind}: no point to judge; give values")
    weights = [kept_weights(each, judging.weights) for each in folders]
    for each, which in zip(folders, weights, strict=True):
        each.network(which)  # refuses files that are missing or damaged before Ray starts
    require(
        folder.read("data.json").get("held_out", 0) > 0,
        f"{folder.path}: holds out no images, and points are chosen by those; train with data.held_out 0.1",
    )
    options: dict[str, Any] = {
        "kind": kind,
        "at": list(at),
        "folders": [str(each.path) for each in folders],
        "weights": weights,
        "judging": dataclasses.asdict(judging),
    }
    # Named after all that the figures depend on: an interrupted command finds the points that it had judged.
    digests = [_digest(each.weights_path(which).read_bytes()) for each, which in zip(folders, weights, strict=True)]
    asked = {**options, "digests": digests, "seed": run.seed, "evaluation": encode(run.evaluation)}
    figures = f"frontier/.points-{_digest(json.dumps(asked, sort_keys=True).encode())[:16]}.json"
    launch("judge_curve", run, folder, show, {**options, "figures": figures})
    points: list[Point] = folder.read(figures)
    (folder.path / figures).unlink()
    return points


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _export(folder: RunFolder, judging: Judging, words: str) -> str:
    """The command that takes this point."""
    weights = "" if judging.weights is None else f" --weights {judging.weights}"
    return f"python -m robustscale.export {shlex.quote(str(folder.path))} --format onnx{words}{weights}"


def _written(folder: RunFolder, kind: Kind, name: str, file: str, points: list[Point]) -> Curve:
    """Training is paid for already, and judging is not part of it: no FLOPs."""
    curve = {"name": name, "kind": kind, "points": points, "flops": None}
    folder.write(f"frontier/curve-{file}.json", curve)
    return curve
