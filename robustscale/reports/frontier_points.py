"""The points of frontier.json as a person chooses among them, and the words for them: what the page, the picture and
the table have in common."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from robustscale.evaluation.words import pixels
from robustscale.reports.progress import duration, percent

Frontier = Mapping[str, Any]
"""frontier.json."""
Interval = tuple[float, float]


class Point(NamedTuple):
    """One that a person may take: a trial on the frontier, or a point of a curve. Accuracies are shares in [0, 1]."""

    name: str
    id: str
    """The trial's; empty for a point of a curve."""
    values: Mapping[str, Any]
    n: int
    """The held-out images behind `sa` and `ra`."""
    sa: float
    ra: float
    sa_interval: Interval
    ra_interval: Interval
    test: Mapping[str, Any] | None
    cost: Sequence[str]
    """Time of one worker, and operations."""
    commands: Mapping[str, str]
    price: Mapping[str, Any] | None = None
    """Of one more point of RA, on the way to the frontier's next trial."""
    beaten: bool = False
    """By another trial or point, in SA and RA."""


def finite(value: Any) -> float | None:
    """A number, or None for what is none: missing, NaN, infinite."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def measured(entry: Mapping[str, Any]) -> bool:
    return finite(entry.get("sa")) is not None and finite(entry.get("ra")) is not None


def frontier_trials(frontier: Frontier) -> list[Mapping[str, Any]]:
    """By rising RA."""
    found = [trial for trial in frontier["trials"] if trial["frontier"] and measured(trial)]
    return sorted(found, key=lambda trial: (trial["ra"], -trial["sa"], trial["number"]))


def curve_points(curve: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """In the order of the curve."""
    return [point for point in curve["points"] if measured(point)]


def choices(frontier: Frontier) -> list[Point]:
    """Every trial on the frontier and every point of a curve, by rising RA."""
    price = {each["from"]: each for each in frontier["prices"]}
    trials = [_of_trial(trial, frontier["n"], price.get(trial["id"])) for trial in frontier_trials(frontier)]
    on_curves = [
        _of_curve(curve, point, frontier["n"]) for curve in frontier["curves"] for point in curve_points(curve)
    ]
    every = sorted([*trials, *on_curves], key=lambda point: (point.ra, -point.sa))
    best = set(staircase((point.ra, point.sa) for point in every))
    return [point._replace(beaten=(point.ra, point.sa) not in best) for point in every]


def staircase(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of points (RA, SA) those that no other one beats, once each, by rising RA and so by falling SA."""
    steps: list[tuple[float, float]] = []
    for ra, sa in sorted(set(points), reverse=True):
        if not steps or sa > steps[-1][1]:
            steps.append((ra, sa))
    return steps[::-1]


def _of_trial(trial: Mapping[str, Any], n: int, price: Mapping[str, Any] | None) -> Point:
    return Point(
        trial_name(trial), trial["id"], trial["values"], n, trial["sa"], trial["ra"], interval(trial, "sa"),
        interval(trial, "ra"), trial["test"], costs(trial), trial["commands"], price,
    )  # fmt: skip


def _of_curve(curve: Mapping[str, Any], point: Mapping[str, Any], n: int) -> Point:
    flops = finite(curve.get("flops"))
    return Point(
        curve_point_name(curve, point), "", point["at"], point.get("n") or n, point["sa"],
        point["ra"], interval(point, "sa"), interval(point, "ra"), point["test"],
        [] if flops is None else [f"{flops_text(flops)} for", "the whole curve"], {"use": point["command"]},
    )  # fmt: skip


def interval(entry: Mapping[str, Any], name: str) -> Interval:
    """The 95 % one; no wider than the figure where there is none."""
    low, high = entry.get(f"{name}_interval") or (entry[name], entry[name])
    return float(low), float(high)


def interval_text(bounds: Interval) -> str:
    return f"{100 * bounds[0]:.1f} to {percent(bounds[1])}"


def trial_name(trial: Mapping[str, Any]) -> str:
    return f"trial {trial['number']}"


def curve_point_name(curve: Mapping[str, Any], point: Mapping[str, Any]) -> str:
    return f"{curve['name']} at {values_text(point['at'])}"


