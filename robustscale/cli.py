"""What doors share: reading a Run from the command line, and telling a person what is wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import os
import re
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

import tyro
import yaml

from robustscale import recipes
from robustscale.config import (
    KINDS,
    components,
    decode,
    encode,
    items_of,
    override,
    override_threats,
    shown,
    structure,
    unknown,
)
from robustscale.engine.folder import RunFolder
from robustscale.engine.plan import Asked
from robustscale.engine.remote import is_url, joined
from robustscale.engine.start import pinned
from robustscale.errors import Diverged, InputError, LoaderFailed, WorkersFailed
from robustscale.fields import require
from robustscale.run import Run, drafting
from robustscale.untrusted import CONFIGURATION, expanded, is_there, one_line, parse_configuration, read_bytes

T = TypeVar("T")


def door(main: Callable[[], int | None], interrupted: str = "interrupted") -> NoReturn:
    """Run a command: InputError becomes one line and exit 2, a failed training exit 1, an interrupt exit 130."""
    try:
        sys.exit(main() or 0)
    except InputError as error:
        # What is quoted in it may be somebody else's, and a terminal obeys what it is shown.
        print("\n".join(map(one_line, f"error: {error}".split("\n"))), file=sys.stderr)
        sys.exit(2)
    except Diverged as error:
        print(f"error: training diverged: {error}", file=sys.stderr)
        sys.exit(1)
    except (LoaderFailed, WorkersFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # The reader left, as `| head` does; without this, flushing at exit would complain once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def parse_run(args: Sequence[str], prog: str, description: str, base: Run, beside: Collection[str] = ()) -> Run:
    """A Run from `[RECIPE] [--config FILE] [--run-name NAME] [overrides]`; `base` where neither is given. `beside`:
    the door's other options, one of which may have been meant.

    `--PATH NAME` for a component (objective, attack, threat, model, ...) exchanges it, before its fields are read.
    Raises InputError; `--help` prints every field of the choices made so far and exits.
    """
    with drafting():
        run = _drafted(list(args), prog, description, base, beside)
    return here(decode(Run, encode(run)))


def _drafted(rest: list[str], prog: str, description: str, base: Run, beside: Collection[str]) -> Run:
    if rest and not rest[0].startswith("-"):
        base = recipes.get(rest.pop(0))
    config = take_option(rest, "--config")
    if config is not None:
        base = read_file(expanded(config))
    name = take_option(rest, "--run-name")
    if name is not None:
        base = override(base, {"name": name})
    position, eps = 0, None
    refused: dict[str, Any] = {}
    while position < len(rest):
        option, equals, name = rest[position].partition("=")
        path = option.removeprefix("--").replace("-", "_").removesuffix(".name").split(".")
        everywhere = option in ("--threat", *(f"--threat.{field}" for field in ("name", "eps")))
        if not everywhere and (not option.startswith("--") or not _is_component(base, path)):
            position += 1
            continue
        if not equals:
            name = take_at(rest, position + 1, option)
        del rest[position]
        if option == "--threat.eps":
            eps = name
            continue
        if everywhere:
            base = override_threats(base, {"name": name})
            continue
        change: Any = {"name": name}
        for part in reversed(path):
            change = {part: change}
        change = _joined(refused, change)
        try:
            base, refused = override(base, change), {}
        except InputError:
            # A later option may name what is missing, as the l2 ball that an attack asks for.
            refused = change
    base = override(base, refused)
    if eps is not None:
        base = override_threats(base, {"eps": eps})
    known = {"--help", "--threat", "--threat.eps", *options_of(base)}
    for option in (arg.partition("=")[0].replace("_", "-") for arg in rest if arg.startswith("--")):
        if option not in known:
            raise unknown("option", option, sorted(known.union(beside)))
    return parse(Run, rest, prog, description, base)


def _joined(first: Any, then: Any) -> Any:
    """Nested changes, the later ones over the earlier ones."""
    if not (isinstance(first, dict) and isinstance(then, dict)):
        return then
    return {**first, **{key: _joined(first.get(key), part) for key, part in then.items()}}


def here(run: Run) -> Run:
    """Paths of the data and of weights made absolute: a worker's folder is another."""
    kind, colon, path = run.data.source.partition(":")
    if not colon:
        kind, path = "", kind
    is_path = path != "" and kind != "torchvision" and is_there(Path(path)) and (colon or not _is_kind(path))
    source = f"{kind}{colon}{Path(path).resolve()}" if is_path else run.data.source
    data = dataclasses.replace(run.data, source=source, root=_absolute(run.data.root))
    if data.unlabelled is not None:
        data = dataclasses.replace(data, unlabelled=_absolute(data.unlabelled))
    if data.leaks is not None:
        data = dataclasses.replace(data, leaks=_absolute(data.leaks))
    return dataclasses.replace(run, data=data, transfer=pinned(run.transfer))


