"""Configurations that no friend wrote: each is a Run or one line, soon, in little memory, and leaves no trace."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib
import json
import re
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from robustscale import cli, recipes
from robustscale.config import KINDS, components, decode, encode, override
from robustscale.errors import InputError
from robustscale.run import Run
from robustscale.untrusted import CONFIGURATION
from tune.settings import Settings
from tune.spaces import Space

SECONDS = 1.0
BYTES = 100 * 2**20
COMPONENTS = sorted({(kind.__name__.lower(), name) for kind in KINDS for name in components(kind)})
FIELDS = sorted(
    {f.name for kind in KINDS for c in components(kind).values() for f in dataclasses.fields(c)}
    | {f.name for f in dataclasses.fields(Run())}
)
ODD: list[Any] = [
    0, -1, 1, 2, 3.5, 2**31, 2**63, -(2**63), 2**64, 10**30, 10**400, 0.0, -0.0, 1e-320, 1e308, -1e308, float("inf"),
    float("-inf"), float("nan"), True, False, None, "", " ", "0", "1e999", "nan", "8/255", "8/0", "1/" + "9" * 400,
    "../x", "/etc/passwd", "a\0b", "\u202egnp.exe", "\ud800", "é" * 200, "a\nb", "\x1b[2J", "~root/x",
    "~nobody-here/x", "x" * 5_000, "os.system", "!!python/object/apply:os.system ['id']", "${HOME}", "$(id)",
    "{{7*7}}", "%s%n", [], {}, [[]], {"name": "os.system"}, {"name": {"name": "pgd"}}, {"": ""},
    {"__class__": "os.system"}, [None], [{}], {"0": {}}, {"name": "conditional"}, {"99999999999999999999": {}},
]  # fmt: skip
NAMES = [
    *(name for _kind, name in COMPONENTS),
    *("os.system", "subprocess:Popen", "robustscale.attacks.pgd.PGD", "__main__", "builtins.eval", "..", ""),
]


def outcome(call: Callable[[], object], seconds: float = SECONDS) -> object:
    """What comes of it, or the error of one line; fails for anything else, and for what takes too long."""
    began = time.process_time()
    found: object
    try:
        found = call()
    except InputError as error:
        found = error
    took = time.process_time() - began
    if isinstance(found, InputError):
        assert "\n" not in str(found)
        assert len(str(found)) < 6_000
    assert took < seconds, f"took {took:.1f} s"
    if isinstance(found, Run):
        json.dumps(encode(found), allow_nan=False)
        assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", found.name)
    return found


# --- Drawn


def paths(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Of every value inside."""
    if isinstance(data, (dict, list)):
        for key, part in data.items() if isinstance(data, dict) else enumerate(data):
            yield (*path, key)
            yield from paths(part, (*path, key))


def at(data: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        data = data[key]
    return data


@st.composite
def configurations(draw: st.DrawFn) -> Any:
    """A recipe's configuration with some of its values, names or fields exchanged."""
    data = copy.deepcopy(_ENCODED[draw(st.integers(0, len(_ENCODED) - 1))])
    for _ in range(draw(st.integers(1, 4))):
        places = list(paths(data))
        if not places:
            break
        path = places[draw(st.integers(0, len(places) - 1))]
        holder = at(data, path[:-1])
        value = draw(st.one_of(st.sampled_from(ODD), st.sampled_from(NAMES), _JSON))
        match draw(st.sampled_from(["exchange", "exchange", "exchange", "drop", "add", "move"])):
            case "exchange":
                holder[path[-1]] = copy.deepcopy(value)
            case "drop":
                del holder[path[-1]]
            case "add" if isinstance(holder, dict):
                holder[draw(st.one_of(st.sampled_from(FIELDS), st.text(max_size=8)))] = copy.deepcopy(value)
            case "move":
                holder[path[-1]] = copy.deepcopy(at(data, places[draw(st.integers(0, len(places) - 1))]))
    return data


_JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)),
    max_leaves=12,
)
_ENCODED = [encode(recipes.get(name)) for name in recipes.names()]


def _by_yaml(data: Any, folder: Path) -> Run:
    path = folder / "drawn.yaml"
    path.write_bytes(yaml.safe_dump(data, allow_unicode=True).encode("utf-8", "surrogatepass"))
    return cli.read_file(path)


