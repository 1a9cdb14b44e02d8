"""Every experiment of the source reports runs to its end, at the smallest scale, by the command that a person types."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from robustscale import experiments
from robustscale.experiments.base import SCALES
from robustscale.reports.experiment import percent
from tests.edges.conftest import ROOT

EPOCHS = "0.005"
"""Of the published ones: one epoch of each training."""


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of all experiments, as a person would have it: what two of them train is trained once."""
    return tmp_path_factory.mktemp("reproduced")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", experiments.names())
def test_an_experiment_runs_to_its_end(name: str, ray_head: dict[str, str], storage: Path) -> None:
    words = [name, "--scale", "smoke", "--epochs", EPOCHS, "--concurrent", "2", "--storage", str(storage)]
    done = subprocess.run(
        [sys.executable, "-m", "robustscale.reproduce", *words, f"data.root={ray_head['TEST_CACHE']}"],
        cwd=ROOT,
        env=os.environ | ray_head,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=850,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    folder = storage / f"{name}-smoke"
    report = json.loads((folder / "experiment.json").read_text())
    defined = experiments.get(name, SCALES["smoke"])
    assert report["nodes"]["done"] == report["nodes"]["total"] and report["nodes"]["failures"] == []
    assert report["claim"] == defined.claim and report["verdict"]["why"]
    assert all(0 <= figure["mean"] <= 1 and figure["n"] for figure in report["figures"])
    assert (folder / "experiment.png").exists() == (defined.plot is not None)
    for figure in report["figures"]:
        if figure["published"] is not None:
            assert f"({percent(figure['published'])})" in (folder / "table.md").read_text()
