"""What a search varies of a Run: a range for each of some fields."""

from __future__ import annotations

import functools
import itertools
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal, NamedTuple

from robustscale.config import component_name, unknown
from robustscale.errors import InputError
from robustscale.fields import require
from robustscale.run import Run
from tune.knobs import knobs, knobs_of
from tune.ranges import Choice, Integer, Range, Suggests, read
from tune.values import SHARES, at, by_depth, is_share, owner, plain, put

_JUDGED = "is what every trial is judged by"
_DATA = "is of the data that all trials share"
_NOTHING = "changes no result"
FIXED = {
    "evaluation": _JUDGED,
    "data.source": _DATA,
    "data.held_out": _DATA,
    "data.image_size": _DATA,
    "data.unlabelled": _DATA,
    "data.without": _DATA,
    "data.leaks": _DATA,
    "data.share": "is the budget of a trial",
    "data.root": _NOTHING,
    "data.loader": _NOTHING,
    "data.workers": _NOTHING,
    "cluster": _NOTHING,
    "checkpoints": _NOTHING,
    "log_every": _NOTHING,
    "name": _NOTHING,
    "seed": "is chance, and the best of several seeds luck",
    "epochs": "is the budget of a trial",
}
"""Why these fields, and what is within them, are the same for all trials."""


class Infeasible(InputError):
    """Values were drawn of which no valid Run comes: that trial has failed, and the search goes on."""

    def __init__(self, values: Mapping[str, Any], reason: str) -> None:
        super().__init__(reason)
        self.values = dict(values)


