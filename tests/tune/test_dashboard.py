"""optuna-dashboard as a person meets it: over HTTP, and in a browser."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from robustscale.errors import InputError
from robustscale.recipes.digits import digits
from tune.dashboard import serve
from tune.ledger import Ledger
from tune.spaces import Space
from tune.study import Study

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
SPACE = Space.from_text({"objective.attack.threat.eps": "uniform(0.02, 0.3)", "optimizer.lr": "log(0.01, 1)"})


def make_study(folder: Path) -> Study:
    ledger = Ledger(folder / "ledger.jsonl")
    return Study(ledger, digits(), SPACE, name="digits-frontier", storage=str(folder / "optuna.journal"))


def run_trials(study: Study, num: int) -> None:
    for k in range(num):
        proposal = study.ask()
        assert proposal is not None
        study.tell(
            {"trial": proposal.id, "state": "complete", "sa": 0.875 - k / 64, "ra": 0.125 + k / 32, "flops": 1e9}
        )


@pytest.fixture
def study(tmp_path: Path) -> Study:
    study = make_study(tmp_path)
    run_trials(study, 3)
    stopped = study.ask()
    assert stopped is not None
    study.tell(
        {"trial": stopped.id, "state": "stopped", "reason": "stopped early, after epoch 2", "sa": 0.7, "ra": 0.3}
    )
    study.ask()  # and one that runs
    return study


@pytest.fixture
def server(study: Study) -> Iterator[subprocess.Popen[str]]:
    code = "import sys; from tune.dashboard import serve; serve(sys.argv[1], 0)"
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", code, str(study.ledger.path.parent / "optuna.journal")],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A shell has those in its background ignore it, and children inherit that.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    yield process
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def url_of(server: subprocess.Popen[str]) -> str:
    assert server.stdout is not None
    line = server.stdout.readline()
    found = re.search(r"http://127\.0\.0\.1:\d+", line)
    assert found, line + server.stdout.read()
    return found[0]


LOOPBACK = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Past any proxy: the module's own opener keeps those that it first met."""


def get(url: str, **headers: str) -> Any:
    with LOOPBACK.open(urllib.request.Request(url, headers=headers), timeout=30) as answer:
        return json.load(answer)


def refused(request: urllib.request.Request) -> int:
    with pytest.raises(urllib.error.HTTPError) as caught:
        LOOPBACK.open(request, timeout=30)
    caught.value.close()
    return caught.value.code


def test_the_dashboard_over_http(server: subprocess.Popen[str], study: Study) -> None:
    url = url_of(server)
    (summary,) = get(f"{url}/api/studies")["study_summaries"]
    assert summary["study_name"] == "digits-frontier"
    assert summary["directions"] == ["maximize", "maximize"]
    there = f"{url}/api/studies/{summary['study_id']}"
    detail = get(f"{there}?after=0")
    assert detail["objective_names" if "objective_names" in detail else "metric_names"] == ["sa", "ra"]
    assert [t["state"] for t in detail["trials"]] == ["Complete"] * 3 + ["Pruned", "Running"]
    assert [t["values"] for t in detail["trials"][:3]] == [[0.875, 0.125], [0.859375, 0.15625], [0.84375, 0.1875]]
    # While the search goes on.
    run_trials(study, 1)
    states = [t["state"] for t in get(f"{there}?after=5")["trials"]]
    assert states in ([], ["Complete"])  # it looks again every two seconds at most

    # Nobody else, and nothing but looking.
    name, port = url.removeprefix("http://").split(":")
    assert listening(int(port)) == {"127.0.0.1"} == {name}
    assert refused(urllib.request.Request(f"{there}", method="DELETE")) == 403
    assert refused(urllib.request.Request(f"{url}/api/studies", headers={"Host": f"evil.example:{port}"})) == 403
    assert get(f"{url}/api/studies", Host="localhost:9999")["study_summaries"] == [summary]  # a forwarded port
    assert len(get(f"{url}/api/studies")["study_summaries"]) == 1

    assert server.stdout is not None
    server.send_signal(signal.SIGINT)
    assert server.wait(20) == 0
    assert server.stdout.read() == "optuna-dashboard: ended\n"


def listening(port: int) -> set[str]:
    """The addresses on which somebody on this machine listens at a port."""
    found = set()
    for table in "/proc/net/tcp", "/proc/net/tcp6":
        for line in Path(table).read_text().splitlines()[1:]:
            local, state = line.split()[1], line.split()[3]
            address, _, hexadecimal = local.partition(":")
            if state == "0A" and int(hexadecimal, 16) == port:
                four = len(address) == 8
                found.add(socket.inet_ntoa(bytes.fromhex(address)[::-1]) if four else address)
    return found


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, which is not on the PATH")
def test_the_dashboard_in_a_browser(server: subprocess.Popen[str], tmp_path: Path) -> None:
    url = url_of(server)
    assert "digits-frontier" in rendered(f"{url}/dashboard", tmp_path)
    page = rendered(f"{url}/dashboard/studies/{study_id(url)}/trials?numbers=1", tmp_path)
    for shown in "digits-frontier", "0.859375, 0.15625", "Best Trial", "Pruned", "Running":
        assert shown in page


def study_id(url: str) -> int:
    return int(get(f"{url}/api/studies")["study_summaries"][0]["study_id"])


def rendered(url: str, tmp_path: Path) -> str:
    """What a browser makes of a page, its scripts run."""
    command = [str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/browser"]
    command += ["--virtual-time-budget=30000", "--dump-dom", url]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


def test_a_port_that_is_taken(study: Study) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=rf"port: {port} on 127\.0\.0\.1 cannot be had \(Address already in use\)"):
            serve(str(study.ledger.path.parent / "optuna.journal"), port)
    with pytest.raises(InputError, match="port: 99999"):
        serve(str(study.ledger.path.parent / "optuna.journal"), 99999)


def test_a_storage_that_is_not_there(tmp_path: Path) -> None:
    for storage in str(tmp_path / "optuna.journal"), f"sqlite:///{tmp_path}/db":
        with pytest.raises(InputError, match="is not there"):
            serve(storage, 0)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "empty").touch()
    with pytest.raises(InputError, match="holds no study yet"):
        serve(str(tmp_path / "empty"), 0)
