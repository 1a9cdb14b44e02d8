"""What is found wrong with a plan before Ray starts: leaks between what is pretrained on and what is judged."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from robustscale.errors import InputError
from robustscale.experiments.base import Experiment, Figure, Training, Verdict, result
from robustscale.models.resnet_cifar import ResNetCifar
from robustscale.run import Cluster, Data, Run
from tune.grid import Course, plan
from tune.grid_checks import require_ready

LEAKED = 40


def images(seed: int, n: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (n, 8, 8, 1), dtype=np.uint8)


def run(folder: Path, name: str, train: NDArray[np.uint8], test: NDArray[np.uint8]) -> Run:
    labels = {f"y_{part}": np.arange(len(x)) % 10 for part, x in (("train", train), ("test", test))}
    np.savez(folder / f"{name}.npz", x_train=train, x_test=test, **labels)
    data = Data(source=f"npz:{folder / name}.npz", root=str(folder / "data"), augmentation="none")
    return Run(name=name, data=data, model=ResNetCifar(8, base=4), batch_size=64, cluster=Cluster(workers=1))


def check(start: Run, tuned: Run, folder: Path) -> None:
    figure = Figure("a", "RA", result(Training(tuned, Training(start))))
    experiment = Experiment(title="", report="", claim="", figures=(figure,), verdict=lambda found: Verdict(None, ""))
    require_ready(Course.of(plan(experiment, 1)), folder, lambda record: None, leaks=True)


def test_what_is_left_out_by_a_list_of_leaks_stays_left_out(tmp_path: Path) -> None:
    seen, test = images(0, 400), images(1, 100)
    seen[:LEAKED] = test[:LEAKED]
    start, tuned = run(tmp_path, "start", seen, images(2, 50)), run(tmp_path, "tuned", images(3, 400), test)
    with pytest.raises(InputError, match=r"^tuned: .* images are in the test set .* here with data\.leaks=") as refused:
        check(start, tuned, tmp_path / "report")
    listed = Path(str(refused.value).partition("here with data.leaks=")[2].partition(";")[0])
    before = listed.read_text()
    assert 0 < len(json.loads(before)["leaks"]) <= LEAKED
    without = dataclasses.replace(start, data=dataclasses.replace(start.data, leaks=str(listed)))
    for _ in range(2):
        check(without, tuned, tmp_path / "report")
        assert listed.read_text() == before, "the list that the run goes by was written over"
