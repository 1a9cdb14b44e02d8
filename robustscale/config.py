"""Configuration as frozen dataclasses: to and from JSON, from YAML, from the command line.

A *component* is a dataclass that stands for one of several choices (an objective, an attack, a model, ...).
It is found by walking the package of its kind; its name is its module's name, or, where a module holds several,
its class's name in lower case. As JSON a component is {"name": ..., field: value, ...}.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import inspect
import pkgutil
import types
import typing
from typing import Any, TypeVar, Union

import pydantic

from robustscale.errors import InputError
from robustscale.threat import Threat
from robustscale.types import Attack, Averaging, Model, Objective, Optimizer, Schedule
from robustscale.untrusted import DEPTH, TEXT

T = TypeVar("T")

KINDS: dict[type, str] = {
    Attack: "robustscale.attacks",
    Objective: "robustscale.objectives",
    Model: "robustscale.models",
    Threat: "robustscale.threat",
    Optimizer: "robustscale.engine.optim",
    Schedule: "robustscale.engine.schedule",
    Averaging: "robustscale.engine.averaging",
}
"""Where the components of a kind are looked for: a module, or a package with one component a file."""


@functools.cache
def components(kind: type) -> dict[str, type]:
    """Every component of a kind, by name."""
    home = importlib.import_module(KINDS[kind])
    modules = [home]
    if hasattr(home, "__path__"):
        modules = [importlib.import_module(f"{home.__name__}.{m.name}") for m in pkgutil.iter_modules(home.__path__)]
    found: dict[str, type] = {}
    for module in modules:
        classes = [
            c
            for _, c in inspect.getmembers(module, inspect.isclass)
            if c.__module__ == module.__name__
            and dataclasses.is_dataclass(c)
            and issubclass(c, kind)
            and not inspect.isabstract(c)
            and not c.__name__.startswith("_")
        ]
        single = len(classes) == 1 and module is not home
        found |= {module.__name__.rpartition(".")[2] if single else c.__name__.lower(): c for c in classes}
    return dict(sorted(found.items()))


def component_name(component: object) -> str | None:
    """The name of a component, or None for a plain dataclass."""
    # By module, not isinstance: an attack and an objective are both just callables to a runtime protocol.
    module = type(component).__module__
    for kind, home in KINDS.items():
        if module == home or module.startswith(home + "."):
            return next((name for name, c in components(kind).items() if c is type(component)), None)
    return None


def shown(value: object) -> str:
    """A value for an error message, which is one line: of a long one the beginning."""
    if isinstance(value, int) and abs(value) >= 2**64:
        return "a whole number of more than 64 bits"  # Python refuses to write very long ones
    text = repr(value)
    return text if len(text) <= 500 else f"{text[:497]}..."


def unknown(what: str, name: object, known: typing.Iterable[str]) -> InputError:
    """An error that suggests the nearest known name."""
    known = list(known)
    near = difflib.get_close_matches(str(name)[:100], known, 1, 0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(known)}"
    return InputError(f"{what}: {shown(name)} is not known; {hint}")


def _component(kind: type, name: object, where: str) -> type:
    known = components(kind)
    if not isinstance(name, str) or name not in known:
        raise unknown(where, name, known)
    return known[name]


def encode(value: Any) -> Any:
    """A value of the configuration as JSON types."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
        name = component_name(value)
        return fields if name is None else {"name": name, **fields}
    if isinstance(value, (tuple, list)):
        return [encode(v) for v in value]
    return value


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


def item_kind(hint: Any) -> Any:
    """The dataclass or component kind of which `hint` is a tuple; else None."""
    if typing.get_origin(hint) is not tuple or typing.get_args(hint)[1:] != (...,):
        return None
    return _structure(typing.get_args(hint)[0])


