"""The set-up's promises that can be checked without an installation: its sentences, and the lock's completeness."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = {
    Requirement(line).name: Requirement(line)
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if not line.startswith("#")
}
NEEDED_BY_SETUP = ("awk", "bash", "cat", "dirname", "flock", "g++", "sed", "sha256sum")


def declared() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"].values()
    return [Requirement(line) for line in [*PROJECT["dependencies"], *(line for extra in extras for line in extra)]]


def closure() -> set[str]:
    """The canonical names of everything that pyproject.toml asks for, directly or not, as installed here."""
    seen: set[tuple[str, frozenset[str]]] = set()
    todo = declared()
    while todo:
        requirement = todo.pop()
        key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if key in seen:
            continue
        seen.add(key)
        for line in importlib.metadata.requires(requirement.name) or []:
            needed = Requirement(line)
            extras = requirement.extras or {""}
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                todo.append(needed)
    return {name for name, _ in seen}


def set_up(checkout: Path, path: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHON", "TORCH")}
    return subprocess.run(
        [checkout / "setup.sh"],
        env={**clean, "PATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
        check=False,
    )


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout without a .venv, so that nothing here can touch the one that runs the tests."""
    for name in ("setup.sh", "constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


@pytest.fixture
def bare(tmp_path: Path) -> str:
    """A PATH with next to nothing on it: no pkg-config, no apt-get, no sudo."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in NEEDED_BY_SETUP:
        found = shutil.which(name)
        assert found, f"{name} is not on this machine"
        (tools / name).symlink_to(found)
    return str(tools)


def test_every_package_is_pinned_to_what_is_installed() -> None:
    chosen_by_torch = re.compile("torch|torchvision|triton|nvidia-.*|cuda-toolkit")
    wanted = {name for name in closure() if not chosen_by_torch.fullmatch(name)}
    installed = {name: f"{name}=={importlib.metadata.version(name)}" for name in wanted}
    assert installed == {name: str(PINS[name]) for name in wanted if name in PINS}


def test_pins_satisfy_what_is_declared() -> None:
    for requirement in declared():
        pin = PINS.get(canonicalize_name(requirement.name))
        assert requirement.name in ("torch", "torchvision") or pin is not None, requirement.name
        if pin is not None:
            (exact,) = pin.specifier
            assert exact.operator == "==" and requirement.specifier.contains(exact.version), f"{pin} for {requirement}"


@pytest.mark.parametrize(
    "environment, message",
    [
        ({"TORCH": "2.10.0"}, "TORCH=2.10.0 is not supported; give a version from 2.11.0 to 2.13"),
        (
            {"PYTHON": "no-such-python"},
            r"found no Python 3.11 or 3.12 \(tried: no-such-python\); install one, or name it",
        ),
    ],
)
def test_what_is_not_supported_is_refused_in_one_line(
    checkout: Path, environment: dict[str, str], message: str
) -> None:
    done = set_up(checkout, os.environ["PATH"], **environment)
    assert done.returncode == 2
    assert re.fullmatch(f"error: {message}.*\n", done.stderr)
    assert not (checkout / ".venv").exists()


def test_missing_system_packages_are_named_where_they_cannot_be_installed(checkout: Path, bare: str) -> None:
    done = set_up(checkout, bare, PYTHON=sys.executable)
    assert done.returncode == 2
    assert re.fullmatch(
        "error: the system lacks .*pkg-config libturbojpeg0-dev libopencv-dev.* no apt-get; install them .*\n",
        done.stderr,
    )
    assert not (checkout / ".venv").exists()


def test_make_help_names_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text()
    (phony,) = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    done = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert re.findall(r"^make (\w+)", done.stdout, re.MULTILINE) == phony.split()


def test_ci_runs_the_test_command() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text().splitlines()[-1] == "exec make test"
