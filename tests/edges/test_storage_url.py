"""Runs that are kept under a URL, on nodes that share no disk."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE, STDOUT, CompletedProcess, Popen

import pytest

from cluster.worker import _folder
from data_loaders.splits import Splits
from data_loaders.write import ensure
from robustscale import cli, recipes
from robustscale.config import encode
from robustscale.engine.backend import LocalBackend
from robustscale.engine.folder import RunFolder
from robustscale.engine.remote import Remote
from robustscale.run import Run
from tests.edges import conftest
from tests.edges.conftest import Command
from tests.edges.machines import SMALL, Driver, assert_as_undisturbed, driver, kill_group, machines, steps, until
from tests.engine.object_stores import KEYS, mirrored_in, s3_server, s3_url

JUDGED = ["--data.held-out", "0.1", "--evaluation.monitor.steps", "2"]
FILES = {"run.json", "data.json", "metrics.jsonl", "result.json", "weights/last.safetensors", "README.md", "curves.png"}


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with s3_server() as address:
        yield address


@pytest.mark.slow
def test_run_is_under_its_url(command: Command, ray_head: dict[str, str], tmp_path: Path) -> None:
    storage = f"file://{tmp_path}/there"
    done = _pretrain(command, ray_head, storage, tmp_path / "driver")
    assert done.returncode == 0, done.stdout
    assert f"{storage}/digits/  (here: {tmp_path}/driver/" in done.stdout
    found = Remote(f"{storage}/digits").list()
    assert found.keys() >= FILES
    assert sum(name.endswith("MANIFEST.json") for name in found) == 2
    assert not [name for name in found if name.startswith((".", "ray/", "stacks/"))]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_doors_take_the_url_of_a_run(command: Command, ray_head: dict[str, str], tmp_path: Path) -> None:
    storage = f"file://{tmp_path}/there"
    assert _pretrain(command, ray_head, storage, tmp_path / "driver").returncode == 0
    again = _pretrain(command, ray_head, storage, tmp_path / "other")
    assert (again.returncode, f"{storage}/digits: this run is finished" in again.stdout) == (0, True), again.stdout
    for door, *more in (
        ("export", "--format", "safetensors"),
        ("evaluate", "--attacks", "fgsm"),
        ("certify", "--sigma", "0.25", "--n", "20", "--n0", "5", "--images", "4"),
        ("forensics", "--images", "20"),
    ):
        # Nothing is left of what was pulled before.
        env = ray_head | {"ROBUSTSCALE_MIRRORS": str(tmp_path / door)}
        done = command(f"robustscale.{door}", f"{storage}/digits", *more, env=env)
        assert done.returncode == 0, done.stdout
    found = Remote(f"{storage}/digits").list()
    assert any(name.startswith("export/") for name in found)
    assert found.keys() >= {"evaluation/evaluation.json", "certify-0.25/certify.json", "forensics/forensics.json"}


def _pretrain(command: Command, ray_head: dict[str, str], storage: str, mirrors: Path) -> CompletedProcess[str]:
    args = [*conftest.SMALL, "--epochs", "1", "--data.root", ray_head["TEST_CACHE"], "--storage", storage]
    return command("robustscale.pretrain", *args, env=ray_head | {"ROBUSTSCALE_MIRRORS": str(mirrors)})


def test_what_cannot_be_reached_is_told_before_ray_starts(command: Command) -> None:
    done = command(
        "robustscale.pretrain", "--storage", "s3://bucket/x?endpoint_override=127.0.0.1:1&scheme=http", env=KEYS
    )
    assert (done.returncode, done.stdout.count("\n")) == (2, 1), done.stdout
    assert "error: s3://bucket/x/digits?" in done.stdout
    assert "check its name, the credentials in the environment, and the network" in done.stdout


def test_search_takes_no_url(command: Command) -> None:
    done = command("robustscale.frontier", "digits", "--storage", "s3://bucket/x")
    assert (done.returncode, "storage: s3://bucket/x is a URL" in done.stdout) == (2, True), done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_and_damaged_it_goes_on_from_a_copy_on_another_machine(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trial's worker, which needs no Ray: killed once it has two checkpoints, of which the newer is damaged then."""
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    url = s3_url(s3, "alone/digits")
    run = cli.parse_run(
        [*SMALL, "--epochs", "2", "--checkpoints.every-steps", "5", *JUDGED], "", "", recipes.get("digits")
    )
    run = dataclasses.replace(run, reduction="deterministic")
    remote = Remote(url)
    with _alone(run, url, tmp_path / "one") as worker:
        until(lambda: newest(remote) >= 10 or worker.poll() is not None, 200)
        kill_group(worker)
    step = newest(remote)
    damage(remote, step)
    with _alone(run, url, tmp_path / "other") as worker:
        out, _ = worker.communicate(timeout=200)
    assert worker.returncode == 0, out
    assert f"step-{step:08d} is not used" in out
    assert "resumed at step" in out
    with _alone(run, str(tmp_path / "undisturbed"), tmp_path) as worker:
        assert worker.communicate(timeout=200) and worker.returncode == 0
    with mirrored_in(tmp_path / "reader"):
        found, twin = RunFolder(url), RunFolder(tmp_path / "undisturbed")
        found.pull()
    assert steps(found) == steps(twin) == list(range(1, 23))
    assert found.weights_path("last").read_bytes() == twin.weights_path("last").read_bytes()
    assert found.read("trial.json")["ra"] == twin.read("trial.json")["ra"]