def _structure(hint: Any) -> Any:
    """The dataclass or component kind inside `hint` or `hint | None`; else None."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)
    return next((o for o in options if o in KINDS or dataclasses.is_dataclass(o)), None)


def structure(cls: type, name: str) -> type | None:
    """The dataclass or component kind that a field of `cls` holds; None for a plain value or an unknown field."""
    found: type | None = _structure(_hints(cls).get(name))
    return found


def items_of(cls: type, name: str) -> type | None:
    """The dataclass or component kind of which a field of `cls` is a tuple; else None."""
    found: type | None = item_kind(_hints(cls).get(name))
    return found


def decode(cls: type[T], data: Any, path: str = "") -> T:
    """The inverse of `encode`, strict: raises InputError with the path for an unknown name or a wrong type."""
    where = path or "configuration"
    if path.count(".") > DEPTH:
        raise InputError(f"{path.partition('.')[0]}: nested more than {DEPTH} deep; put fewer networks inside others")
    if dataclasses.is_dataclass(data) and isinstance(data, cls):
        data = encode(data)
    if not isinstance(data, dict):
        raise InputError(f"{where}: expected a mapping of fields, got {shown(data)}")
    data = dict(data)
    target: type = cls
    if cls in KINDS:
        if "name" not in data:
            raise InputError(f"{where}.name: missing; choose one of {', '.join(components(target))}")
        target = _component(target, data.pop("name"), where)
    hints = _hints(target)
    names = [f.name for f in dataclasses.fields(target)]
    for key in data:
        if key not in names:
            raise unknown(f"{where}: field", key, names)
    fields = {key: _field(hints[key], value, f"{path}.{key}".lstrip(".")) for key, value in data.items()}
    try:
        return typing.cast(T, target(**fields))
    except TypeError as error:
        raise InputError(f"{where}: {error}") from None
    except InputError as error:
        message = str(error)
        named = message.startswith((f"{path}.", f"{path}:"))
        raise InputError(f"{path}.{message}" if path and not named else message) from None


def _field(hint: Any, value: Any, path: str) -> Any:
    item = item_kind(hint)
    if item is not None:
        if not isinstance(value, (list, tuple)):
            raise InputError(f"{path}: expected a list, got {shown(value)}")
        return tuple(decode(item, part, f"{path}.{number}") for number, part in enumerate(value))
    structure = _structure(hint)
    if structure is not None and not (value is None and type(None) in typing.get_args(hint)):
        return decode(structure, value, path)
    try:
        field = _adapter(hint).validate_python(value)
    except pydantic.ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise InputError(f"{path}: {shown(value)} will not do: {reason}") from None
    if isinstance(field, str) and not (field.isprintable() and len(field) <= TEXT):
        raise InputError(f"{path}: {shown(value)} will not do; it is too long, or holds characters that cannot be seen")
    # YAML reads a bare yes or on as true, which pydantic would take for the number 1.
    if isinstance(value, bool) and not isinstance(field, bool):
        raise InputError(f"{path}: {value!r} will not do: Input should be a valid number")
    return field


@functools.cache
def _adapter(hint: Any) -> pydantic.TypeAdapter[Any]:
    """Kept: to make one takes longer than all the rest of `decode`."""
    return pydantic.TypeAdapter(hint, config=pydantic.ConfigDict(allow_inf_nan=False, arbitrary_types_allowed=True))


def override(value: T, changes: typing.Mapping[str, Any], path: str = "") -> T:
    """`value` with nested changes, as JSON types. Naming another component takes that one's defaults, but
    keeps the threat model: it belongs to the data, not to the method."""
    if not isinstance(changes, typing.Mapping):
        raise InputError(f"{path or 'configuration'}: expected a mapping of fields, got {shown(changes)}")
    data = encode(value)
    _merge(data, changes, typing.cast(Any, type(value)), path)
    return decode(type(value), data)


def _merge(data: dict[str, Any], changes: typing.Mapping[str, Any], cls: type, path: str) -> None:
    hints = _hints(cls)
    for key, change in changes.items():
        where = f"{path}.{key}".lstrip(".")
        if key not in hints or (key not in data and key != "name"):
            raise unknown(f"{path or 'configuration'}: field", key, [f.name for f in dataclasses.fields(cls)])
        item, structure = item_kind(hints[key]), _structure(hints[key])
        if item is not None and isinstance(change, typing.Mapping):
            data[key] = _items(list(data[key]), change, item, where)
        elif item is not None and isinstance(change, (list, tuple)):
            numbered = {str(number): part for number, part in enumerate(change)}
            data[key] = _items(list(data[key])[: len(change)], numbered, item, where)
        elif structure is None or change is None:
            data[key] = change
        else:
            before = data[key]
            data[key] = _exchanged(before, change, structure, where)
            other_norm = key == "threat" and before["name"] != data[key]["name"]
            if other_norm and "step_size" in data and "step_size" not in changes:
                data["step_size"] = None


def _items(items: list[Any], changes: typing.Mapping[str, Any], kind: type, path: str) -> list[Any]:
    """A list with changes by number, as in {"1": {"steps": 5}}; the number after the last adds one, in the threat
    model of the first."""
    for number, change in changes.items():
        where, n = f"{path}.{number}", len(items)
        if not str(number).isdecimal() or int(number) > n:
            raise InputError(f"{where}: there are {n} of them, counted from 0; {path}.{n} would add one")
        k = int(number)
        changed = _exchanged(items[k] if k < n else None, change, kind, where, _threat_of(items))
        items = [*items[:k], changed, *items[k + 1 :]]
    return items


def _exchanged(current: Any, change: Any, structure: type, path: str, neighbours: dict[str, Any] | None = None) -> Any:
    """A dataclass with changes, or another component in its place, in its threat model or else its neighbours'."""
    if isinstance(change, str) and structure in KINDS:
        change = {"name": change}
    if not isinstance(change, typing.Mapping):
        raise InputError(f"{path}: expected a mapping of fields, got {shown(change)}")
    change = dict(change)
    if structure in KINDS:
        name = change.pop("name", (current or {}).get("name"))
        structure = _component(structure, name, path)
        if current is None or current["name"] != name:
            threat = _threat_of(current) or neighbours
            current = encode(structure())
            if threat is not None:
                _set_threat(current, threat)
    elif current is None:
        current = encode(structure())
    _merge(current, change, structure, path)
    return current