@dataclass(frozen=True)
class Space:
    """A range for each path, written as on the command line: objective.beta, objective itself, model.width, ...

    A dimension is there where its field is: with objective=choice(trades,mart), objective.beta is of trades alone. So
    names are drawn first, and then each dimension whose field the Run so far has, and allows both ends of. What is not
    drawn stays as the recipe, or the component that was drawn, has it. Where components share the name of a field, as
    trades and pgd_at do, theirs goes before it: objective.trades.beta and objective.pgd_at.beta are two dimensions.
    """

    dimensions: Mapping[str, Range]

    @classmethod
    def of(cls, run: Run) -> Space:
        """What a recipe searches by default."""
        return cls(knobs(run))

    @classmethod
    def from_text(cls, text: Mapping[str, str]) -> Space:
        return cls({path: read(written, path) for path, written in text.items()})

    def as_text(self) -> dict[str, str]:
        return {path: dimension.text for path, dimension in self.dimensions.items()}

    def narrowed(self, entries: Sequence[str]) -> Space:
        """With PATH=RANGE in the place of a range, or beside the others; PATH=recipe is searched no more.

        A choice of objectives takes what is searched of the recipe's own away, and brings each one's usual range: one
        range of beta would be another thing for each.
        """
        typed = dict(map(_entry, entries))
        dimensions = dict(self.dimensions)
        names = typed.get("objective", "recipe")
        if names != "recipe":
            dimensions = {p: r for p, r in dimensions.items() if not p.startswith("objective.") or ".attack." in p}
            found = [knob for name in read(names, "objective").ends for knob in knobs_of(str(name)).items()]
            fields = {path.rpartition(".")[2] for path in typed if path.count(".") == 1}
            dimensions |= {path: r for path, r in found if path.rpartition(".")[2] not in fields}
        for path, text in typed.items():
            if text != "recipe":
                dimensions[path] = read(text, path)
            elif path in dimensions:
                del dimensions[path]
            else:
                raise unknown(f"{path}=recipe: dimension", path, dimensions)
        return Space(dimensions)

    def draw(self, run: Run, trial: Suggests) -> tuple[dict[str, Any], Run]:
        """The values that a trial draws, and the recipe with them. Raises Infeasible where no valid Run comes of it."""
        names: dict[str, Any] = {}
        for path, dimension in self._names():
            if _refusal(run, path, dimension, True) is None:
                names[path] = dimension.suggest(trial, path)
                run = put(run, {path: names[path]}, draft=True)
        values = {path: dimension.suggest(trial, path) for path, dimension in self._others(run)}
        try:
            return {**names, **values}, put(run, values)
        except InputError as error:
            raise Infeasible({**names, **values}, str(error)) from None

    def require(self, run: Run) -> None:
        """Raise InputError, one line that names the field, for a space that this recipe can't be searched over."""
        require(len(self.dimensions) > 0, "space: has no dimension; give one, as in objective.beta=log(0.1,10)")
        for path, dimension in self.dimensions.items():
            _require_open(path)
            value = dimension.text.partition("(")[2].removesuffix(")").partition(",")[0]
            require(dimension.size != 1, f"{path}: {dimension.text} is one point; fix it with --{path} {value}")
        self._require_one_share_each()
        branches = self._branches(run)
        for path, names in self._names():
            if all(path not in branch.names for branch in branches):
                raise _telling([_refusal(branch.run, path, names, True) for branch in branches])
            for name in names.ends:
                reasons = [branch.refusal for branch in branches if branch.names.get(path, name) == name]
                if None not in reasons:
                    raise InputError(f"{path}={names.text}: {name} will not do: {_telling(reasons)}")
        self._require_once(branches)
        sound = [branch.run for branch in branches if branch.refusal is None]
        for path in sorted(self.dimensions, key=by_depth):
            dimension = self.dimensions[path]
            reasons = [_refusal(run, path, dimension, False) for run in sound]
            if not _of_names(dimension) and None not in reasons:
                raise _telling(reasons)

    def size(self, run: Run) -> int | None:
        """How many points there are, if only by their values; None where a range is a continuum."""
        total = 0
        for branch in self._branches(run):
            if branch.refusal is None:
                sizes = [dimension.size for _path, dimension in self._others(branch.run)]
                if None in sizes:
                    return None
                total += math.prod(size for size in sizes if size is not None)
        return total

    def grid(self, run: Run, points: int) -> list[dict[str, Any]]:
        """The values of each point of a grid, once; without those of which no valid Run comes. Of an interval it has so
        many values."""
        found = []
        for branch in self._branches(run):
            axes = {path: dimension.grid(points) for path, dimension in self._others(branch.run)}
            for point in itertools.product(*axes.values()):
                values = dict(zip(axes, point, strict=True))
                if _reason(branch.run, values) is None:
                    found.append({**branch.names, **values})
        return found

    def _names(self) -> list[tuple[str, Range]]:
        """The choices that may decide which fields there are, outer ones first."""
        names = [(path, dimension) for path, dimension in self.dimensions.items() if _of_names(dimension)]
        return sorted(names, key=lambda item: by_depth(item[0]))

    def _others(self, run: Run) -> list[tuple[str, Range]]:
        """Those of the other dimensions that are there in this Run."""
        # Sorted: a sampler's draws go by their order, which a space that was written down and read again may have lost.
        others = [(path, self.dimensions[path]) for path in sorted(self.dimensions)]
        others = [(path, dimension) for path, dimension in others if not _of_names(dimension)]
        return [(path, dimension) for path, dimension in others if _refusal(run, path, dimension, False) is None]

    def _branches(self, run: Run) -> list[_Branch]:
        """Every way to draw the names."""
        drafts: list[tuple[dict[str, Any], Run]] = [({}, run)]
        for path, dimension in self._names():
            wider = []
            for names, draft in drafts:
                if _refusal(draft, path, dimension, True) is None:
                    wider += [({**names, path: v}, put(draft, {path: v}, draft=True)) for v in dimension.ends]
                else:
                    wider.append((names, draft))
            drafts = wider
        return [_Branch(names, draft, _reason(draft, {})) for names, draft in drafts]

    def _require_once(self, branches: Sequence[_Branch]) -> None:
        for branch in branches:
            found: dict[str, str] = {}
            for path, _dimension in self._others(branch.run):
                field = plain(branch.run, path)
                require(field not in found, f"{path}: is {found.get(field)} as well; search one of them")
                found[field] = path

    def _require_one_share_each(self) -> None:
        first: dict[str, str] = {}
        for path in self.dimensions:
            above, _, number = path.rpartition(".")
            if above.rpartition(".")[2] in SHARES and number.isdecimal():
                require(above not in first, f"{path}: follows from {first.get(above)}; search one share of {above}")
                first[above] = path


