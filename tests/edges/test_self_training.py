"""Images are labelled and trained on by two workers each, on a real Ray cluster."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from data_loaders.beton import Beton
from data_loaders.sources import open_source
from data_loaders.splits import Splits
from data_loaders.write import ensure
from robustscale import recipes
from robustscale.config import override
from robustscale.engine.folder import RunFolder
from robustscale.models.network import build
from tests.edges.conftest import SMALL, Command


def untrained(path: Path, root: str) -> RunFolder:
    """A run's folder as it is found by its readers; what its network has learnt makes no difference here."""
    run = override(recipes.get("digits"), {"data": {"root": root}, "model": {"base": 4}})
    splits, folder = Splits.of(run, *ensure(run.data)), RunFolder(path)
    folder.write_run(run)
    folder.write("data.json", splits.facts(run))
    folder.save_weights("last", build(run.model, splits.spec(run)), epoch=0, step=0)
    folder.write("result.json", {"weights": "last"})
    return folder


@pytest.mark.slow
def test_a_run_labels_images_and_another_trains_on_them(
    ray_head: dict[str, str], tmp_path: Path, command: Command
) -> None:
    teacher = untrained(tmp_path / "teacher", ray_head["TEST_CACHE"])
    images = np.stack([np.roll(open_source("digits", "train").image(i), 1, axis=1) for i in range(150)])
    np.savez(tmp_path / "further.npz", x=images, y=np.zeros(150, np.int64))
    out = tmp_path / "more.beton"
    done = command("robustscale.pseudo_label", teacher.path, tmp_path / "further.npz", out, env=ray_head)
    assert done.returncode == 0, done.stdout
    assert "2 workers up" in done.stdout and "labelled by teacher (last)" in done.stdout
    assert len(Beton(out)) == 150
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "further.npz",
        "more.beton",
        "more.beton.json",
        "teacher",
    ]

    options = ["--objective", "rst", "--data.unlabelled", out, "--epochs", 1, "--evaluation.attack.steps", 2]
    places = ["--storage", tmp_path, "--run-name", "student", "--data.root", ray_head["TEST_CACHE"]]
    done = command("robustscale.pretrain", *SMALL, *options, *places, env=ray_head)
    assert done.returncode == 0, done.stdout
    facts = json.loads((tmp_path / "student" / "data.json").read_text())
    assert facts["unlabelled"]["fingerprint"] == Beton(out).fingerprint
    result = json.loads((tmp_path / "student" / "result.json").read_text())
    assert (result["step"], result["workers"]) == (-(-1293 // 64), 2)
