"""The rules of the tree, read from the source: who may import whom, and what no file may do."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("robustscale", "data_loaders", "cluster", "tune")
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}

DOORS = (
    "pretrain",
    "finetune",
    "forgetting",
    "evaluate",
    "frontier",
    "prepare",
    "reproduce",
    "report",
    "export",
    "pseudo_label",
    "certify",
    "forensics",
)
LAYERS = (
    (
        "types",
        "noise",
        "threat",
        "losses",
        "errors",
        "fields",
        "config",
        "by_name",
        "parallel",
        "untrusted",
        "torchvision_guard",
    ),
    ("objectives", "attacks", "models"),
    ("run", "recipes", "experiments", "engine", "evaluation", "reports", "testing"),
    ("cli", *DOORS),
)
"""Of robustscale, from the inside out: a module imports from its own layer and those before it."""
EDGES = ("data_loaders", "cluster", "tune")
"""From the inside out too; each may import robustscale, but for its doors."""
SYSTEMS = {
    "ray": {"cluster", "tune"},
    "accelerate": {"cluster"},
    "deepspeed": {"cluster"},
    "optuna": {"tune"},
    "ffcv": {"data_loaders"},
    "numba": {"data_loaders"},
}
"""Other people's systems, and the edges at which they come in."""
each_module = pytest.mark.parametrize("name", MODULES)


