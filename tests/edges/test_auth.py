"""Who may do what to a cluster that was started as docs/operations.md says, and what of it listens where."""

from __future__ import annotations

import http.client
import json
import os
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from cluster.ray_cluster import _token as own_token
from cluster.ray_cluster import require_token
from robustscale.errors import InputError
from tests.edges.conftest import ROOT

JOB = json.dumps({"entrypoint": "true"}).encode()
ENDPOINTS: list[tuple[str, str, bytes | None]] = [
    ("POST", "/api/jobs/", JOB),
    ("POST", "/api/jobs/x/stop", None),
    ("DELETE", "/api/jobs/x", None),
    ("PUT", "/api/packages/gcs/x.zip", b"PK"),
    ("PUT", "/api/serve/applications/", b"{}"),
    ("GET", "/api/jobs/", None),
    ("GET", "/api/jobs/x/logs", None),
    ("GET", "/api/v0/actors", None),
    ("GET", "/nodes?view=summary", None),
    ("GET", "/api/v0/logs/file?node_id=x&filename=gcs_server.out", None),
    ("GET", "/worker/traceback?pid=1&node_id=x", None),
    ("GET", "/api/cluster_status", None),
]
"""Of the dashboard; the first five change something."""
OPEN = ["/", "/api/gcs_healthz", "/api/authentication_mode"]
"""A page without data, whether the cluster lives, and that it wants a token."""
AGENT = [("POST", "/api/job_agent/jobs/", JOB), ("GET", "/logs", None)]
"""Of the dashboard's agent, which each node runs, and which also listens on the node's own address."""
RUNTIME_ENV = [("POST", "/get_or_create_runtime_env", b""), ("POST", "/delete_runtime_env_if_possible", b"")]


def status(method: str, url: str, body: bytes | None, token: str | None) -> int:
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    request = urllib.request.Request(url, body, headers, method=method)
    # Straight to it, whatever proxy the machine has.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=20) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def jobs(ray_head: dict[str, str]) -> int:
    url = ray_head["RAY_API_SERVER_ADDRESS"] + "/api/jobs/"
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {ray_head['RAY_AUTH_TOKEN']}"})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=20) as answer:
        return len(json.loads(answer.read()))


@pytest.mark.parametrize("method, path, body", ENDPOINTS)
def test_the_dashboard_answers_nobody_without_the_token(
    method: str, path: str, body: bytes | None, ray_head: dict[str, str]
) -> None:
    url, before = ray_head["RAY_API_SERVER_ADDRESS"] + path, jobs(ray_head)
    assert status(method, url, body, None) == 401
    assert status(method, url, body, "f" * 64) == 403
    assert jobs(ray_head) == before
    assert status(method, url, body, ray_head["RAY_AUTH_TOKEN"]) not in (401, 403) or "traceback" in path


@pytest.mark.parametrize("path", OPEN)
def test_what_is_open_says_nothing(path: str, ray_head: dict[str, str]) -> None:
    """Known, and no more than this: `/` is the page's frame, its data come from the endpoints above."""
    assert status("GET", ray_head["RAY_API_SERVER_ADDRESS"] + path, None, None) == 200
    assert status("POST", ray_head["RAY_API_SERVER_ADDRESS"] + path, b"{}", None) in (401, 403, 404, 405)


