"""A cluster of several nodes on this machine, each of which can be lost, and the drivers that use it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from robustscale.engine.callbacks.log import read_lines
from robustscale.engine.folder import RunFolder
from tests.edges.conftest import ROOT, free_port, started

RAY = str(Path(sys.executable).parent / "ray")
SMALL = ["digits", "--model.base", "4", "--evaluation.attack.steps", "2"]
SMALL += ["--checkpoints.every-steps", "20", "--log-every", "1", "--data.loader", "resident", "--data.held-out", "0"]


def kill_group(process: subprocess.Popen[Any], number: int = signal.SIGKILL, wait: float = 40) -> None:
    if process.poll() is None:
        os.killpg(process.pid, number)
    process.wait(wait)


class Machines:
    """A head without CPUs of its own, and nodes beside it. `env` is that of somebody who uses the cluster."""

    def __init__(self, folder: Path, env: Mapping[str, str], more: Sequence[str], port: int | None) -> None:
        self.folder, self.nodes = folder, list[subprocess.Popen[bytes]]()
        # Unix sockets lie in the temp dir, and their paths may have 107 characters at most.
        self.temp = Path(f"/tmp/rs-{os.getpid()}-{secrets.token_hex(2)}")
        self.gcs = port or free_port()
        self.env = os.environ | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "TEST_CACHE": str(folder / "cache"),
            "RAY_ADDRESS": f"127.0.0.1:{self.gcs}",
            **env,
        }
        self.start_head(*more)

    def start_head(self, *more: str) -> subprocess.Popen[bytes]:
        command = ["--head", "--port", str(self.gcs), "--temp-dir", str(self.temp), "--include-dashboard", "false"]
        self.head = self._start(0, [*command, "--ray-client-server-port", str(free_port()), *more])
        return self.head

    def add_node(self, cpus: int) -> subprocess.Popen[bytes]:
        self.nodes.append(self._start(cpus, ["--address", self.env["RAY_ADDRESS"]]))
        return self.nodes[-1]

    def _start(self, cpus: int, more: list[str]) -> subprocess.Popen[bytes]:
        """Returns when it runs: of two that start at once on one machine, one fails."""
        command = [RAY, "start", "--block", "--num-cpus", str(cpus), "--disable-usage-stats", *more]
        command += ["--node-ip-address", "127.0.0.1", "--dashboard-agent-listen-port", str(free_port())]
        env = {name: value for name, value in self.env.items() if name != "RAY_ADDRESS"}
        path = self.folder / f"node-{secrets.token_hex(2)}.log"

        def require_up(node: subprocess.Popen[bytes]) -> None:
            until(lambda: "Ray runtime started" in path.read_text() or node.poll() is not None, 90)
            assert node.poll() is None, path.read_text()

        return started(command, env, path, require_up)

    def close(self) -> None:
        for process in [*self.nodes, self.head]:
            kill_group(process)


@contextmanager
def machines(
    folder: Path,
    *cpus: int,
    env: Mapping[str, str] = MappingProxyType({}),
    more: Sequence[str] = (),
    port: int | None = None,
) -> Iterator[Machines]:
    """A head, started with `more` options, and nodes of so many CPUs."""
    cluster = Machines(folder, env, more, port)
    try:
        for number in cpus:
            cluster.add_node(number)
        yield cluster
    finally:
        cluster.close()


class Driver:
    """`python -m robustscale.pretrain` in the background, its lines with the time at which each was printed."""

    def __init__(self, env: dict[str, str], *args: object) -> None:
        args = (*args, "--data.root", env["TEST_CACHE"])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "robustscale.pretrain", *map(str, args)],
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            # A shell's background ignores it.
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )
        self.lines: list[tuple[float, str]] = []
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as stdout:
            for line in stdout:
                self.lines.append((time.monotonic(), line))

    @property
    def output(self) -> str:
        return "".join(line for _, line in self.lines)

    def wait_for(self, pattern: str, timeout: float = 300, after: float = 0.0) -> tuple[float, re.Match[str]]:
        """The first line after that time in which it is found, and when it came."""
        deadline = time.monotonic() + timeout
        while True:
            ended = self.process.poll() is not None
            for at, line in list(self.lines):
                if at > after and (match := re.search(pattern, line)):
                    return at, match
            assert not ended and time.monotonic() < deadline, f"no {pattern!r} in:\n{self.output}"
            time.sleep(0.05)

    def wait(self, timeout: float = 900) -> int:
        code = self.process.wait(timeout)
        self.reader.join(10)
        return code


@contextmanager
def driver(env: dict[str, str], *args: object) -> Iterator[Driver]:
    one = Driver(env, *args)
    try:
        yield one
    finally:
        kill_group(one.process)
        one.reader.join(10)


def until(true: Callable[[], bool], timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def steps(folder: RunFolder) -> list[int]:
    """Those that the log has, in its order."""
    return [record["step"] for record in read_lines(folder) if record["event"] == "step"]


def wait_for_step(folder: RunFolder, step: int, run: Driver, timeout: float = 400) -> None:
    deadline = time.monotonic() + timeout
    while max(steps(folder), default=0) < step:
        assert run.process.poll() is None and time.monotonic() < deadline, run.output
        time.sleep(0.1)


def newest(folder: RunFolder) -> int:
    """The step of the newest checkpoint."""
    return max((int(path.parent.name[5:]) for path in folder.checkpoints.glob("step-*/MANIFEST.json")), default=0)


def processes(env: dict[str, str], title: str) -> list[int]:
    """Of that cluster, those whose title begins so."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            ours = env["RAY_AUTH_TOKEN"].encode() in (path / "environ").read_bytes()
            if ours and (path / "cmdline").read_bytes().startswith(title.encode()):
                found.append(int(path.name))
    return found


def workers(env: dict[str, str]) -> list[int]:
    return processes(env, "ray::RayTrainWorker")


def undisturbed(run: RunFolder, folder: Path, timeout: float = 900) -> RunFolder:
    """The same run in one process, from its beginning to its end."""
    twin = RunFolder(folder / "undisturbed")
    twin.write("run.json", run.read("run.json"))
    twin.write("data.json", run.read("data.json"))
    config = {"task": "pretrain", "run": twin.read("run.json"), "folder": str(twin.path), "options": {}}
    code = "import json, sys; from cluster.worker import alone; alone(json.load(sys.stdin), lambda record: None)"
    subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(config | {"threads": 1, "gpu": False}),
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=timeout,
        check=True,
    )
    return twin


def assert_as_undisturbed(run: RunFolder, folder: Path, timeout: float = 900) -> None:
    """Bitwise equal weights, and each step logged once."""
    assert steps(run) == list(range(1, max(steps(run)) + 1))
    twin = undisturbed(run, folder, timeout)
    assert run.weights_path("last").read_bytes() == twin.weights_path("last").read_bytes()