def flops_text(flops: float) -> str:
    """1.23 PFLOPs, say: floating point operations, not a speed."""
    for unit, scale in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if flops >= 0.9995 * scale:  # From there on three digits round up to the unit.
            return f"{flops / scale:.3g} {unit}FLOPs"
    return f"{flops:.3g} FLOPs"


def costs(trial: Mapping[str, Any]) -> list[str]:
    """Time of one worker and operations, as far as they are known."""
    seconds, flops = finite(trial.get("seconds")), finite(trial.get("flops"))
    return ([] if seconds is None else [duration(seconds)]) + ([] if flops is None else [flops_text(flops)])


def price_texts(price: Mapping[str, Any] | None) -> list[str]:
    """Of one point of RA, from a trial to the frontier's next: points of SA, and time of one worker."""
    if price is None:
        return []
    sa, hours = finite(price.get("sa_per_ra")), finite(price.get("hours_per_ra"))
    points = [] if sa is None else [f"{sa:.2g} point{'' if f'{sa:.2g}' == '1' else 's'} of SA"]
    if hours is None:
        return points
    spent = duration(abs(3600 * hours))
    return [*points, "no more time" if spent == "0 s" else f"{spent} {'less' if hours < 0 else 'more'}"]


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """The shortest ending of each dotted path that no other path has: objective.beta is `beta`."""

    def ending(path: str) -> str:
        parts = path.split(".")
        endings = [".".join(parts[k:]) for k in range(len(parts) - 1, -1, -1)]
        others = [f".{other}" for other in paths if other != path]
        return next((text for text in endings if not any(o.endswith(f".{text}") for o in others)), path)

    return {path: ending(path) for path in paths}


def value_text(value: Any, path: str = "") -> str:
    """0.0316, trades, 8/255 for a radius."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, float):
        return pixels(value) if path.rpartition(".")[2].startswith("eps") else f"{value:.3g}"
    if isinstance(value, Mapping):
        inner = [f"{key} {value_text(each, key)}" for key, each in value.items() if key != "name"]
        return " ".join([*([str(value["name"])] if "name" in value else []), *inner])
    return str(value)


def values_text(values: Mapping[str, Any]) -> str:
    """`beta 3.1, eps 8/255`."""
    names = short_names(list(values))
    return ", ".join(f"{names[path]} {value_text(value, path)}" for path, value in values.items())


def held_out_text(frontier: Frontier) -> str:
    return f"{frontier['n']:,} held-out images, RA under {frontier['attack']}"


def fidelity_text(frontier: Frontier) -> str:
    """What the trials did in little; empty where they were the recipe itself."""
    words = frontier.get("fidelity")
    return (
        f"Trials were the recipe in little: {words}. Figures and cost are of that; retrain for the whole."
        if words
        else ""
    )


def test_text(frontier: Frontier) -> str:
    """What the figures on the test set are of; empty where there are none. Not all need be of the same attacks."""
    every = [("trials", trial["test"]) for trial in frontier["trials"]]
    every += [(curve["name"], point["test"]) for curve in frontier["curves"] for point in curve["points"]]
    judged = [(name, test) for name, test in every if test]
    if not judged:
        return ""
    of: dict[tuple[str, ...], dict[str, None]] = {}
    for name, test in judged:
        of.setdefault(tuple(test.get("attacks", ())), {})[name] = None
    words = [
        f"{', '.join(names)}: {_under(attacks)}" if len(of) > 1 else _under(attacks) for attacks, names in of.items()
    ]
    first = judged[0][1]
    return f"{first['n']:,} test images in the ball {first['ball']}" + "".join(
        f"; {w}" if len(of) > 1 else w and f", {w}" for w in words
    )


def _under(attacks: Sequence[str]) -> str:
    return f"RA the worst of {', '.join(attacks)}" if len(attacks) > 1 else "".join(f"RA {name}" for name in attacks)


def no_frontier(frontier: Frontier) -> str:
    """Why there is no frontier; empty where there is one."""
    if frontier_trials(frontier):
        return ""
    if not frontier["trials"]:
        return "No trials: these are curves alone." if any(_points(frontier)) else "No trial has ended yet."
    return f"No frontier: none of {len(frontier['trials'])} trials ran to its end."


def _points(frontier: Frontier) -> list[Mapping[str, Any]]:
    return [point for curve in frontier["curves"] for point in curve["points"]]
