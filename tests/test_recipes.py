"""Every recipe is a valid Run, is found by its name, and tells the command, the figures' source and the cost."""

from __future__ import annotations

import inspect
import re
import shlex

import pytest

from robustscale import cli, recipes
from robustscale.config import decode, encode
from robustscale.errors import InputError
from robustscale.models.network import shapes
from robustscale.run import Run
from robustscale.types import DataSpec

each = pytest.mark.parametrize("name", recipes.names())
OAT = {"cifar10_oat", "svhn_oat", "stl10_oat"}
IMAGENET = {
    f"imagenet{rest}" for rest in ("", "_wrn50_2", "_fgsm_rs", "_weak_to_strong", "_convnext_t", "_vit_s", "32", "64")
}
SMALLER = {f"{data}_{method}" for data in ("cinic10", "tiny_imagenet") for method in ("pgd_at", "trades")}
EPS = {"8/255": 8 / 255, "4/255": 4 / 255, "0.031": 0.031, "0.03": 0.03, "0.1": 0.1}


def doc(name: str) -> str:
    return inspect.getdoc(recipes.function(name)) or ""


def test_the_names_are_systematic() -> None:
    methods = ("pgd_at", "trades", "adversarial_regularization")
    cifar = {
        f"{data}_{method}{network}"
        for data in ("cifar10", "cifar100")
        for method in methods
        for network in ("", "_wrn28_10")
    }
    assert set(recipes.names()) == {"digits", "cifar10", "cifar100"} | cifar | OAT | IMAGENET | SMALLER


@each
def test_builds_a_run_of_its_own_name(name: str) -> None:
    run = recipes.get(name)
    assert isinstance(run, Run) and run.name == name
    assert recipes.get(name) == run


@each
def test_round_trips_through_json(name: str) -> None:
    run = recipes.get(name)
    assert decode(Run, encode(run)) == run


@each
def test_first_line_fits_a_listing(name: str) -> None:
    first, _, rest = doc(name).partition("\n")
    assert 0 < len(first) <= 100 and rest.startswith("\n")


def command(name: str) -> list[str]:
    (found,) = re.findall(r"^ +(python -m robustscale\.pretrain .*)$", doc(name), re.MULTILINE)
    return shlex.split(found)[3:]


@each
def test_command_names_the_recipe(name: str) -> None:
    assert command(name)[0] == name


def kinds(name: str) -> tuple[object, ...]:
    """What the options of its command depend on."""
    run = recipes.get(name)
    attack = getattr(run.objective, "attack", None)
    return (*(word for word in command(name) if word[:2] == "--"), *map(type, (run.objective, attack, run.model)))


@pytest.mark.parametrize("name", {kinds(name): name for name in recipes.names()}.values())
def test_command_gives_the_recipe(name: str) -> None:
    """The documented command, as the door reads it: which takes seconds, so one of those that are read alike."""
    assert cli.parse_run(command(name), "pretrain", "", Run()).name == name


@each
def test_documents_figures_with_their_source_and_the_cost(name: str) -> None:
    expected = re.search(r"Expected: (.+?)^Cost: (.+)", doc(name), re.DOTALL | re.MULTILINE)
    assert expected is not None
    assert re.search("published|measured", expected[1]), "figures need their source"
    assert re.search(r"minute|hour|second|as cifar", expected[2]), "a cost has a unit"


@each
def test_documents_its_eps(name: str) -> None:
    """8/255 is not 0.03 and not 0.031, so the first line says which; training and evaluation use that one."""
    run = recipes.get(name)
    word = re.search(r"(?:at|eps) ([\d./]+\d)", doc(name).partition("\n")[0])
    assert word is not None
    threats = set(re.findall(r"'name': 'l(?:inf|2)', 'eps': ([\d.e-]+)", str(encode(run))))
    assert {float(eps) for eps in threats} == {EPS[word[1]]}


@each
def test_network_fits_the_data(name: str) -> None:
    run = recipes.get(name)
    sides = dict.fromkeys(IMAGENET, 224) | {"digits": 8, "imagenet32": 32, "imagenet64": 64, "stl10_oat": 96}
    sides |= {"tiny_imagenet_pgd_at": 64, "tiny_imagenet_trades": 64}
    channels, side = 1 if name == "digits" else 3, sides.get(name, 32)
    shapes(run.model, DataSpec(channels, side, side, 10, (0.5,) * channels, (0.25,) * channels))


def test_a_dash_stands_for_an_underscore() -> None:
    assert recipes.get("cifar10-oat") == recipes.get("cifar10_oat")


@pytest.mark.parametrize("wrong, right", [("cifar10_trade", "cifar10_trades"), ("digit", "digits")])
def test_an_unknown_name_suggests_the_nearest(wrong: str, right: str) -> None:
    with pytest.raises(InputError, match=f"did you mean '{right}'"):
        recipes.get(wrong)