def _absolute(path: str) -> str:
    """~ stays: each node has its own."""
    return path if path.startswith("~") else str(Path(path).resolve())


def _is_kind(source: str) -> bool:
    from data_loaders.sources import kinds

    return source in kinds() and not Path(source, "train.beton").exists()


def options_of(value: Any, path: str = "--") -> Iterator[str]:
    """Every option that sets a field of `value`."""
    for field in dataclasses.fields(value):
        option, part = path + field.name.replace("_", "-"), getattr(value, field.name)
        parts = {option: part}
        if items_of(type(value), field.name) is not None:
            parts = {f"{option}.{number}": item for number, item in enumerate(part)}
        yield from parts
        for inner, item in parts.items():
            if dataclasses.is_dataclass(item):
                yield from options_of(item, inner + ".")


def take_at(args: list[str], position: int, option: str) -> str:
    if position >= len(args) or args[position].startswith("--"):
        raise InputError(f"{option}: needs a value")
    return args.pop(position)


def _is_component(run: Run, path: list[str]) -> bool:
    value: Any = run
    kind: Any = None
    item_kind: Any = None
    for part in path:
        if isinstance(value, tuple):
            number = int(part) if part.isdecimal() else len(value)
            kind, value = item_kind, value[number] if number < len(value) else None
        elif dataclasses.is_dataclass(value):
            kind, item_kind = structure(type(value), part), items_of(type(value), part)
            value = getattr(value, part, None)
        else:
            return False
    return kind in KINDS


def parse(target: Callable[..., T], args: Sequence[str], prog: str, description: str, default: Any = None) -> T:
    """tyro's typed options for a dataclass or function; what it would print in a box becomes one line."""
    options: dict[str, Any] = {"args": list(args), "prog": prog, "description": description}
    options["config"] = (tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff)
    if default is not None:
        options["default"] = default
    if "--help" in args or "-h" in args:
        return cast(T, tyro.cli(target, **options))
    out = io.StringIO()
    try:
        with contextlib.redirect_stderr(out), contextlib.redirect_stdout(out):
            return cast(T, tyro.cli(target, **options))
    except InputError as error:
        raise InputError(_with_path(str(error), args)) from None
    except SystemExit:
        # A title between rules, the message, then help that a person asks for with --help.
        text = re.sub(r"\x1b\[[0-9;]*m|[╭╮╰╯│─+|]|-{3,}", " ", out.getvalue().partition("\n")[2])
        text = re.split(r" (?:Argument helptext:|For full helptext)", " ".join(text.split()))[0]
        # Of a choice of types, tyro tells how each of them failed.
        text = re.sub(r"no type matching (.*?) could be instantiated from \['(.*?)'\]\. Got errors:.*", _NO_TYPE, text)
        strange = re.search(r"Unrecognized options: (--[\w.-]+)", text)
        if strange is not None and dataclasses.is_dataclass(target):
            raise unknown("option", strange[1], _flags(target)) from None
        raise InputError(f"{text.rstrip('. ')}; see --help for every field") from None


_NO_TYPE = r"'\2' will not do; it takes \1"


def _flags(target: Callable[..., Any]) -> list[str]:
    """Every option of a door without a Run, as its help names them."""
    out = io.StringIO()
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(out):
        tyro.cli(target, args=["--help"])
    return sorted(set(re.findall(r"--[a-z](?:[\w.-]*\w)?", out.getvalue())))


def _with_path(message: str, args: Sequence[str]) -> str:
    """A field refuses its value without knowing where it sits; the option that was given knows."""
    field = message.partition(":")[0]
    options = [arg.partition("=")[0].removeprefix("--").replace("-", "_") for arg in args if arg.startswith("--")]
    paths = {option.rpartition(".")[0] for option in options if option.endswith("." + field)}
    return f"{paths.pop()}.{message}" if len(paths) == 1 else message


