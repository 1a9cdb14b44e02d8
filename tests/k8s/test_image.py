"""The image's recipe, as far as it can be read: nothing here has built it."""

from __future__ import annotations

import re
import shlex

from cluster.orders import GRACE
from tests.k8s.policy import USER
from tests.k8s.rendering import ROOT

DOCKERFILE = ROOT / "k8s" / "Dockerfile"
Instruction = tuple[str, str]


def instructions(text: str) -> list[Instruction]:
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    whole = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(line.partition(" ")[0], line.partition(" ")[2].strip()) for line in whole.splitlines() if line]


def given(kind: str) -> list[str]:
    return [value for name, value in instructions(DOCKERFILE.read_text()) if name == kind]


def test_it_starts_from_one_python_that_is_supported() -> None:
    assert given("FROM") == ["${BASE}"]
    base = given("ARG")[0].removeprefix("BASE=")
    assert re.fullmatch(r"docker\.io/library/python:3\.1[12]\.\d+-slim-[a-z]+", base)


def test_it_installs_the_system_packages_that_the_set_up_would() -> None:
    """But for Python's own, which the base image has."""
    setup = (ROOT / "setup.sh").read_text()
    body = setup.partition("missing_packages() {")[2].partition("\n}")[0]
    wanted = {name.strip('"') for name in re.findall(r"\|\| echo (\S+)$", body, re.MULTILINE)}
    wanted = {name for name in wanted if not name.startswith("python")}
    (apt,) = [run for run in given("RUN") if "apt-get" in run]
    words = shlex.split(apt.partition("apt-get install")[2].partition("&&")[0])
    assert {word for word in words if not word.startswith("-")} == wanted
    assert len(wanted) == 6


def test_it_is_set_up_as_a_checkout_is() -> None:
    default = re.search(r"TORCH=\$\{TORCH:-(\S+)\}", (ROOT / "setup.sh").read_text())
    assert default is not None and f"TORCH={default[1]}" in given("ARG")
    steps = [step for step in instructions(DOCKERFILE.read_text()) if step[0] in ("COPY", "RUN", "USER", "WORKDIR")]
    set_up = steps.index(("RUN", "./setup.sh"))
    assert ("COPY", "setup.sh pyproject.toml constraints.txt ./") in steps[:set_up]
    assert steps[-1][0] == "USER" and steps[set_up - 2][0] == "WORKDIR"


def test_it_holds_the_checkout_and_nothing_else_of_it() -> None:
    copied = [source for copy in given("COPY") for source in copy.split()[:-1]]
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} <= set(copied)
    for source in copied:
        assert (ROOT / source).exists(), source
    ignored = (ROOT / "k8s" / "Dockerfile.dockerignore").read_text().split()
    assert {line.removeprefix("!") for line in ignored if line.startswith("!")} == set(copied)


def test_it_runs_as_the_user_of_the_manifests_from_a_root_that_may_be_read_only() -> None:
    assert given("USER") == [f"{USER}:{USER}"]
    (folder,) = given("WORKDIR")
    (environment,) = given("ENV")
    variables = dict(word.split("=", 1) for word in shlex.split(environment))
    assert variables["PYTHONPATH"] == folder
    assert variables["PATH"].split(":")[0] == f"{folder}/.venv/bin"
    assert variables["HOME"] == "/tmp"
    assert float(variables["RAY_JOB_STOP_WAIT_TIME_S"]) > GRACE


def test_nothing_is_the_latest_and_nothing_comes_from_an_address() -> None:
    text = DOCKERFILE.read_text()
    assert "latest" not in text
    assert not re.search(r"^(ADD|.*\b(curl|wget)\b)", text, re.MULTILINE)
