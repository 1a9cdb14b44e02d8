"""Values put into a Run, each at its path: what a trial is, of the recipe and of what was drawn for it."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from robustscale.attacks.base import attacks_in, is_attack
from robustscale.attacks.pgd import PGD
from robustscale.config import component_name, decode, encode, exchange_threat, override, unknown
from robustscale.errors import InputError
from robustscale.run import Run, drafting
from robustscale.threat import Threat
from robustscale.types import Attack, Objective

SHARES = ("shares", "weights")
"""Fields of an attack that is made of others: how often each of them is taken."""


def put(run: Run, values: Mapping[str, Any], *, draft: bool = False) -> Run:
    """The Run with these values at their paths, written as on the command line but for three:

    - an objective in another's place keeps its attack: see `with_attack`;
    - `objective.attack.threat.eps` is of every attack of that objective in the same ball, and of an attack that is made
      of others in one ball, of all; a stage's is of every stage; step sizes stay in proportion;
    - `shares.0` (or `weights.1`, ...) is that share of all examples; the other shares keep their proportions.

    Raises InputError where there is no such field, or what comes of it is no valid Run. `draft`: as `drafting`.
    """
    with drafting():
        for path in sorted((path for path, value in values.items() if isinstance(value, str)), key=by_depth):
            run = _named(run, plain(run, path), values[path])
        rest = {plain(run, path): value for path, value in values.items() if not isinstance(value, str)}
        # Balls first, as a step size that is given by itself must stay; and `attack` before, say, `fgsm`.
        for path in sorted((path for path in rest if is_eps(run, path)), key=by_depth):
            run = _in_ball(run, path, rest.pop(path))
        # Together, since some only fit each other, as nesterov and its momentum.
        run = override(run, _changes(run, rest))
    return run if draft else decode(Run, encode(run))


def by_depth(path: str) -> tuple[int, str]:
    return path.count("."), path


def plain(run: Run, path: str) -> str:
    """The path without names of components: objective.trades.beta is objective.beta where the objective is trades.

    Raises InputError, with the nearest name, where there is no such field, or another component.
    """
    parts, values = _follow(run, path)
    return ".".join(part for part, above, value in zip(parts, values, values[1:], strict=False) if value is not above)


def at(run: Run, path: str) -> Any:
    """What stands there."""
    return _follow(run, path)[1][-1]


def owner(run: Run, path: str) -> Any:
    """The dataclass whose field it is, or the tuple."""
    return _follow(run, path)[1][-2]


def is_share(run: Run, path: str) -> bool:
    parts = path.split(".")
    return len(parts) > 2 and parts[-2] in SHARES and is_attack(at(run, ".".join(parts[:-2])))


def is_eps(run: Run, path: str) -> bool:
    return path.endswith(".threat.eps") and isinstance(at(run, path.removesuffix(".eps")), Threat)


def balls(part: Any) -> Iterator[Attack]:
    """The attacks in an objective that keep to one ball each, and that are not parts of one that does; the one named
    `attack` before others."""
    for _field, attack in sorted(attacks_in(part), key=lambda found: found[0] != "attack"):
        if getattr(attack, "threat", None) is not None:
            yield attack
        else:
            yield from balls(attack)
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        # Of stages the last, which is the strongest, before the others.
        for inner in reversed(value) if isinstance(value, tuple) else (value,):
            if isinstance(inner, Objective):
                yield from balls(inner)


def with_attack(new: Objective, old: Objective, monitor: Attack) -> Objective:
    """An objective that is attacked as another one is: in its ball, by its attack, steps and step size.

    Wherever the new one has a PGD it gets the old one's attack, with the start that it had itself, which belongs to the
    method: TRADES' score is flat at the image. Other attacks are what the objective is about (FGSM, the two norms of
    MAT), so they stay, and what they are made of is looked at in turn. Where the old one has no attack in a norm, its
    first is taken to the new one's ball; where it has none at all, the attack that watches the training is taken.
    """
    attacks = list(balls(old)) or [monitor]
    kind: Any = Attack
    of_norm = {type(_threat(attack)): attack for attack in reversed(attacks)}

    def walk(part: Any) -> Any:
        if isinstance(part, tuple):
            return tuple(walk(item) for item in part)
        if not isinstance(part, Objective) and not is_attack(part):
            return part
        names = [field.name for field in dataclasses.fields(part)]
        if "threat" not in names:
            return dataclasses.replace(part, **{name: walk(getattr(part, name)) for name in names})
        same = of_norm.get(type(part.threat))
        if type(part) is not PGD:
            return part if same is None else exchange_threat(kind, part, part.threat, _threat(same))
        attack = same or exchange_threat(kind, attacks[0], _threat(attacks[0]), part.threat)
        return dataclasses.replace(attack, start=part.start) if isinstance(attack, PGD) else attack

    found: Objective = walk(new)
    return found


def _threat(attack: Attack) -> Threat:
    threat: Threat = attack.threat  # type: ignore[attr-defined]
    return threat


def _follow(run: Run, path: str) -> tuple[list[str], list[Any]]:
    """The parts of a path, and everything on the way: the Run, and what stands after each part."""
    parts, found = path.split("."), [typing.cast(Any, run)]
    for depth, part in enumerate(parts):
        names = _names(found[-1])
        if part in names:
            found.append(_part(found[-1], part))
        elif part == component_name(found[-1]) and depth < len(parts) - 1:
            found.append(found[-1])
        else:
            raise _missing(path, part, ".".join(parts[:depth]), names)
    return parts, found


def _missing(path: str, part: str, where: str, names: list[str]) -> InputError:
    if names:
        return unknown(path, part, names)
    return InputError(f"{path}: {where} is a single value; search that, or leave it out")


def _names(value: Any) -> list[str]:
    if isinstance(value, tuple):
        return [str(number) for number in range(len(value))]
    if not dataclasses.is_dataclass(value):
        return []
    names = [field.name for field in dataclasses.fields(value)]
    # Of an attack that is made of others, a property: their common ball.
    return [*names, "threat"] if "threat" not in names and isinstance(getattr(value, "threat", None), Threat) else names


def _part(value: Any, part: str) -> Any:
    if isinstance(value, tuple):
        return value[int(part)]
    found = getattr(value, part)
    if part in SHARES and is_attack(value):
        n = len(value.attacks)
        return () if n < 2 else (1 / n,) * n if found is None else found
    # Of plain values only the whole has a path on the command line.
    return found if not isinstance(found, tuple) or all(map(dataclasses.is_dataclass, found)) else list(found)


def _changes(run: Run, values: Mapping[str, Any]) -> dict[str, Any]:
    """As `override` takes them."""
    changes: dict[str, Any] = {}
    for path, value in values.items():
        at(run, path)
        if is_share(run, path):
            path, _, number = path.rpartition(".")
            value = _shared(at(run, path), int(number), value)
        node = changes
        *above, last = path.split(".")
        for part in above:
            node = node.setdefault(part, {})
        node[last] = value
    return changes


def _shared(shares: tuple[float, ...], number: int, share: float) -> list[float]:
    others = sum(shares) - shares[number]
    equal = (1 - share) / (len(shares) - 1)
    rest = [s * (1 - share) / others if others > 0 else equal for s in shares]
    return [*rest[:number], share, *rest[number + 1 :]]


def _named(run: Run, path: str, name: str) -> Run:
    before = at(run, path)
    exchanged = override(run, _changes(run, {path: name}))
    after = at(exchanged, path)
    if not isinstance(after, Objective) or type(before) is type(after):
        return exchanged
    attacked = with_attack(after, before, run.evaluation.monitor)
    return override(exchanged, _changes(exchanged, {path: encode(attacked)}))


def _whole(run: Run, path: str) -> str:
    """Of an objective that is a stage of another one, that: its stages have one ball."""
    above, _, _stage = path.rpartition(".")
    return above.rpartition(".")[0] if above and isinstance(at(run, above), tuple) else path


def _in_ball(run: Run, path: str, eps: float) -> Run:
    threat = path.removesuffix(".eps")
    place = threat.removesuffix(".threat")
    above, _, field = place.rpartition(".")
    if field == "attack" and isinstance(at(run, above), Objective):
        place = _whole(run, above)
    old, value = at(run, threat), at(run, place)
    new = decode(Threat, {**encode(old), "eps": eps}, threat)  # type: ignore[type-abstract]
    kind: Any = Objective if isinstance(value, Objective) else Attack
    return override(run, _changes(run, {place: encode(exchange_threat(kind, value, old, new))}))