def read_file(path: Path) -> Run:
    """A Run from YAML or JSON: a whole configuration, or `recipe: NAME` and what differs from it."""
    try:
        text = read_bytes(path, _AS_YAML, CONFIGURATION)
    except FileNotFoundError:
        raise InputError(f"{path}: cannot be read (No such file or directory); check --config") from None
    data = parse_configuration(text, str(path), _AS_YAML, as_json=path.suffix == ".json")
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected fields of a run, got {shown(data)}; {_AS_YAML}")
    base = recipes.get(str(data.pop("recipe"))) if "recipe" in data else Run()
    try:
        return override(base, data)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


_AS_YAML = "write YAML as --print-config does"


def as_yaml(run: Run) -> str:
    return yaml.safe_dump(encode(run), sort_keys=False, allow_unicode=True)


def choices() -> str:
    """Every component by kind, for --help."""
    lines = []
    for kind, home in KINDS.items():
        names = ", ".join(components(kind))
        lines.append(f"  {kind.__name__.lower():<10} {names}   ({home})")
    return "\n".join(lines)


def recipe_list() -> str:
    lines = []
    width = max(map(len, recipes.names()))
    for name in recipes.names():
        summary = (inspect.getdoc(recipes.function(name)) or "").partition("\n")[0]
        lines.append(f"  {name:<{width}}  {summary}")
    return "\n".join(lines)


def default_storage() -> str:
    """Where runs are kept unless --storage says otherwise: a folder, or a URL."""
    in_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    place = os.environ.get("ROBUSTSCALE_STORAGE") or ("~/robustscale-runs" if in_job else "runs")
    return place if is_url(place) else str(expanded(place))


def storage(args: list[str]) -> str:
    """Remove --storage; the folder or URL that holds the runs."""
    place = take_option(args, "--storage") or default_storage()
    return place if is_url(place) else os.path.realpath(expanded(place))


def storage_folder(args: list[str]) -> Path:
    """The same where a URL will not do."""
    place = storage(args)
    require(not is_url(place), f"storage: {place} is a URL; a search is kept in a folder that all nodes see, give one")
    return Path(place)


def existing_run(run: str | Path) -> RunFolder:
    """A run's folder, by its path, its URL, or its name in the default storage. Raises InputError if it is neither."""
    storage = default_storage()
    if is_url(run) or is_there(Path(run)):
        return RunFolder.existing(run)
    named = joined(storage, str(run))
    return RunFolder.existing(named if is_url(storage) or is_there(Path(named)) else run)


def take_option(args: list[str], name: str, default: str | None = None) -> str | None:
    """Remove `--name VALUE` or `--name=VALUE` from the arguments and return its value."""
    for i, arg in enumerate(args):
        if arg == name:
            value = take_at(args, i + 1, name)
            del args[i]
            return value
        if arg.startswith(name + "="):
            del args[i]
            return arg.partition("=")[2]
    return default


def take_plan(args: list[str]) -> Asked | None:
    """Remove --plan and what goes with it; None where the run is to be trained. Raises InputError."""
    asked = take_flag(args, "--plan")
    names = ("--plan-seconds", "--price", "--plan-data")
    given = {name: take_option(args, name) for name in names}
    for name, value in given.items():
        require(asked or value is None, f"{name}: is of a plan; add --plan, or leave it out")
    return Asked.of(*given.values()) if asked else None


def take_optional(args: list[str], name: str) -> str | None:
    """Remove `--name [VALUE]`: None if it isn't there, "" if it has no value."""
    for i, arg in enumerate(args):
        if arg == name:
            has_value = i + 1 < len(args) and not args[i + 1].startswith("-")
            value = args[i + 1] if has_value else ""
            del args[i : i + 1 + has_value]
            return value
        if arg.startswith(name + "="):
            del args[i]
            return arg.partition("=")[2]
    return None


def take_flag(args: list[str], name: str) -> bool:
    if name in args:
        args.remove(name)
        return True
    return False


def with_workers(run: Run, workers: int | None) -> Run:
    """A trained run on another number of workers, for what only reads its network."""
    if workers is None:
        return run
    # Shards and batch are of training; they only have to fit the other number of workers.
    cluster = dataclasses.replace(run.cluster, workers=workers)
    return dataclasses.replace(run, cluster=cluster, shards=workers, batch_size=max(run.batch_size, 2 * workers))