def processes(ray_head: dict[str, str]) -> dict[int, str]:
    """Of the head, by number: what started them. They have its token in their environment."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and ray_head["RAY_AUTH_TOKEN"].encode() in (entry / "environ").read_bytes():
                found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue  # it has ended, or is somebody else's
    return found


def listeners(pids: list[int]) -> dict[int, set[str]]:
    """Ports that these processes listen at, and on which addresses, in hexadecimal as /proc writes them."""
    inodes: dict[str, tuple[int, str]] = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            address, port = fields[1].split(":")
            if fields[3] == "0A":
                inodes[fields[9]] = (int(port, 16), address)
    found: dict[int, set[str]] = {}
    for pid in pids:
        try:
            links = [os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir()]  # noqa: PTH115 (sockets are no paths)
        except OSError:
            continue
        for link in links:
            if link.startswith("socket:["):
                port, address = inodes.get(link[8:-1], (0, ""))
                if port:
                    found.setdefault(port, set()).add(address)
    return found


LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


def test_the_dashboard_listens_on_loopback_alone(ray_head: dict[str, str]) -> None:
    port = int(ray_head["RAY_API_SERVER_ADDRESS"].rpartition(":")[2])
    heard = listeners(list(processes(ray_head)))
    assert heard[port] <= LOOPBACK


def test_what_else_listens_asks_for_the_token_or_tells_figures_alone(ray_head: dict[str, str]) -> None:
    """Ray opens its other ports on every address, whatever --node-ip-address says: docs/operations.md says so. Those
    that speak HTTP refuse a stranger, or show Prometheus figures and take nothing."""
    dashboard = int(ray_head["RAY_API_SERVER_ADDRESS"].rpartition(":")[2])
    speaking: list[int] = []
    deadline = time.monotonic() + 60  # agents come up after the dashboard
    while not speaking and time.monotonic() < deadline:
        time.sleep(0.5)
        ports = set(listeners(list(processes(ray_head)))) - {dashboard}
        for port in sorted(ports):
            for method, path, body in [*AGENT, *RUNTIME_ENV]:
                try:
                    answer = status(method, f"http://127.0.0.1:{port}{path}", body, None)
                except (OSError, ValueError, http.client.HTTPException):
                    continue  # gRPC, or another address than loopback
                speaking.append(answer)
                assert answer in (401, 403, 404, 405) or (answer == 200 and method == "GET"), (port, path, answer)
    assert len(ports) >= 5
    assert speaking


JOIN = """
import ray, sys
try:
    ray.init(sys.argv[1], log_to_driver=False)
except ConnectionError:
    sys.exit(7)
print("joined")
"""


@pytest.mark.slow
@pytest.mark.parametrize("token", [None, "f" * 64])
def test_nobody_joins_without_the_token(token: str | None, ray_head: dict[str, str], tmp_path: Path) -> None:
    mode = {"RAY_AUTH_MODE": "disabled"} if token is None else {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | mode | {"HOME": str(tmp_path)}
    command = [sys.executable, "-c", JOIN, ray_head["RAY_ADDRESS"]]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 7, done.stderr[-2000:]
    assert "joined" not in done.stdout


OWN = """
import os, sys, time
from pathlib import Path
from cluster.ray_cluster import ray_cluster
from robustscale.run import Cluster
with ray_cluster(Cluster(workers=1), lambda record: None):
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    print(oct(token.stat().st_mode & 0o777), oct(token.parent.stat().st_mode & 0o777), token, flush=True)
    home = Path.home()
    print("home", sorted(str(p.relative_to(home)) for p in home.rglob("*auth*")), flush=True)
print("left", token.exists())
"""


def test_the_token_of_a_cluster_of_ours_is_private(monkeypatch: pytest.MonkeyPatch) -> None:
    umask = os.umask(0)
    try:
        with own_token() as token:
            assert stat.S_IMODE(token.stat().st_mode) == 0o600
            assert stat.S_IMODE(token.parent.stat().st_mode) == 0o700
            assert len(token.read_text()) == 64
            assert os.environ["RAY_AUTH_TOKEN_PATH"] == str(token)
    finally:
        os.umask(umask)
    assert not token.exists()


@pytest.mark.slow
def test_our_own_cluster_has_a_token_that_nobody_else_can_read(tmp_path: Path) -> None:
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"HOME": str(tmp_path)}
    command = [sys.executable, "-c", OWN]
    done = subprocess.run(
        command, env=env | {"PYTHONPATH": str(ROOT)}, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False
    )
    lines = done.stdout.splitlines()
    assert lines[0].split()[:2] == ["0o600", "0o700"], done.stderr[-2000:]
    assert lines[1] == "home []"
    assert lines[2] == "left False"


@pytest.mark.parametrize("address", ["10.0.0.7:6379", "192.0.2.2:6379", "head.example:6379", "[2001:db8::1]:6379"])
def test_an_open_cluster_elsewhere_is_refused(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    with pytest.raises(InputError, match="RAY_AUTH_MODE: is not set"):
        require_token(address)
    for said in ("token", "disabled"):
        monkeypatch.setenv("RAY_AUTH_MODE", said)
        require_token(address)


@pytest.mark.parametrize("address", ["127.0.0.1:6379", "127.0.0.2:1", "[::1]:6379", "localhost:6379"])
def test_one_on_loopback_is_not(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    require_token(address)