def override_threats(value: T, change: typing.Mapping[str, Any]) -> T:
    """`value` with the same change in every threat model of it; naming another one takes its defaults first.

    A step size goes along: in proportion to eps, or back to the default under another norm. Raises InputError where
    one attack is made of several in different norms: it is not said which of them is meant.
    """

    def walk(data: Any) -> Any:
        if isinstance(data, list):
            norms = {threat["name"] for threat in map(_threat_of, data) if threat is not None}
            if len(norms) > 1:
                raise InputError(
                    f"threat: {change!r} for attacks in {' and '.join(sorted(norms))}; set the threat of each of them"
                )
            return [walk(item) for item in data]
        if not isinstance(data, dict):
            return data
        if data.get("name") not in components(Threat):
            return _stepped(data, {key: walk(part) for key, part in data.items()})
        name = change.get("name", data["name"])
        if name not in components(Threat):
            raise unknown("threat", name, components(Threat))
        return {**(data if name == data["name"] else encode(components(Threat)[name]())), **change}

    # Below the root, which is no threat even where the run is called l2.
    return decode(type(value), {key: walk(part) for key, part in encode(value).items()})


def exchange_threat(kind: type[T], value: T, old: Threat, new: Threat) -> T:
    """A component of a kind with `new` in the place of every threat model in it that equals `old`; step sizes go along
    as above."""
    before, after = encode(old), encode(new)

    def walk(data: Any) -> Any:
        if isinstance(data, list):
            return [walk(item) for item in data]
        if not isinstance(data, dict):
            return data
        return dict(after) if data == before else _stepped(data, {key: walk(part) for key, part in data.items()})

    return decode(kind, walk(encode(value)))


def _stepped(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """An attack whose threat model was exchanged, with a step size that fits the new one."""
    old, new, step = before.get("threat"), after.get("threat"), after.get("step_size")
    if isinstance(old, dict) and isinstance(new, dict) and step is not None and old != new:
        eps = decode(Threat, new).eps  # type: ignore[type-abstract]
        after["step_size"] = step * eps / old["eps"] if old["name"] == new["name"] and old["eps"] else None
    return after


def _threat_of(data: Any) -> dict[str, Any] | None:
    """The first threat model inside."""
    return next(_threats_of(data), None)


def _threats_of(data: Any) -> typing.Iterator[dict[str, Any]]:
    if isinstance(data, dict) and data.get("name") in components(Threat):
        yield data
    elif isinstance(data, (dict, list)):
        for part in data.values() if isinstance(data, dict) else data:
            yield from _threats_of(part)


def _set_threat(data: dict[str, Any], threat: dict[str, Any]) -> None:
    """Put a threat model in the place of every one inside; of several in different norms, of its own norm's alone."""
    several = len({t["name"] for t in _threats_of(data)}) > 1

    def walk(data: Any) -> None:
        if isinstance(data, list):
            for item in data:
                walk(item)
        if not isinstance(data, dict):
            return
        before = dict(data)
        for key, value in data.items():
            if isinstance(value, dict) and value.get("name") in components(Threat):
                data[key] = dict(threat) if not several or value["name"] == threat["name"] else value
            else:
                walk(value)
        _stepped(before, data)

    walk(data)
