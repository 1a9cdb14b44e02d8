"""Every objective, attack and network through `python -m robustscale.pretrain`, on two workers, and resumed."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from robustscale.config import components
from robustscale.engine.folder import RunFolder
from robustscale.types import Attack, Averaging, Model, Objective
from tests.edges.conftest import Command

TINY = {"name": "resnet_cifar", "depth": 8, "base": 4}
TINY_RESNET = {"name": "resnet", "width": 0.0625}
CW = {"threat": {"name": "l2", "eps": 0.5}, "steps": 3, "search_steps": 2}
NEEDS: dict[str, dict[str, Any]] = {
    "objective oat": {"model": {"name": "conditional", "model": TINY}},
    "objective oats": {"model": {"name": "conditional", "model": {"name": "slimmable", "model": TINY_RESNET}}},
    "objective rst": {"data": {"unlabelled": "UNLABELLED"}},
    "objective rst_pgd_at": {"data": {"unlabelled": "UNLABELLED"}},
    "attack carlini_wagner": {"objective": {"attack": CW, "goal": {"loss": "margin"}}},
    "attack apgd": {"objective": {"attack": {"steps": 3}}},
    "attack eot": {"objective": {"attack": {"draws": 2}}},
    "model resnet": {"model": TINY_RESNET},
    "model slimmable": {"model": {"model": TINY_RESNET}},
    "model wide_resnet": {"model": {"depth": 10, "widen": 1}},
    "model torchvision_zoo": {"model": {"arch": "resnet18"}},
    "model vgg": {"model": {"width": 0.0625}, "data": {"source": "LARGE"}},
}
"""What a method can't do without, and sizes that fit a test."""
EVERY = [
    f"{kind.__name__.lower()} {name}" for kind in (Objective, Attack, Model, Averaging) for name in components(kind)
]


def configuration(method: str, files: Path) -> dict[str, Any]:
    """A short run on the digits, as --config takes it."""
    kind, _, name = method.partition(" ")
    choice: dict[str, Any] = {"objective": {"attack": {"name": name}}}
    if kind in ("objective", "averaging"):
        choice = {kind: {"name": name}}
    elif kind == "model":
        wrapper = "model" in {field.name for field in dataclasses.fields(components(Model)[name])}
        choice = {"model": {"name": name, **({"model": TINY} if wrapper else {})}}
    needs = json.loads(json.dumps(NEEDS.get(method, {})).replace("UNLABELLED", str(files / "more.beton")))
    needs = json.loads(json.dumps(needs).replace("LARGE", str(files)))
    short = {"epochs": 2, "evaluation": {"monitor": {"steps": 2}}, "checkpoints": {"every_steps": 3}}
    return merged({"recipe": "digits", "model": TINY, **short}, merged(choice, needs))


def merged(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Nested; a part with another name takes the place of the old one."""
    result = dict(one)
    for key, value in other.items():
        before = one.get(key)
        if (
            isinstance(value, dict)
            and isinstance(before, dict)
            and value.get("name", before.get("name")) == before.get("name")
        ):
            value = merged(before, value)
        result[key] = value
    return result


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits as 32 x 32 images; and a pixel further to the right, as if a network had labelled them, since their
    own images are refused."""
    from data_loaders.sources import open_source
    from data_loaders.write import write

    folder = tmp_path_factory.mktemp("files")
    digits = open_source("digits", "train")
    write(dataclasses.replace(digits, image=lambda i: np.roll(digits.image(i), 1, axis=1)), folder / "more.beton")
    for split in ("train", "test"):
        write(open_source("digits", split), folder / f"{split}.beton", resolution=32, format="array")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("method", EVERY)
def test_trains_and_resumes(
    method: str, files: Path, command: Command, ray_head: dict[str, str], tmp_path: Path
) -> None:
    config = tmp_path / "run.json"
    config.write_text(json.dumps(configuration(method, files)))
    args = ["--config", config, "--run-name", "one", "--storage", tmp_path, "--data.root", ray_head["TEST_CACHE"]]
    done = command("robustscale.pretrain", *args, env=ray_head)
    assert done.returncode == 0, done.stdout
    folder = RunFolder(tmp_path / "one")
    result, weights = folder.read("result.json"), folder.weights_path("last").read_bytes()
    assert 0 <= result["ra"] <= result["sa"] <= 1 and result["n"] == 360
    # As if the last checkpoint had not been reached.
    (folder.path / "result.json").unlink()
    shutil.rmtree(max(folder.checkpoints.glob("step-*")))
    again = command("robustscale.pretrain", *args, env=ray_head)
    assert again.returncode == 0 and "resumed at step" in again.stdout, again.stdout
    assert folder.weights_path("last").read_bytes() == weights
    assert folder.read("result.json")["sa"] == result["sa"]


def test_help_names_every_method(command: Command) -> None:
    text = command("robustscale.pretrain", "--help").stdout
    names = [method.partition(" ")[2] for method in EVERY]
    # Whole words among the choices: "rat" alone would be found in "iterations".
    words = set(re.findall(r"\w+", text[text.index("A part that has alternatives") : text.index("options ──")]))
    assert set(names) <= words
