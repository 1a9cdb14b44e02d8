"""Finished runs, judged at many points under a real Ray cluster, and the points taken by the export command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.edges.conftest import ROOT, SMALL, Command

SCRIPT = """\
import json, sys
from cluster.curves import interpolation_curve, lambda_curves, mixture_curve, runs_curve
from robustscale.cli import with_workers
from robustscale.engine.folder import RunFolder
from robustscale.evaluation.operating_points import Judging

oat, a, b = (RunFolder.existing(f"{sys.argv[1]}/{name}") for name in ("oat", "a", "b"))
judging, show = Judging(steps=2, full_steps=2), print
run = with_workers(oat.run(), 1)
made = lambda_curves(run, oat, [0.0, 0.35, 1.0], [], judging, show)
made.append(runs_curve(run, oat, [a, b], judging, show))
made.append(interpolation_curve(a.run(), a, b, [0.0, 0.5], judging, show))
made.append(mixture_curve(b.run(), a, b, [0.0, 0.7], Judging(steps=2, test=False), show))
open(sys.argv[2], "w").write(json.dumps(made))
"""
TOLD = ["--model", "conditional", "--model.model", "resnet_cifar", "--model.model.depth", "8"]
TOLD += ["--model.model.base", "4", "--model.dimensions", "8", "--objective", "oat", "--objective.attack.steps", "2"]


@pytest.mark.slow
def test_points_are_judged_and_taken(ray_head: dict[str, str], tmp_path: Path, command: Command) -> None:
    shared = ["--storage", tmp_path, "--data.root", ray_head["TEST_CACHE"]]
    small = ["digits", "--epochs", "2", "--evaluation.monitor.steps", "2", "--evaluation.attack.steps", "3"]
    for name, options in {
        "oat": [*small, *TOLD],
        "a": [*SMALL, "--evaluation.attack.steps", "3", "--objective", "natural"],
        "b": [*SMALL, "--evaluation.attack.steps", "3"],
    }.items():
        done = command("robustscale.pretrain", *options, *shared, "--run-name", name, env=ray_head)
        assert done.returncode == 0, done.stdout
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), str(tmp_path / "made.json")],
        cwd=ROOT,
        env=ray_head,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told, beside, weights, outputs = json.loads((tmp_path / "made.json").read_text())
    assert [curve["kind"] for curve in (told, beside, weights, outputs)] == [
        "lambda",
        "runs",
        "interpolation",
        "mixture",
    ]
    written = sorted(path.name for path in tmp_path.glob("*/frontier/*") if path.is_file())
    assert written == [
        "curve-interpolation-b.json",
        "curve-lambda.json",
        "curve-mixture-b.json",
        "curve-runs.json",
    ]
    assert [point["at"] for point in beside["points"]] == [{"run": "a"}, {"run": "b"}]
    assert all((point["n"], point["test"]["n"]) == (144, 360) for point in told["points"] + beside["points"])
    assert [point["test"] for point in outputs["points"]] == [None, None]
    _same_as_result(told["points"][2], tmp_path / "oat")  # lam 1 is the model's own
    _same_as_result(weights["points"][0], tmp_path / "a")
    for point in (told["points"][1], weights["points"][1], outputs["points"][1]):
        module, *arguments = point["command"].split()[2:]
        done = command(module, *arguments, env=ray_head)
        assert done.returncode == 0 and "largest difference" in done.stdout, done.stdout


def _same_as_result(point: dict[str, Any], folder: Path) -> None:
    """Read by another number of workers, whose kernels round otherwise: one image of 360 may change sides."""
    result = json.loads((folder / "result.json").read_text())
    assert abs(point["test"]["sa"] - result["sa"]) <= 1.01 / 360
    assert abs(point["test"]["ra"] - result["ra"]) <= 1.01 / 360