def _by_json(data: Any, folder: Path) -> Run:
    path = folder / "drawn.json"
    path.write_text(json.dumps(data))
    return cli.read_file(path)


def _by_command(data: Any, folder: Path) -> Run:
    """What differs from the default, as options."""
    args = [f"--{'.'.join(map(str, path))}={at(data, path)}" for path in list(paths(data))[:12]]
    return cli.parse_run(args, "test", "", Run())


ROUTES: list[Callable[[Any, Path], object]] = [
    _by_yaml,
    _by_json,
    _by_command,
    lambda data, folder: decode(Run, data),
    lambda data, folder: override(Run(), data),
]


def drawn(num: int, folder: Path) -> None:
    @settings(max_examples=num)
    @given(configurations(), st.sampled_from(ROUTES))
    def check(data: Any, route: Callable[[Any, Path], object]) -> None:
        outcome(lambda: route(data, folder), 10 * SECONDS)  # the first of a kind imports what it needs

    check()


def test_drawn_configurations(tmp_path: Path) -> None:
    drawn(60, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_twenty_thousand_drawn_configurations(tmp_path: Path) -> None:
    drawn(20_000, tmp_path)


# --- Written


def bombs() -> dict[str, bytes]:
    """By what they would do to a careless reader."""
    laughs = "\n".join(f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]" for i in range(9))
    merges = "\n".join(
        f"{chr(98 + i)}: &{chr(98 + i)} {{<<: [{', '.join([f'*{chr(97 + i)}'] * 9)}]}}" for i in range(9)
    )
    most = CONFIGURATION - 20
    tags = [
        "object/apply:os.system ['touch escaped']", "object/apply:subprocess.check_output [[touch, escaped]]",
        "object/new:os.system [touch escaped]", "name:os.system", "module:os", "tuple [1, 2]",
        "object:builtins.object {}",
        "object/apply:builtins.eval [\"open('escaped', 'w')\"]", "object/apply:builtins.exec [\"open('escaped','w')\"]",
        "object/apply:pathlib.Path.touch [escaped]", "str x", "bytes x", "none x", "complex 1j", "long 1", "dict {}",
    ]  # fmt: skip
    texts = {
        "laughs": f"a: &a [x, x, x, x, x, x, x, x, x]\n{laughs}\nname: *j\n",
        "laughs in a field": f"a: &a [x, x, x, x, x, x, x, x, x]\n{laughs}\ndata: {{mean: *j}}\n",
        "merges": f"a: &a {{epochs: 1}}\n{merges}\ncluster: *j\n",
        "itself": "a: &a [*a]\nname: *a\n",
        "itself in a mapping": "data: &a {source: *a}\n",
        "undefined alias": "name: *nobody\n",
        "deep lists": "[" * most,
        "deep mappings": "{a: " * (most // 4),
        "deep blocks": "- " * (most // 2),
        "deep models": "model: " + "{name: conditional, model: " * 200 + "basic" + "}" * 200,
        "35 models": "model: " + "{name: conditional, model: " * 35 + "basic" + "}" * 35,
        "deep attacks": "objective: {attack: " + "{name: eot, attack: " * 200 + "pgd" + "}" * 201,
        "long list": f"data: {{mean: [{'1,' * (most // 2 - 20)}]}}",
        "many lines": "a: b\n" * (most // 5),
        "many words": "name: " + "x " * (most // 2 - 10),
        "long name": "name: " + "x" * (most - 10),
        "long key": "x" * (most - 10) + ": 1",
        "long comment": "#" * most,
        "many anchors": "".join(f"&a{i} " for i in range(20_000)),
        "many documents": "---\na: 1\n" * 1_000,
        "long number": "epochs: " + "9" * 100_000,
        "hexadecimal": "epochs: 0x" + "f" * 100_000,
        "binary": "epochs: 0b" + "1" * 100_000,
        "sixty": "epochs: " + ":".join(["59"] * 20_000),
        "octal": "seed: 0o777777777777777777777777777777",
        "date": "epochs: 2001-99-99",
        "right date": "epochs: 2001-01-01",
        "bool tag": "epochs: !!bool x",
        "int tag": 'epochs: !!int ""',
        "float tag": "clip: !!float x",
        "timestamp tag": "epochs: !!timestamp foo",
        "set": "epochs: !!set {a, b}",
        "ordered": "epochs: !!omap [a: 1]",
        "bytes": "name: !!binary aGVsbG8=",
        "no base64": "name: !!binary '%%%'",
        "list as a key": "? [a, b]\n: 1\n",
        "number as a key": "7: 1\n",
        "null as a key": "~: 1\n",
        "nan as a key": ".nan: 1\n",
        "tabs": "data:\n\t\tsource: x\n",
        "nul": "name: a\0b\n",
        "directive": "%YAML 9.9\n---\nname: x\n",
        "tag directive": "%TAG ! tag:yaml.org,2002:python/\n---\nname: !name:os.system\n",
        "recipe elsewhere": "recipe: ../../etc/passwd\n",
        "recipe of a module": "recipe: os.system\n",
        "recipe is a list": "recipe: [digits]\n",
        "text": "just a text",
        "nothing": "",
        "null": "null",
        **{f"tag {tag[:24]}": f"name: !!python/{tag}\n" for tag in tags},
        **{f"root tag {tag[:24]}": f"!!python/{tag}\n" for tag in tags},
    }
    return {
        **{name: text.encode() for name, text in texts.items()},
        "half a utf16": "name: x\n".encode("utf-16")[:-1],
        "not utf8": b"name: \xff\xfe\n",
        "surrogates": b'name: "\\ud800"\n',
        "too large": b"#" * (CONFIGURATION + 1),
        "gzip": b"\x1f\x8b\x08" + bytes(range(200)),
    }


TRAVERSALS = [
    "../x", "..", ".", "/", "/etc/passwd", "a/b", "a/../../b", "./a", "a/", "//a", "\\\\host\\share", "..\\x", "C:\\x",
    "~", "~/x", "~root", "a\0b", "a\nb", "a\rb", "a\tb", " a", "a ", "", "-rf", "--help=1", ".hidden", "a" * 65,
    "a" * 5_000,
    "\u202egnp", "\u2215etc", "\uff0fetc", "\u2024\u2024/x", "a\u200bb", "é", "ａ", "٣", "a;id", "a|id", "$(id)",
    "`id`",
    "${HOME}", "%2e%2e%2f", "a?b", "a*b", "file:///etc", "s3://bucket/x", "con:", "a\x1b[2Jb", "\ud800", "a\u0301",
]  # fmt: skip


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place where nothing is to be left behind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    return tmp_path


def command(module: str, *args: str) -> Callable[[], object]:
    def call() -> object:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [module, *args])
            return importlib.import_module(f"robustscale.{module}").main()

    return call


def lean(call: Callable[[], object]) -> object:
    """As `outcome`, and in little memory; measuring that makes all of it several times slower."""
    tracemalloc.start()
    try:
        found = outcome(call, 6 * SECONDS)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < BYTES, f"took {peak:,} bytes"
    return found


@pytest.mark.parametrize("name", bombs())
def test_a_bomb_does_not_go_off(name: str, here: Path) -> None:
    path = here / "bomb.yaml"
    path.write_bytes(bombs()[name])
    assert isinstance(outcome(lambda: cli.read_file(path)), InputError)
    assert list(here.iterdir()) == [path]


@pytest.mark.slow
@pytest.mark.parametrize("name", bombs())
def test_a_bomb_takes_little_memory_and_passes_no_door(name: str, here: Path) -> None:
    path = here / "bomb.yaml"
    path.write_bytes(bombs()[name])
    assert isinstance(lean(lambda: cli.read_file(path)), InputError)
    found = outcome(command("pretrain", "--config", str(path), "--print-config"), 10 * SECONDS)
    assert isinstance(found, InputError)
    assert list(here.iterdir()) == [path]


@pytest.mark.parametrize("name", TRAVERSALS, ids=ascii)
def test_no_run_has_a_name_that_leads_elsewhere(name: str, here: Path) -> None:
    config = here / "config.json"
    config.write_text(json.dumps({"name": name}))
    assert isinstance(outcome(lambda: cli.read_file(config)), InputError)
    for option in ("--run-name", "--name"):
        found = outcome(lambda option=option: cli.parse_run([f"{option}={name}"], "", "", Run()), 3 * SECONDS)  # type: ignore[misc]
        assert isinstance(found, InputError), option
    assert list(here.iterdir()) == [config]


@pytest.mark.parametrize(
    "name", [*TRAVERSALS[:3], *(pytest.param(n, marks=pytest.mark.slow) for n in TRAVERSALS[3:])], ids=ascii
)
def test_no_command_takes_a_name_that_leads_elsewhere(name: str, here: Path) -> None:
    storage = str(here / "storage")
    ways = {
        "pretrain --run-name": command("pretrain", f"--run-name={name}", "--storage", storage),
        "pretrain --resume": command("pretrain", f"--resume={name}", "--storage", storage),
        "frontier --run-name": command("frontier", f"--run-name={name}", "--storage", storage),
        "frontier --resume": command("frontier", f"--resume={name}", "--storage", storage),
    }
    for way, call in ways.items():
        if name or way.endswith("--resume"):  # an empty one is the usual
            assert isinstance(outcome(call, 10 * SECONDS), InputError), way
    assert list(here.iterdir()) == []


def test_there_are_three_hundred() -> None:
    assert len(bombs()) + 7 * len(TRAVERSALS) >= 300


FOREIGN = [
    "os.system",
    "builtins.eval",
    "robustscale.attacks.pgd.PGD",
    "tests.security.trap.Trap",
    "trap",
    "sys",
    "PGD",
]


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("part", ["model", "objective", "optimizer", "schedule", "averaging", "objective.attack"])
def test_a_foreign_class_is_not_imported(name: str, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even one that lies in the working directory, or that is loaded already."""
    (tmp_path / "trap.py").write_text("from pathlib import Path\nPath('sprung').touch()\nclass Trap: ...\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    change: Any = {"name": name}
    for key in reversed(part.split(".")):
        change = {key: change}
    for route in ROUTES:
        found = outcome(lambda route=route: route(change, tmp_path))  # type: ignore[misc]
        assert isinstance(found, InputError)
        assert "is not known" in str(found) or "objective.name: missing" in str(found)
    assert not {"trap", "tests.security.trap"} & (set(sys.modules) - before)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    "entry",
    [
        "objective=choice(os.system)", "objective.beta=__import__('os').system('id')",
        "objective.beta=uniform(0,1e999)", "objective.beta=log(0,1)", "a" * 9_000 + "=int(1,2)",
        "model.width=choice(" + ",".join(map(str, range(5_000))) + ")", "objective.beta=uniform(0,1)(",
        "objective.beta=lambda: 0", "../x=choice(1)", "name=choice(../x,/etc)", "seed=int(0,9)",
        "data.root=choice(/etc)", "epochs=int(1,99999999999999999999999)", "objective.beta=int(0x10,1_0)",
    ],
)  # fmt: skip
def test_a_searched_range_is_read_and_not_run(entry: str, here: Path) -> None:
    found = outcome(command("frontier", "digits", entry, "--print-space", "--storage", str(here)), 3 * SECONDS)
    assert isinstance(found, InputError)
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_no_number_of_a_run_may_be_infinite(value: str) -> None:
    """Every one that a recipe has, in a file; and some of them as an option."""
    tried = 0
    for data in _ENCODED:
        for path in paths(data):
            if type(at(data, path)) in (int, float):
                changed = copy.deepcopy(data)
                at(changed, path[:-1])[path[-1]] = float(value)
                with pytest.raises(InputError):
                    decode(Run, changed)
                tried += 1
    assert tried > 300
    for option in ("optimizer.lr", "objective.attack.threat.eps", "data.held_out", "cluster.wait", "clip"):
        found = outcome(lambda option=option: cli.parse_run([f"--{option}={value}"], "", "", Run()), 3.0)  # type: ignore[misc]
        assert isinstance(found, InputError), option


def test_settings_of_a_search_take_no_infinite_number() -> None:
    for field in dataclasses.fields(Settings()):
        if field.type in ("int", "float", "int | None"):
            for value in ("nan", "inf", "1e999", "-1", "9" * 5_000):
                with contextlib.suppress(SystemExit):
                    found = outcome(
                        lambda f=field, v=value: cli.parse(Settings, [f"--{f.name.replace('_', '-')}", v], "", ""), 3.0
                    )  # type: ignore[misc]
                    assert isinstance(found, InputError) or value == "-1", (field.name, value)


def test_a_space_from_a_ledger_is_read_and_not_run() -> None:
    for text in ({"objective.beta": "__import__('os')"}, {"../x": "int(1,2)"}, {"seed": "choice(os.system)"}):
        found = outcome(lambda text=text: Space.from_text(text).require(Run()))  # type: ignore[misc]
        assert isinstance(found, InputError)
