"""What no line of the repository may do, tests and tools too: read from the source, beside what Ruff is asked to find.

`tests/test_architecture.py` and Ruff have eval, exec, pickle.load, yaml.load and shell=True by name; here are the ways
around them: other unpicklers, names bound by `from ... import` or `as`, defaults that became unsafe by an argument.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = {
    str(path.relative_to(ROOT)): path
    for folder in ("robustscale", "data_loaders", "cluster", "tune", "k8s", "benchmarks", "tests")
    for path in sorted((ROOT / folder).rglob("*.py"))
}

UNPICKLERS = {
    *(
        f"{module}.{name}"
        for module in ("pickle", "_pickle", "cloudpickle", "dill")
        for name in ("load", "loads", "Unpickler")
    ),
    *("marshal.load", "marshal.loads", "shelve.open", "joblib.load", "pandas.read_pickle", "ray.cloudpickle.loads"),
    *("torch.package.PackageImporter", "torch.serialization.add_safe_globals", "torch.distributed.checkpoint.load"),
    *("torch.hub.load", "numpy.lib.format.read_array", "ray.tune.Tuner.restore"),
}
INTERPRETERS = {
    *("eval", "exec", "compile", "os.system", "os.popen", "pty.spawn", "code.interact", "subprocess.getoutput"),
    *("subprocess.getstatusoutput", "runpy.run_path", "tempfile.mktemp", "yaml.load_all", "yaml.unsafe_load_all"),
    *("builtins.eval", "builtins.exec", "torch.jit.load"),
}
ALLOWED = {
    ("robustscale/export.py", "torch.jit.load"): "reads back, to compare, the file that it has just written",
    ("tests/security/test_hostile_checkpoints.py", "pickle.loads"): "shows that the payloads are live",
    ("tests/tune/test_mo_asha.py", "pickle.loads"): "its own, as Ray Tune sends a scheduler",
    ("tests/test_export.py", "torch.jit.load"): "reads an export as somebody without this project would",
}


def names_of(tree: ast.Module) -> dict[str, str]:
    """What each imported name stands for: `from pickle import loads as l` -> {l: pickle.loads}."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {a.asname: a.name for a in node.names if a.asname}
        elif isinstance(node, ast.ImportFrom):
            found |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    return found


def called(node: ast.expr, names: dict[str, str]) -> str:
    text = ast.unparse(node)
    head, dot, rest = text.partition(".")
    return f"{names.get(head, head)}{dot}{rest}"


def keyword(call: ast.Call, name: str) -> str | None:
    return next((ast.unparse(k.value) for k in call.keywords if k.arg == name), None)


def wrongs(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and what is called there."""
    names = names_of(tree)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = called(node.func, names)
        if name in UNPICKLERS | INTERPRETERS:
            yield node.lineno, name
        elif name == "torch.load" and keyword(node, "weights_only") != "True":
            yield node.lineno, "torch.load without weights_only=True"
        elif keyword(node, "allow_pickle") not in (None, "False") and name != "numpy.save" and name != "numpy.savez":
            yield node.lineno, "allow_pickle"
        elif keyword(node, "shell") not in (None, "False"):
            yield node.lineno, "shell"
        elif name == "yaml.load" and "Safe" not in ast.unparse(node):
            yield node.lineno, "yaml.load"
        elif name in ("importlib.import_module", "__import__") and not _fixed(node):
            yield node.lineno, "an import by a computed name"


def _fixed(node: ast.Call) -> bool:
    """Whether the name is written out, or made of a package of ours and what lies in it."""
    return bool(node.args) and isinstance(node.args[0], ast.Constant)


IMPORTERS = {
    "robustscale/config.py": "the packages of KINDS, and the modules that lie in them",
    "robustscale/by_name.py": "the modules of a package of ours, which is named in the code",
    "robustscale/reports/catalogue.py": "the modules of DEFENCES",
    "robustscale/export.py": "_package(name): the two that ONNX needs, named by its callers",
    "data_loaders/sources/__init__.py": "the modules that lie beside it",
}
"""Where a module's name is computed, and of what: never of a configuration."""


@pytest.mark.parametrize("file", FILES)
def test_nothing_reads_what_could_run(file: str) -> None:
    found = {line: name for line, name in wrongs(ast.parse(FILES[file].read_text())) if (file, name) not in ALLOWED}
    if file in IMPORTERS or file.startswith(("tests/", "benchmarks/", "k8s/")):
        found = {line: name for line, name in found.items() if name != "an import by a computed name"}
    assert found == {}


def test_every_exception_is_still_needed() -> None:
    found = {(file, name) for file, path in FILES.items() for _line, name in wrongs(ast.parse(path.read_text()))}
    assert set(ALLOWED) <= found
    assert {(file, "an import by a computed name") for file in IMPORTERS} <= found


@pytest.mark.parametrize(
    "code",
    [
        "from pickle import loads as read\nread(x)",
        "import cloudpickle as c\nc.load(f)",
        "import marshal\nmarshal.loads(b)",
        "import shelve\nshelve.open(p)",
        "from torch import load\nload(p)",
        "import torch as t\nt.load(p, weights_only=flag)",
        "import numpy as np\nnp.load(p, allow_pickle=True)",
        "from numpy.lib import format\nformat.read_array(f, allow_pickle=True)",
        "import yaml\nyaml.load(t, Loader=yaml.UnsafeLoader)",
        "from tempfile import mktemp\nmktemp()",
        "import subprocess as s\ns.Popen(c, shell=flag)",
        "from subprocess import getoutput\ngetoutput(c)",
        "from builtins import eval as e\ne(x)",
        "import importlib\nimportlib.import_module(config['class'])",
        "__import__(name)",
    ],
)
def test_the_rule_finds(code: str) -> None:
    assert list(wrongs(ast.parse(code)))


@pytest.mark.parametrize(
    "code",
    [
        "import torch\ntorch.load(p, weights_only=True)",
        "import numpy as np\nnp.load(p, allow_pickle=False)",
        "import yaml\nyaml.safe_load(t)",
        "import importlib\nimportlib.import_module('torch')",
        "import re\nre.compile('a')",
        "import subprocess\nsubprocess.run(['a'])",
    ],
)
def test_the_rule_passes(code: str) -> None:
    assert not list(wrongs(ast.parse(code)))