def imports(tree: ast.AST) -> Iterator[str]:
    """Every module named by an import anywhere in the file; `from a import b` gives a.b, which may be a name in a."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            yield from (str(name.value) for name in node.args[:1] if isinstance(name, ast.Constant))


def tree_of(name: str) -> ast.Module:
    return ast.parse(MODULES[name].read_text(), str(MODULES[name]))


def package_and_part(name: str) -> tuple[str, str]:
    """robustscale.attacks.pgd -> (robustscale, attacks)."""
    package, _, rest = name.partition(".")
    return package, rest.partition(".")[0]


def is_door(name: str) -> bool:
    package, part = package_and_part(name)
    return package == "robustscale" and (part in DOORS or part == "cli")


def layer(part: str) -> int | None:
    return next((depth for depth, parts in enumerate(LAYERS) if part in parts), None)


def forbidden(importer: str, imported: str) -> str | None:
    """Why this import may not be, or None."""
    package, part = package_and_part(importer)
    other, other_part = package_and_part(imported)
    if other in SYSTEMS and package not in SYSTEMS[other]:
        return f"{other} comes in at {', '.join(sorted(SYSTEMS[other]))} alone"
    if other not in PACKAGES:
        return None
    if other == "robustscale" and other_part in DOORS:
        return "a door is imported by nothing"
    if package == "robustscale":
        if other in EDGES:
            return None if is_door(importer) else "only doors of robustscale import an edge"
        mine, its = layer(part), layer(other_part)
        if part and other_part and mine is not None and its is not None and its > mine:
            return f"layer {mine} may not import from layer {its}"
        return None
    if other == "robustscale":
        return "edges do not import the doors' part" if other_part == "cli" else None
    return "edges point inwards" if EDGES.index(other) > EDGES.index(package) else None


def test_the_tree_was_found() -> None:
    assert {"robustscale.types", "robustscale.attacks.pgd", "robustscale.recipes"} <= set(MODULES)


@each_module
def test_imports_point_inwards(name: str) -> None:
    wrong = {imported: why for imported in imports(tree_of(name)) if (why := forbidden(name, imported))}
    assert not wrong


@pytest.mark.parametrize(
    "importer, imported",
    [
        ("robustscale.noise", "robustscale.attacks.pgd"),
        ("robustscale.attacks.pgd", "robustscale.run.Run"),
        ("robustscale.engine.step", "robustscale.cli.door"),
        ("robustscale.engine.step", "robustscale.pretrain"),
        ("robustscale.engine.step", "data_loaders.beton"),
        ("robustscale.pretrain", "robustscale.evaluate.main"),
        ("robustscale.pretrain", "ray"),
        ("robustscale.models.resnet", "ffcv.loader"),
        ("data_loaders.beton", "cluster.launch"),
        ("data_loaders.beton", "ray.train"),
        ("cluster.launch", "robustscale.pretrain"),
        ("cluster.launch", "tune.search"),
    ],
)
def test_the_rule_itself_forbids(importer: str, imported: str) -> None:
    assert forbidden(importer, imported)


@pytest.mark.parametrize(
    "importer, imported",
    [
        ("robustscale.attacks.pgd", "robustscale.noise.Noise"),
        ("robustscale.run", "robustscale.recipes"),
        ("robustscale.pretrain", "cluster.launch.launch"),
        ("robustscale.pretrain", "robustscale.cli"),
        ("cluster.launch", "data_loaders.beton"),
        ("cluster.launch", "ray.train"),
        ("tune.search", "cluster.launch"),
        ("data_loaders.pipelines", "robustscale.types.Batch"),
    ],
)
def test_the_rule_itself_allows(importer: str, imported: str) -> None:
    assert forbidden(importer, imported) is None


def test_every_part_of_robustscale_has_a_layer() -> None:
    parts = {package_and_part(name)[1] for name in MODULES if name.startswith("robustscale.")}
    assert parts <= {p for layer in LAYERS for p in layer}, "give the new part a place in LAYERS"


WRAPPED = {
    *SYSTEMS,
    "torch",
    "torchvision",
    "numpy",
    "tyro",
    "pydantic",
    "yaml",
    "matplotlib",
    "tensorboard",
    "sklearn",
    "rich",
}


@each_module
def test_no_module_is_named_after_a_library(name: str) -> None:
    """Run as a script, `tune/optuna.py` would shadow the real one."""
    assert name.rpartition(".")[2] not in WRAPPED


def keyword(call: ast.Call, name: str) -> str | None:
    return next((ast.unparse(k.value) for k in call.keywords if k.arg == name), None)


def dangerous(node: ast.AST) -> str | None:
    """Why this piece of code may not be, or None."""
    if isinstance(node, ast.ExceptHandler):
        silent = all(
            isinstance(s, ast.Pass) or (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))
            for s in node.body
        )
        return "swallows an exception" if silent else None
    if not isinstance(node, ast.Call):
        return None
    called = ast.unparse(node.func)
    if called in ("eval", "exec"):
        return f"{called} runs what it reads"
    if called in (
        "pickle.load",
        "pickle.loads",
        "pickle.Unpickler",
        "cloudpickle.load",
        "cloudpickle.loads",
        "joblib.load",
        "dill.load",
    ):
        return f"{called} runs what it reads"
    if called == "torch.load" and keyword(node, "weights_only") != "True":
        return "torch.load without weights_only=True runs what it reads"
    if called in ("np.load", "numpy.load") and keyword(node, "allow_pickle") not in (None, "False"):
        return "np.load(allow_pickle=True) runs what it reads"
    if called in ("yaml.load", "yaml.unsafe_load", "yaml.full_load"):
        return f"{called} may run what it reads; take yaml.safe_load"
    if keyword(node, "shell") not in (None, "False") or called in ("os.system", "os.popen"):
        return "a shell would interpret its arguments"
    return None


@each_module
def test_nothing_runs_what_it_reads_or_hides_a_failure(name: str) -> None:
    wrong = {node.lineno: why for node in ast.walk(tree_of(name)) if (why := dangerous(node))}  # type: ignore[attr-defined]
    assert not wrong


@pytest.mark.parametrize(
    "code",
    [
        "try:\n    f()\nexcept OSError:\n    pass",
        "try:\n    f()\nexcept OSError:\n    ...",
        "pickle.load(file)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text, Loader=yaml.Loader)",
        "eval(text)",
        "subprocess.run(text, shell=True)",
    ],
)
def test_the_rule_itself_finds(code: str) -> None:
    assert any(dangerous(node) for node in ast.walk(ast.parse(code)))


@pytest.mark.parametrize(
    "code",
    ["torch.load(path, weights_only=True)", "np.load(path)", "yaml.safe_load(text)", "model.eval()", "json.load(f)"],
)
def test_the_rule_itself_passes(code: str) -> None:
    assert not any(dangerous(node) for node in ast.walk(ast.parse(code)))


GLOBAL_RANDOMNESS = (
    "torch.rand",
    "torch.randn",
    "torch.randint",
    "torch.randperm",
    "torch.manual_seed",
    "torch.random",
    "np.random",
    "numpy.random",
    "random",
)

SEEDED = ("robustscale.noise", "robustscale.testing.contracts", "robustscale.engine.step", "robustscale.models.network")
"""May seed torch's generators from a key: initialisers and dropout draw from nothing else."""


@pytest.mark.parametrize("name", [name for name in MODULES if name not in SEEDED])
def test_no_global_random_numbers(name: str) -> None:
    """Randomness is a function of (seed, purpose, step, example): robustscale.noise. Starting weights are torch's,
    under a fixed seed; a contract disturbs the global generator on purpose."""
    wrong = [
        node.lineno
        for node in ast.walk(tree_of(name))
        if isinstance(node, ast.Call)
        and (
            ast.unparse(node.func) in GLOBAL_RANDOMNESS[:5]
            or ast.unparse(node.func).startswith(("np.random.", "numpy.random.", "random."))
        )
        and keyword(node, "generator") is None
    ]
    assert not wrong