class _Branch(NamedTuple):
    names: dict[str, Any]
    run: Run
    """Maybe not a valid one: a draft."""
    refusal: str | None
    """Why it is no valid Run."""


def difference(there: Space, here: Space) -> str:
    """Two spaces, a dimension a line, marked where they differ."""
    before, now = there.as_text(), here.as_text()
    rows = [("", "there", "here"), *((path, before.get(path, "-"), now.get(path, "-")) for path in before | now)]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    padded = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    marks = [" " if row[1] == row[2] or not row[0] else "*" for row in rows]
    return "\n".join(f"{mark} {line}" for mark, line in zip(marks, padded, strict=True))


def _entry(entry: str) -> tuple[str, str]:
    path, _, text = (part.strip() for part in entry.removeprefix("--").partition("="))
    if not path or not text:
        raise InputError(f"{entry}: names no range; write PATH=RANGE, as in objective.beta=log(0.1,10)")
    return path.replace("-", "_").removesuffix(".name"), text


def _of_names(dimension: Range) -> bool:
    return isinstance(dimension, Choice) and dimension.of_names


def _require_open(path: str) -> None:
    why = next((FIXED[fixed] for fixed in FIXED if f"{path}.".startswith(f"{fixed}.")), None)
    require(why is None, f"{path}: {why}, so it is not searched; set it for all trials with --{path}")


@functools.lru_cache(maxsize=4096)
def _refusal(run: Run, path: str, dimension: Range, draft: bool) -> str | None:
    """Why this Run has no such dimension, or None; `draft` where other names are still to be drawn."""
    try:
        _require_type(run, path, dimension)
        for value in dimension.ends:
            put(run, {path: value}, draft=draft)
    except InputError as error:
        message = str(error)
        return message if message.startswith(f"{path}:") else f"{path}={dimension.text}: {message}"
    return None


def _reason(run: Run, values: Mapping[str, Any]) -> str | None:
    try:
        put(run, values)
    except InputError as error:
        return str(error)
    return None


def _telling(reasons: Sequence[str | None]) -> InputError:
    """Of the reasons of several Runs the one of a Run that has the field, or nearly."""
    said = [reason for reason in reasons if reason is not None]
    return InputError(min(said, key=lambda reason: ("is not known" in reason, "did you mean" not in reason)))


def _require_type(run: Run, path: str, dimension: Range) -> None:
    """Raise InputError where the field takes values of another type than the range has."""
    given, path = path, plain(run, path)
    value = at(run, path)
    if is_dataclass(value):
        name = component_name(value)
        inside = ", ".join(f"{given}.{field.name}" for field in fields(value))
        require(name is not None, f"{given}: holds several fields; search one of {inside}")
        require(_of_names(dimension), f"{given}: {dimension.text} is no choice of names; write choice({name},...)")
    elif not isinstance(dimension, Choice) and not is_share(run, path):
        options = _options(typing.get_type_hints(type(owner(run, path)))[path.rpartition(".")[2]])
        words = "true,false" if bool in options else ",".join(str(o) for o in options if not isinstance(o, type))
        require(
            float in options or int in options,
            f"{given}: {dimension.text} draws from all numbers, and this is one of few; write choice({words or 'A,B'})",
        )
        require(
            float in options or isinstance(dimension, Integer),
            f"{given}: {dimension.text} draws fractions, and this is a whole number; write int(LOW,HIGH)",
        )


def _options(hint: Any) -> list[Any]:
    """What a field may hold: types, and the words of its Literals."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [option for part in typing.get_args(hint) for option in _options(part)]
    return list(typing.get_args(hint)) if typing.get_origin(hint) is Literal else [hint]