def test_training_goes_on_from_the_newest_files_beside_an_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same run on the same machine, since before the run came so far elsewhere."""
    url = f"file://{tmp_path}/there/run"
    with mirrored_in(tmp_path / "elsewhere"):
        before = RunFolder(url)
    before.pull()
    before.write("writer.json", {"attempt": "first"})
    before.push()
    monkeypatch.setenv("ROBUSTSCALE_MIRRORS", str(tmp_path / "here"))
    backend = LocalBackend("cpu")
    with _folder({"folder": url, "task": "evaluate"}, backend) as evaluation:
        evaluation.write("evaluation.json", {})
        before.write("writer.json", {"attempt": "second"})
        before.push()
        with _folder({"folder": url, "task": "pretrain"}, backend) as training:
            assert training.read("writer.json") == {"attempt": "second"}
    assert Remote(url).list().keys() == {"writer.json", "evaluation.json"}


def _alone(run: Run, place: str, mirrors: Path) -> Popen[str]:
    data = Splits.of(run, *ensure(run.data)).facts(run)
    config = {
        "task": "trial",
        "run": encode(run),
        "folder": place,
        "options": {"data": data},
        "threads": 1,
        "gpu": False,
    }
    code = "import json, sys; from cluster.worker import alone; alone(json.loads(sys.argv[1]), print)"
    env = os.environ | {"ROBUSTSCALE_MIRRORS": str(mirrors), "PYTHONPATH": str(conftest.ROOT)}
    command = [sys.executable, "-c", code, json.dumps(config)]
    return Popen(command, cwd=conftest.ROOT, env=env, stdout=PIPE, stderr=STDOUT, text=True, start_new_session=True)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_nodes_that_share_no_disk_lose_nothing(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two nodes with a worker each, one is killed; then the driver; then the newest checkpoint is damaged; a driver
    on a third machine goes on. The weights are bitwise those of the run that nothing happened to."""
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    url = s3_url(s3, "disks")
    args = [
        *SMALL,
        "--epochs",
        "6",
        "--reduction",
        "deterministic",
        "--storage",
        url,
        "--checkpoints.every-epochs",
        "100",
    ]
    keys = KEYS | {"ROBUSTSCALE_MIRRORS": str(tmp_path / "head")}
    with machines(tmp_path, env=keys) as cluster:
        for number in (1, 2):
            cluster.env["ROBUSTSCALE_MIRRORS"] = str(tmp_path / f"node-{number}")
            cluster.add_node(1)
        env = cluster.env | {"ROBUSTSCALE_MIRRORS": str(tmp_path / "driver")}
        remote = Remote(s3_url(s3, "disks/digits"))
        with driver(env, *args) as run:
            wait_for_checkpoint(remote, 20, run)
            kill_group(cluster.nodes[0])
            cluster.env["ROBUSTSCALE_MIRRORS"] = str(tmp_path / "node-3")
            cluster.add_node(1)
            run.wait_for("going on from the last checkpoint", 200)
            wait_for_checkpoint(remote, newest(remote) + 20, run)
            kill_group(run.process)
        step = newest(remote)
        assert {path.name for path in tmp_path.iterdir()} >= {"node-1", "node-2", "node-3", "driver"}
        damage(remote, step)
        env["ROBUSTSCALE_MIRRORS"] = str(tmp_path / "another driver")
        with driver(env, "--resume", s3_url(s3, "disks/digits")) as run:
            assert run.wait(500) == 0, run.output
        # By who rank 0 is: one that pulled it damaged, or one that has a sound copy of its own.
        told = (f"step-{step:08d} is not used", "is sound, and the same, on every machine")
        assert any(words in run.output.replace("\n", "") for words in told), run.output
    with mirrored_in(tmp_path / "reader"):
        found = RunFolder.existing(remote.url)
    assert_as_undisturbed(found, tmp_path)


def newest(remote: Remote) -> int:
    names = [name for name in remote.list("checkpoints") if name.endswith("MANIFEST.json")]
    return max((int(name.split("/")[1][5:]) for name in names), default=0)


def wait_for_checkpoint(remote: Remote, step: int, run: Driver) -> None:
    until(lambda: newest(remote) >= step or run.process.poll() is not None, 300)
    assert run.process.poll() is None, run.output


def damage(remote: Remote, step: int) -> None:
    name = f"checkpoints/step-{step:08d}/model.safetensors"
    remote.write(name, remote.read(name)[:-1] + b"#")
