"""A whole run under a real Ray cluster, from one command: what it leaves behind, resuming, and evaluating it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from robustscale.engine.callbacks.log import read_lines
from robustscale.engine.folder import RunFolder
from tests.edges.conftest import ROOT, SMALL, Command


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def finished(ray_head: dict[str, str], storage: Path) -> tuple[RunFolder, str]:
    """A small run on the digits, with what it printed."""
    args = [*SMALL, "--storage", str(storage), "--run-name", "one", "--data.root", ray_head["TEST_CACHE"]]
    done = subprocess.run(
        [sys.executable, "-m", "robustscale.pretrain", *args],
        cwd=ROOT,
        env=ray_head,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return RunFolder(storage / "one"), done.stdout


def test_a_run_leaves_everything_it_promises(finished: tuple[RunFolder, str]) -> None:
    folder, printed = finished
    assert str(folder.path) in printed
    assert folder.run().epochs == 2
    result = folder.read("result.json")
    assert result["n"] == 360
    assert 0 <= result["ra"] <= result["sa"] <= 1
    data = folder.read("data.json")
    assert data["held_out"] + 1293 == 1437 and len(data["train"]["fingerprint"]) == 64
    events = {record["event"] for record in read_lines(folder)}
    assert events == {"step", "epoch"}
    for picture in ("curves.png", "examples.png"):
        with Image.open(folder.path / picture) as image:
            assert min(image.size) > 300
    card = (folder.path / "README.md").read_text()
    figures = (f"{100 * result['sa']:.1f}", f"{100 * result['ra']:.1f}")
    for fact in (data["test"]["fingerprint"], *figures, "robustscale.evaluate"):
        assert fact in card
    assert list(folder.tensorboard.glob("events.out.tfevents.*"))
    assert folder.network("best") is not None
    assert folder.network("last") is not None
    assert list(folder.checkpoints.glob("step-*/MANIFEST.json"))


def test_a_finished_run_says_so_and_does_nothing(
    finished: tuple[RunFolder, str], command: Command, ray_head: dict[str, str]
) -> None:
    folder, _ = finished
    before = (folder.path / "result.json").stat().st_mtime_ns
    done = command("robustscale.pretrain", "--resume", os.path.relpath(folder.path, ROOT), env=ray_head)
    assert done.returncode == 0 and "finished" in done.stdout
    assert (folder.path / "result.json").stat().st_mtime_ns == before


def test_the_same_name_with_another_configuration_is_refused(
    finished: tuple[RunFolder, str], command: Command, ray_head: dict[str, str], storage: Path
) -> None:
    done = command("robustscale.pretrain", *SMALL, "--storage", storage, "--run-name", "one", "--seed", 7, env=ray_head)
    assert done.returncode == 2
    assert done.stdout.count("\n") == 1 and "seed: 0 there, 7 now" in done.stdout


@pytest.mark.slow
def test_evaluation_counts_every_image_once_whatever_the_workers(
    finished: tuple[RunFolder, str], command: Command, ray_head: dict[str, str]
) -> None:
    folder, _ = finished
    tables = []
    for workers in (1, 3):
        # A relative path: Ray Train's workers stand in a folder of their own.
        args = [os.path.relpath(folder.path, ROOT), "--workers", workers, "--attacks", "fgsm,pgd"]
        done = command("robustscale.evaluate", *args, env=ray_head)
        assert done.returncode == 0, done.stdout
        tables.append(pq.read_table(folder.evaluation / "examples.parquet"))
        assert tables[-1]["index"].to_pylist() == list(range(360))
    assert tables[0].equals(tables[1])
    evaluation = folder.read("evaluation/evaluation.json")
    assert {a["attack"]["name"] for a in evaluation["attacks"].values()} == {"fgsm", "pgd"}
    assert {a["attack"]["threat"]["name"] for a in evaluation["attacks"].values()} == {"linf", "l2"}
    assert evaluation["attacks"][evaluation["reported"]]["ra"] == folder.read("result.json")["ra"]
    with Image.open(folder.evaluation / "eps_curve.png") as image:
        assert min(image.size) > 300


@pytest.mark.usefixtures("finished")
def test_a_killed_driver_loses_nothing(ray_head: dict[str, str], storage: Path, command: Command) -> None:
    """SIGKILL to the driver once a checkpoint is there; the same command goes on and ends as the uninterrupted run."""
    args = [*SMALL, "--storage", storage, "--data.root", ray_head["TEST_CACHE"]]
    driver = subprocess.Popen(
        [sys.executable, "-m", "robustscale.pretrain", *map(str, args), "--run-name", "two"],
        cwd=ROOT,
        env=ray_head,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    folder = RunFolder(storage / "two")
    deadline = time.monotonic() + 120
    while not list(folder.checkpoints.glob("step-*")) and driver.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait(10)
    assert not (folder.path / "result.json").exists(), "the run was over before it could be killed"
    done = command("robustscale.pretrain", *args, "--run-name", "two", env=ray_head)
    assert done.returncode == 0, done.stdout
    assert "resumed at step" in done.stdout
    assert folder.weights_path("last").read_bytes() == RunFolder(storage / "one").weights_path("last").read_bytes()
    steps = [record["step"] for record in read_lines(folder) if record["event"] == "step"]
    assert steps == sorted(set(steps)), "each record is there once"
    one = RunFolder(storage / "one").read("result.json")
    two = json.loads((folder.path / "result.json").read_text())
    assert (one["sa"], one["ra"], one["epoch"]) == (two["sa"], two["ra"], two["epoch"])


def test_more_workers_than_the_cluster_has(ray_head: dict[str, str], storage: Path, command: Command) -> None:
    """The session's cluster has 4 CPUs."""
    args = ["--storage", storage, "--run-name", "many", "--data.root", ray_head["TEST_CACHE"]]
    done = command("robustscale.pretrain", *SMALL, *args, "--cluster.workers", 8, "--cluster.wait", 2, env=ray_head)
    assert done.returncode == 2
    assert "waiting for the cluster: 8 workers need 8 CPUs (it has 4, 4 free)" in done.stdout
    assert done.stdout.splitlines()[-1].startswith(
        "error: cluster.workers: 8 workers need 8 CPUs (it has 4, 4 free); waited 2 s"
    )


