"""Two drivers on one URL."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from robustscale.engine import lease as leases
from robustscale.engine.lease import lease
from robustscale.engine.remote import Remote
from robustscale.errors import InputError


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Remote:
    for name, value in {"BEAT": 0.1, "GONE": 1.5, "SETTLE": 0.1}.items():
        monkeypatch.setattr(leases, name, value)
    return Remote(f"file://{tmp_path}/run")


def left_behind(remote: Remote, **other: object) -> None:
    """By a process of this machine that was killed."""
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait()
    holder = {"host": "here", "machine": leases._machine(), "pid": ended.pid, "id": "x", "beats": 3}
    remote.write(leases.NAME, json.dumps(holder | other).encode())


def test_one_alone_holds_it_and_leaves_nothing(remote: Remote) -> None:
    with lease(remote):
        assert json.loads(remote.read(leases.NAME))["pid"] == os.getpid()
    assert remote.list() == {}


def test_second_is_refused_while_the_first_lives(remote: Remote) -> None:
    with (
        lease(remote),
        pytest.warns(UserWarning, match="was in training on"),
        pytest.raises(InputError, match=rf"in training on .* \(process {os.getpid()}\); take another --run-name"),
        lease(remote),
    ):
        raise AssertionError
    with lease(remote):  # at once
        pass


def test_killed_on_this_machine_is_taken_over_at_once(remote: Remote) -> None:
    left_behind(remote)
    begun = time.monotonic()
    with lease(remote):
        assert time.monotonic() - begun < leases.GONE


@pytest.mark.parametrize("machine", ["another machine", "another process namespace"])
def test_silent_on_another_machine_is_waited_for(remote: Remote, machine: str) -> None:
    left_behind(remote, machine=machine)
    begun = time.monotonic()
    with pytest.warns(UserWarning, match=r"was in training on here .*going on in 1.5 s"), lease(remote):
        assert time.monotonic() - begun > leases.GONE


@pytest.mark.parametrize("content", [b"", b"\xff", b"[1]", b'{"pid": "x", "host": {"a": 1}}'])
def test_strange_content_is_waited_for(remote: Remote, content: bytes) -> None:
    remote.write(leases.NAME, content)
    with pytest.warns(UserWarning, match="was in training on"), lease(remote):
        pass


def test_one_of_two_that_begin_together_goes_on(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "SETTLE", 0.5)
    ready, held, refused = threading.Barrier(2), [], []

    def begin() -> None:
        ready.wait()
        try:
            with lease(Remote(remote.url)):
                held.append(1)
                time.sleep(1.0)
        except InputError as error:
            refused.append(error)

    monkeypatch.setattr(leases, "_wait_for", lambda remote: None)  # both saw nobody
    threads = [threading.Thread(target=begin) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert (len(held), len(refused)) == (1, 1)


def test_lost_lease_is_not_taken_back(remote: Remote) -> None:
    with lease(remote):
        left_behind(remote, id="of another")
        time.sleep(5 * leases.BEAT)
        assert json.loads(remote.read(leases.NAME))["id"] == "of another"
    assert remote.found(leases.NAME) is not None
