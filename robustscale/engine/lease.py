"""Who trains a run that is kept under a URL, so that a second machine does not begin as well.

Object stores have no locks, and clocks differ: an object is rewritten while its holder lives, and whoever finds one
that is not rewritten for GONE seconds takes it. Two that begin within SETTLE of each other may both be told that the
other has it, never both that they have; but one whose network stalls for longer between writing and reading is not
noticed here: it ends at its next checkpoint (`Mirror._require_writer`).
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from robustscale.engine.remote import Remote, Unreachable
from robustscale.errors import InputError

NAME = ".lease.json"
BEAT = 10.0
"""Seconds between two writings."""
GONE = 60.0
"""Seconds after which one that is not rewritten has been left behind."""
SETTLE = 1.0
"""Seconds after which a second one that began at the same time is seen."""


@contextlib.contextmanager
def lease(remote: Remote) -> Iterator[None]:
    """Held within. Raises InputError if another holds it, or where nothing can be read or written."""
    ours = {"host": socket.gethostname(), "machine": _machine(), "pid": os.getpid(), "id": secrets.token_hex(8)}
    try:
        _wait_for(remote)
        _write(remote, ours, 0)
        time.sleep(SETTLE)
        holder = _read(remote)
    except Unreachable as error:
        raise InputError(str(error)) from None
    if holder is None or holder.get("id") != ours["id"]:
        raise _taken(remote, holder or {})
    ended = threading.Event()
    thread = threading.Thread(target=_keep, args=(remote, ours, ended), name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with contextlib.suppress(Unreachable):  # whoever comes next waits for GONE
            if (_read(remote) or {}).get("id") == ours["id"]:
                remote.remove(NAME)


def _wait_for(remote: Remote) -> None:
    """Until nobody else holds it; raises InputError if somebody does."""
    first = _read(remote)
    if first is None or _dead(first):
        return
    host, pid = str(first.get("host"))[:64], first.get("pid")
    warnings.warn(
        f"{remote.url}: was in training on {host} (process {pid}); without a sign of it, going on in {GONE:g} s",
        stacklevel=2,
    )
    until = time.monotonic() + GONE
    while time.monotonic() < until:
        time.sleep(min(2.0, GONE / 10))
        now = _read(remote)
        if now is None:
            return
        if now != first:
            raise _taken(remote, now)


def _taken(remote: Remote, holder: dict[str, Any]) -> InputError:
    where = f"on {str(holder.get('host', 'another machine'))[:64]} (process {holder.get('pid')})"
    return InputError(f"{remote.url}: in training {where}; take another --run-name, or end that one first")


def _keep(remote: Remote, ours: dict[str, Any], ended: threading.Event) -> None:
    beats = 0
    while not ended.wait(BEAT):
        beats += 1
        with contextlib.suppress(Unreachable):  # if it lasts, another may take it, and our checkpoints are refused
            if (_read(remote) or ours).get("id") != ours["id"]:
                return
            _write(remote, ours, beats)


def _read(remote: Remote) -> dict[str, Any] | None:
    try:
        holder = json.loads(remote.read(NAME))
    except FileNotFoundError:
        return None
    except ValueError:  # of somebody who does not care for the rest, either
        return {}
    return holder if isinstance(holder, dict) else {}


def _write(remote: Remote, ours: dict[str, Any], beats: int) -> None:
    remote.write(NAME, json.dumps({**ours, "beats": beats}).encode())


def _machine() -> str:
    """Within which process ids are one's own: containers of one machine have their own."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"  # noqa: PTH115 (no path)


def _dead(holder: dict[str, Any]) -> bool:
    pid = holder.get("pid")
    return holder.get("machine") == _machine() and isinstance(pid, int) and not Path(f"/proc/{pid}").exists()