def test_without_a_cluster_a_run_starts_one_and_shuts_down_that_one_alone(
    ray_head: dict[str, str], tmp_path: Path, command: Command
) -> None:
    env = {k: v for k, v in ray_head.items() if not k.startswith("RAY_")}
    args = ["--storage", tmp_path, "--data.root", ray_head["TEST_CACHE"], "--epochs", 1]
    done = command("robustscale.pretrain", *SMALL, *args, env=env)
    assert done.returncode == 0, done.stdout
    own = re.search(r"Ray dashboard: http://([\d.]+):(\d+) \(token: (.*)\)", done.stdout)
    assert own is not None
    assert not Path(own[3]).exists()
    assert not Path(env["HOME"], ".ray", "auth_token").exists()
    session = ray_head["RAY_API_SERVER_ADDRESS"].rpartition(":")[2]
    with socket.socket() as gone, socket.socket() as there:
        assert gone.connect_ex((own[1], int(own[2]))) != 0
        assert there.connect_ex(("127.0.0.1", int(session))) == 0


def test_where_ray_does_not_start_a_run_ends_with_a_line(
    ray_head: dict[str, str], tmp_path: Path, command: Command
) -> None:
    env = {k: v for k, v in ray_head.items() if not k.startswith("RAY_")}
    env["RAY_TMPDIR"] = str(tmp_path / ("long" * 30))  # Unix sockets lie there
    done = command("robustscale.pretrain", *SMALL, "--storage", tmp_path, "--data.root", env["TEST_CACHE"], env=env)
    assert done.returncode == 1 and "Traceback" not in done.stdout
    assert done.stdout.splitlines()[-1].startswith("error: Ray did not start on this machine (validate_socket")


@pytest.mark.slow
def test_two_clusters_of_its_own_in_one_process() -> None:
    """As `frontier --from-run RUN --beside OTHER` starts them, one after the other: each has a secret, and Ray reads
    that once in a process."""
    code = "from cluster.ray_cluster import ray_cluster; from robustscale.run import Cluster\n"
    code += "for _ in range(2):\n    with ray_cluster(Cluster(workers=1), print):\n        pass\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
