"""A node of the cluster is lost in the middle of a search."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.edges.conftest import ROOT, free_port
from tune.ledger import Ledger

SEARCH = ["digits", "--epochs", "6", "--model.base", "4", "--judge-steps", "2", "--early-stopping", "none"]
SEARCH += ["--sampler", "random", "--trials", "8", "--finalists", "1"]


@contextmanager
def second_node(env: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A node of two CPUs more, as another machine would be; killed on leaving."""
    ray = str(Path(sys.executable).parent / "ray")
    command = [ray, "start", "--address", env["RAY_ADDRESS"], "--block", "--num-cpus", "2", "--disable-usage-stats"]
    command += ["--node-ip-address", "127.0.0.1", "--dashboard-agent-listen-port", str(free_port())]
    node = subprocess.Popen(
        command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        yield node
    finally:
        if node.poll() is None:
            os.killpg(node.pid, signal.SIGKILL)
        node.wait(30)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_its_trials_are_begun_again_and_nothing_is_lost(ray_head: dict[str, str], tmp_path: Path) -> None:
    options = [*SEARCH, "--storage", str(tmp_path), "--data.root", ray_head["TEST_CACHE"], "--retries", "2"]
    ledger = tmp_path / "digits-frontier" / "ledger.jsonl"
    with second_node(ray_head) as node:
        _wait_for_cpus(ray_head, 6)
        search = subprocess.Popen(
            [sys.executable, "-m", "robustscale.frontier", *options],
            cwd=ROOT,
            env=os.environ | ray_head,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        deadline = time.monotonic() + 300
        while len([r for r in Ledger(ledger).records() if r["kind"] == "rung"]) < 8:
            assert search.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        os.killpg(node.pid, signal.SIGKILL)
        out, _ = search.communicate(timeout=500)
    assert search.returncode == 0, out
    ended = [record for record in Ledger(ledger).records() if record["kind"] == "ended"]
    assert [record["state"] for record in ended] == ["complete"] * 8
    assert len({record["trial"] for record in ended}) == 8


def _wait_for_cpus(env: dict[str, str], cpus: int) -> None:
    ask = "import ray, time; ray.init(logging_level='ERROR', log_to_driver=False)\n"
    ask += f"while ray.cluster_resources().get('CPU', 0) < {cpus}: time.sleep(0.5)"
    subprocess.run([sys.executable, "-c", ask], env=os.environ | env, timeout=120, check=True)
