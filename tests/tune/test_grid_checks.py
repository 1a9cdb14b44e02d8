"""What is found wrong with a plan before Ray starts: leaks between what is pretrained on and what is judged, and data
that has changed since a training of the plan was done."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from data_loaders.splits import Splits
from data_loaders.write import ensure, write
from robustscale.engine.folder import RunFolder
from robustscale.errors import InputError
from robustscale.experiments.base import Experiment, Figure, Training, Verdict, evaluated, result
from robustscale.models.resnet_cifar import ResNetCifar
from robustscale.run import Cluster, Data, Run
from tests.data_loaders.conftest import source_of
from tune.grid import Course, plan
from tune.grid_checks import require_ready
from tune.grid_node import finished, nodes_folder

LEAKED = 40


def images(seed: int, n: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (n, 8, 8, 1), dtype=np.uint8)


def run(folder: Path, name: str, train: NDArray[np.uint8], test: NDArray[np.uint8]) -> Run:
    labels = {f"y_{part}": np.arange(len(x)) % 10 for part, x in (("train", train), ("test", test))}
    np.savez(folder / f"{name}.npz", x_train=train, x_test=test, **labels)
    return run_on(f"npz:{folder / name}.npz", folder, name)


def run_on(source: str, folder: Path, name: str) -> Run:
    data = Data(source=source, root=str(folder / "data"), augmentation="none")
    return Run(name=name, data=data, model=ResNetCifar(8, base=4), batch_size=64, cluster=Cluster(workers=1))


def put(path: Path, seed: int, n: int) -> Path:
    write(source_of(list(images(seed, n)), np.arange(n) % 10), path)
    return path


def prepared(folder: Path, name: str, seed: int) -> Run:
    """On a folder of files that are there."""
    (folder / name).mkdir()
    put(folder / name / "train.beton", seed, 400)
    put(folder / name / "test.beton", seed + 1, 100)
    return run_on(str(folder / name), folder, name)


def do(training: Training, storage: Path, *, whole: bool = True) -> RunFolder:
    """What lies there when it is done, or begun."""
    folder, run = RunFolder(nodes_folder(storage) / training.key), training.run
    folder.write_run(run)
    folder.write("data.json", Splits.of(run, *ensure(run.data)).facts(run))
    if whole:
        folder.write("result.json", {})
    else:
        (folder.checkpoints / "step-00000001").mkdir(parents=True)
    return folder


def experiment(*trainings: Training) -> Experiment:
    figures = tuple(Figure(str(k), "RA", result(training)) for k, training in enumerate(trainings))
    return Experiment(title="", report="", claim="", figures=figures, verdict=lambda found: Verdict(None, ""))


def ready(storage: Path, asked: Experiment, *, leaks: bool = True) -> dict[str, list[str]]:
    nodes = plan(asked, 1)
    course = Course.of(nodes, [key for key, node in nodes.items() if finished(node, storage)])
    return require_ready(course, storage, storage / "report", lambda record: None, leaks=leaks)


def test_what_is_left_out_by_a_list_of_leaks_stays_left_out(tmp_path: Path) -> None:
    seen, test = images(0, 400), images(1, 100)
    seen[:LEAKED] = test[:LEAKED]
    start, tuned = run(tmp_path, "start", seen, images(2, 50)), run(tmp_path, "tuned", images(3, 400), test)
    with pytest.raises(InputError, match=r"^tuned: .* images are in the test set .* here with data\.leaks=") as refused:
        ready(tmp_path, experiment(Training(tuned, Training(start))))
    listed = Path(str(refused.value).partition("here with data.leaks=")[2].partition(";")[0])
    before = listed.read_text()
    assert 0 < len(json.loads(before)["leaks"]) <= LEAKED
    without = dataclasses.replace(start, data=dataclasses.replace(start.data, leaks=str(listed)))
    for _ in range(2):
        ready(tmp_path, experiment(Training(tuned, Training(without))))
        assert listed.read_text() == before, "the list that the run goes by was written over"


def test_what_was_found_of_the_whole_chain_is_told_in_sentences(tmp_path: Path) -> None:
    """As of a run that is tuned by itself: the oldest first, and of one with the same test set that much."""
    first = Training(run(tmp_path, "first", images(0, 400), images(1, 50)))
    second = Training(run(tmp_path, "second", images(2, 300), images(3, 100)), first)
    third = Training(run(tmp_path, "third", images(4, 400), images(5, 100)), second)
    for _ in range(2):  # found, then known from before
        told = ready(tmp_path, experiment(third))
        assert told.keys() == {second.key, third.key}
        (of_first,) = told[second.key]
        assert of_first.startswith(
            "None of the 400 images that first was trained on or chosen by is in the test set, by "
        )
        assert told[third.key][0] == of_first and told[third.key][1].startswith("None of the 300 images that second")
    same = Training(dataclasses.replace(third.run, name="same", epochs=9), third)
    assert ready(tmp_path, experiment(same))[same.key][2] == (
        "third has the same test set, and its training images were not compared with it."
    )
    ignored = ready(tmp_path, experiment(third), leaks=False)
    assert ignored.keys() == told.keys() and {len(each) for each in ignored.values()} == {1}
    assert all(sentence.endswith("--leaks ignore.") for (sentence,) in ignored.values())


def test_held_out_images_are_looked_for_too(tmp_path: Path) -> None:
    """They chose the weights."""
    seen, test = images(0, 400), images(1, 100)
    start = run(tmp_path, "start", seen, images(2, 50))
    row = int(Splits.of(start, *ensure(start.data)).held_out[0])
    seen[row] = test[0]
    start, tuned = run(tmp_path, "leaking", seen, images(2, 50)), run(tmp_path, "tuned", images(3, 400), test)
    with pytest.raises(InputError, match="1 of 400 images are in the test set"):
        ready(tmp_path, experiment(Training(tuned, Training(start))))
    listed = next((tmp_path / "report").rglob("leaks.json"))
    without = dataclasses.replace(start, data=dataclasses.replace(start.data, leaks=str(listed)))
    assert len(ready(tmp_path, experiment(Training(tuned, Training(without))))) == 1


def test_leaks_are_refused_from_wherever_in_the_chain_they_come(tmp_path: Path) -> None:
    seen, test = images(0, 400), images(1, 100)
    seen[:LEAKED] = test[:LEAKED]
    first = Training(run(tmp_path, "first", seen, images(2, 50)))
    second = Training(run(tmp_path, "second", images(3, 400), images(4, 50)), first)
    third = Training(run(tmp_path, "third", images(5, 400), test), second)
    assert ready(tmp_path, experiment(second)).keys() == {second.key}
    with pytest.raises(InputError, match=r"^third: .*first.* images are in the test set"):
        ready(tmp_path, experiment(third))


@pytest.mark.parametrize("whole", [True, False], ids=["done", "begun"])
@pytest.mark.parametrize("part", ["train", "test", "unlabelled"])
def test_data_that_has_changed_since_it_was_trained_on_is_refused(tmp_path: Path, part: str, whole: bool) -> None:
    start = prepared(tmp_path, "start", 0)
    start = dataclasses.replace(
        start, data=dataclasses.replace(start.data, unlabelled=str(put(tmp_path / "start" / "unlabelled.beton", 7, 90)))
    )
    asked = experiment(Training(prepared(tmp_path, "tuned", 3), Training(start)))
    do(Training(start), tmp_path, whole=whole)
    ready(tmp_path, asked)
    put(tmp_path / "start" / f"{part}.beton", 5, 400)
    with pytest.raises(InputError) as refused:
        ready(tmp_path, asked)
    assert str(refused.value) == (
        f"start: {tmp_path}/start/{part}.beton: not its {part} set any more (other fingerprint); restore the file, or "
        "take another --storage"
    )


def test_what_would_begin_anew_or_is_all_done_may_have_other_data(tmp_path: Path) -> None:
    asked = experiment(Training(prepared(tmp_path, "one", 0)))
    shutil.rmtree(do(Training(prepared_run(asked)), tmp_path, whole=False).checkpoints)
    put(tmp_path / "one" / "train.beton", 5, 400)
    ready(tmp_path, asked)
    do(Training(prepared_run(asked)), tmp_path)
    put(tmp_path / "one" / "train.beton", 6, 400)
    assert ready(tmp_path, asked) == {}


def prepared_run(asked: Experiment) -> Run:
    return asked.figures[0].reading.training.run


def test_leaks_are_looked_for_though_the_prepared_file_is_gone(tmp_path: Path) -> None:
    """Where its source is there still: the training was done, and the cache of data cleaned."""
    seen, test = images(0, 400), images(1, 100)
    seen[:LEAKED] = test[:LEAKED]
    start, tuned = run(tmp_path, "start", seen, images(2, 50)), run(tmp_path, "tuned", images(3, 400), test)
    do(Training(start), tmp_path)
    shutil.rmtree(tmp_path / "data")
    with pytest.raises(InputError, match="images are in the test set"):
        ready(tmp_path, experiment(Training(tuned, Training(start))))


def test_nothing_is_prepared_for_what_is_done(tmp_path: Path) -> None:
    """Its data may be gone; what it starts, is told so."""
    start, tuned = prepared(tmp_path, "start", 0), prepared(tmp_path, "tuned", 3)
    both = Training(tuned, Training(start))
    do(Training(start), tmp_path)
    for file in (tmp_path / "start").iterdir():
        file.unlink()
    (sentence,) = ready(tmp_path, experiment(both))[both.key]
    assert sentence.startswith(f"{tmp_path}/start/train.beton: not here any more, so whether ")
    do(both, tmp_path)
    for file in (tmp_path / "tuned").iterdir():
        file.unlink()
    assert ready(tmp_path, experiment(both)) == {}


def test_what_a_source_is_now_is_compared_with_what_was_trained_on(tmp_path: Path) -> None:
    """Of an archive that was written over, the older files are still where they were prepared."""
    done = Training(run(tmp_path, "one", images(0, 400), images(1, 100)))
    do(done, tmp_path)
    waiting = Training(dataclasses.replace(run(tmp_path, "one", images(2, 400), images(1, 100)), epochs=9))
    with pytest.raises(InputError, match=r"^one: .*-train\.beton: not its train set any more"):
        ready(tmp_path, experiment(done, waiting))


def test_a_reading_that_waits_is_of_the_data_that_was_trained_on(tmp_path: Path) -> None:
    done = Training(prepared(tmp_path, "one", 0))
    do(done, tmp_path)
    asked = dataclasses.replace(experiment(done), figures=(Figure("a", "RA", evaluated(done)),))
    assert ready(tmp_path, asked) == {}
    put(tmp_path / "one" / "test.beton", 5, 100)
    with pytest.raises(InputError, match=r"^one: .*test\.beton: not its test set any more"):
        ready(tmp_path, asked)
