"""One real Ray cluster for the session, and commands run as a person runs them."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
SMALL = ["digits", "--epochs", "2", "--model.base", "4", "--evaluation.monitor.steps", "2"]
SMALL += ["--checkpoints.every-steps", "3"]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.fixture(scope="session")
def ray_head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of somebody who uses the cluster; it has 4 logical CPUs and its own token and folder."""
    # Unix sockets lie in the temp dir, and their paths may have 107 characters at most.
    temp = Path(f"/tmp/rs-{os.getpid()}")
    gcs, dashboard = free_port(), free_port()
    # One node only: the caches of a session stay apart from a person's own.
    cache = tmp_path_factory.mktemp("cache")
    env = os.environ | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "1",
        "RAY_JOB_STOP_WAIT_TIME_S": "30",
        "RAY_metrics_report_interval_ms": "1000",  # 10 s by default
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "TEST_CACHE": str(cache),
        "RAY_TEMP": str(temp),
    }
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--num-cpus", "4"]
    command += ["--node-ip-address", "127.0.0.1", "--port", str(gcs), "--temp-dir", str(temp), "--disable-usage-stats"]
    command += ["--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard)]
    command += ["--dashboard-agent-listen-port", str(free_port()), "--ray-client-server-port", str(free_port())]
    log = tmp_path_factory.mktemp("ray") / "head.log"
    head = started(command, env, log, lambda head: _wait_for(dashboard, head, log))
    try:
        yield env | {"RAY_ADDRESS": f"127.0.0.1:{gcs}", "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}"}
    finally:
        os.killpg(head.pid, signal.SIGTERM)
        try:
            head.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)
            head.wait(30)


def started(
    command: Sequence[str], env: Mapping[str, str], log: Path, require_up: Callable[[subprocess.Popen[bytes]], None]
) -> subprocess.Popen[bytes]:
    """At the second try, too: the first start after Ray was installed reads all of it from the disk, and Ray's own 30
    and 60 s may not do."""
    for last in (False, True):
        with log.open("w") as file:
            process = subprocess.Popen(command, env=env, stdout=file, stderr=file, start_new_session=True)
        try:
            require_up(process)
            break
        except AssertionError:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(30)
            if last:
                raise
    return process


def _wait_for(port: int, head: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        assert head.poll() is None, log.read_text()
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.3)
    raise AssertionError(f"Ray did not start:\n{log.read_text()}")


Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def command() -> Command:
    """Runs `python -m MODULE ARGS` in the checkout; stdout and stderr come together, as in a terminal."""

    def run(module: str, *args: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", module, *map(str, args)],
            cwd=ROOT,
            env=os.environ | (env or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=280,
            check=False,
        )

    return run
