"""What Prometheus is given while a run trains, at the endpoint that Ray has on every node."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.gauges import OF_RUN, OF_WORKER
from tests.cluster.dashboard import expressions, names_in
from tests.edges.conftest import ROOT, SMALL, free_port

NO_GPU = {"gpu_memory_peak_bytes"}
Figures = dict[str, dict[str, float]]
"""By rank, then by name."""


def targets(head: dict[str, str]) -> list[str]:
    """Every node's address, as Ray itself gives it to Prometheus."""
    listed = json.loads((Path(head["RAY_TEMP"]) / "prom_metrics_service_discovery.json").read_text())
    return [target for group in listed for target in group["targets"]]


def scraped(head: dict[str, str], run: str) -> Figures:
    """As Prometheus does: without a token."""
    figures: Figures = {}
    for target in targets(head):
        with urllib.request.urlopen(f"http://{target}/metrics", timeout=30) as answer:
            text = answer.read().decode()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name.startswith("ray_robustscale_") and sample.labels["run"] == run:
                    named = figures.setdefault(sample.labels["rank"], {})
                    named[sample.name.removeprefix("ray_robustscale_")] = sample.value
    return figures


def wait_for(what: Callable[[], Any], seconds: float) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(1)
    return found


@pytest.fixture(scope="module")
def training(ray_head: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[bytes]]:
    """A run that lasts until it is told to leave."""
    storage = tmp_path_factory.mktemp("metrics")
    args = [*SMALL, "--run-name", "watched", "--storage", storage, "--data.root", ray_head["TEST_CACHE"]]
    args += ["--epochs", "1000", "--log-every", "2"]
    command = [sys.executable, "-m", "robustscale.pretrain", *map(str, args)]
    with (storage / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=ray_head, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        process.kill()
        process.wait(30)


@pytest.fixture(scope="module")
def figures(ray_head: dict[str, str], training: subprocess.Popen[bytes]) -> Figures:
    """Of a moment at which everything is there."""

    def complete() -> Figures | None:
        assert training.poll() is None
        found = scraped(ray_head, "watched")
        return found if len(found) == 2 and "held_out_ra" in found.get("0", {}) else None

    return wait_for(complete, 200)


def test_every_worker_gives_its_figures_and_rank_0_the_runs(figures: Figures) -> None:
    assert set(figures["0"]) == set(OF_WORKER) - NO_GPU | set(OF_RUN)
    assert set(figures["1"]) == set(OF_WORKER) - NO_GPU


def test_the_figures_are_those_of_the_run(figures: Figures) -> None:
    run = figures["0"]
    for worker in figures.values():
        assert 0 < worker["attack_seconds"] < worker["step_seconds"]
        assert 0 <= worker["data_wait_ratio"] <= 1
        assert worker["images_per_second"] > 0
    # Two workers' halves of batches of 128, in the time that a step takes.
    assert run["images_per_second"] * run["step_seconds"] == pytest.approx(64, rel=0.15)
    assert run["workers"] == 2 and run["restarts"] == 0 and run["skipped_steps"] == 0
    assert run["total_steps"] == 1000 * 11
    assert run["epoch"] == pytest.approx(run["step"] / 11) and run["step"] >= 11
    assert 0 <= run["held_out_ra"] <= run["held_out_sa"] <= 1
    assert 0 < run["loss"] < 10 and run["grad_norm"] > 0 and run["learning_rate"] > 0
    # A checkpoint every third step.
    assert 0 <= run["checkpoint_age_seconds"] < 60


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="there is no Prometheus here")
def test_prometheus_evaluates_the_dashboard(figures: Figures, ray_head: dict[str, str], tmp_path: Path) -> None:
    """Every panel that a machine without a GPU can fill."""
    port = free_port()
    discovered = Path(ray_head["RAY_TEMP"]) / "prom_metrics_service_discovery.json"
    jobs = [{"job_name": "ray", "file_sd_configs": [{"files": [str(discovered)]}]}]
    config = tmp_path / "prometheus.yml"
    config.write_text(json.dumps({"global": {"scrape_interval": "1s"}, "scrape_configs": jobs}))
    options = [f"--config.file={config}", f"--storage.tsdb.path={tmp_path / 'data'}"]
    options += [f"--web.listen-address=127.0.0.1:{port}"]
    with (tmp_path / "log").open("wb") as log:
        prometheus = subprocess.Popen(["prometheus", *options], stdout=log, stderr=subprocess.STDOUT)

    def values(expression: str) -> list[float] | None:
        query = urllib.parse.urlencode({"query": expression.replace("$run", "watched").replace("$session", ".*")})
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/query?{query}", timeout=10) as answer:
                return [float(series["value"][1]) for series in json.load(answer)["data"]["result"]]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{expression}: {error.read().decode()}") from None
        except urllib.error.URLError:  # it is not up yet
            return None

    try:
        for expression in expressions():
            if "gpu" in expression or "gram" in expression:
                assert wait_for(lambda e=expression: values(e) is not None, 60)  # understood
            else:
                assert wait_for(lambda e=expression: values(e), 60)
    finally:
        prometheus.send_signal(signal.SIGTERM)
        prometheus.wait(30)


def test_ray_gives_what_the_dashboard_takes_of_its_own(figures: Figures, ray_head: dict[str, str]) -> None:
    names = {name for e in expressions() for name in names_in(e) if not name.startswith("ray_robustscale_")}
    wanted = {name for name in names if "gpu" not in name and "gram" not in name}
    there: set[str] = set()
    # The agent measures the machine from time to time, and its first figures may not be there yet.
    until = time.monotonic() + 40
    while not wanted <= there and time.monotonic() < until:
        there |= {
            line.partition("{")[0]
            for target in targets(ray_head)
            for line in urllib.request.urlopen(f"http://{target}/metrics", timeout=30).read().decode().splitlines()
        }
        time.sleep(1)
    assert wanted <= there


def test_figures_go_when_the_workers_go(
    figures: Figures, training: subprocess.Popen[bytes], ray_head: dict[str, str]
) -> None:
    training.send_signal(signal.SIGTERM)
    assert training.wait(120) == 143
    wait_for(lambda: not scraped(ray_head, "watched"), 60)
