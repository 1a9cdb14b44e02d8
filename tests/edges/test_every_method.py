"""Every objective, attack and network through `python -m robustscale.pretrain`, on two workers, and resumed."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from robustscale.engine.folder import RunFolder
from tests.edges.conftest import Command
from tests.every_method import EVERY, configuration


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
