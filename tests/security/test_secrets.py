"""Secrets of the environment, and of what is given on the command line, are nowhere in what a run leaves or says."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from robustscale.errors import InputError
from tests.edges.conftest import SMALL
from tests.security.test_hostile_configs import command

ROOT = Path(__file__).parents[2]
NAMES = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "RAY_AUTH_TOKEN", "HF_TOKEN", "WANDB_API_KEY", "PGPASSWORD")


def canary() -> str:
    """Looks like no hash of ours, and survives being quoted."""
    return f"Zx{secrets.token_hex(20)}qW"


def hits(secret: dict[str, str], folder: Path) -> list[str]:
    """Files below that hold one of them, and which."""
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            content = path.read_bytes()
            found += [
                f"{path.relative_to(folder)}: {name}" for name, value in secret.items() if value.encode() in content
            ]
    return found


@pytest.mark.parametrize(
    "url",
    [
        "s3://key:SECRET@127.0.0.1:1/bucket",
        "s3://SECRET@bucket/runs",
        "gs://u:SECRET@bucket/runs",
        "s3://bucket/runs?secret_key=SECRET&endpoint_override=127.0.0.1:1",
        "s3://bucket/runs?token=SECRET",
        "abfs://container@account/runs?sig=SECRET",
        "ftp://user:SECRET@127.0.0.1/runs",
    ],
)
def test_a_storage_url_with_a_secret_is_refused_unquoted(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    secret = canary()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(InputError) as error:
        command("pretrain", "digits", "--storage", url.replace("SECRET", secret))()
    assert secret not in str(error.value)
    assert secret not in "".join(capfd.readouterr())
    assert hits({"url": secret}, tmp_path) == []


@pytest.mark.parametrize("url", ["postgresql://u:SECRET@127.0.0.1:1/db", "mysql://u:SECRET@127.0.0.1:1/db?x=1"])
def test_the_password_of_an_optuna_storage_is_not_quoted(url: str) -> None:
    from tune.storage import existing_storage, open_storage, readable

    secret = canary()
    given = url.replace("SECRET", secret)
    assert secret not in readable(given)
    for call in (lambda: open_storage(given, Path("/nowhere")), lambda: existing_storage(given)):
        with pytest.raises(InputError) as error:
            call()
        assert secret not in str(error.value)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """For Ray's session; the names of its sockets may have 107 characters."""
    path = Path(f"/tmp/rs-secrets-{os.getpid()}")
    path.mkdir()
    yield path
    shutil.rmtree(path, ignore_errors=True)


def _worker(secret: str) -> int | None:
    """A training worker that has this in its environment."""
    for entry in Path("/proc").iterdir():
        try:
            ours = entry.name.isdecimal() and b"RayTrainWorker" in (entry / "cmdline").read_bytes()
            if ours and secret.encode() in (entry / "environ").read_bytes():
                return int(entry.name)
        except OSError:
            continue  # it has ended, or is somebody else's
    return None


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_secret_is_in_what_a_run_leaves(place: Path, tmp_path: Path) -> None:
    """Whole runs under real Ray: one whose worker is killed, and one that diverges, with a traceback on the workers."""
    secret = {name: canary() for name in NAMES}
    home = tmp_path / "home"
    home.mkdir()
    storage = tmp_path / "runs"
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_") and k not in secret}
    env = kept | secret | {"HOME": str(home), "RAY_TMPDIR": str(place), "PYTHONUNBUFFERED": "1"}
    said = tmp_path / "said.txt"

    def start(*args: str) -> subprocess.Popen[bytes]:
        full = [sys.executable, "-m", "robustscale.pretrain", *SMALL, "--storage", str(storage), *args]
        with said.open("ab") as out:
            return subprocess.Popen(full, cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT)

    run = start("--run-name", "killed", "--epochs", "3")
    deadline = time.monotonic() + 300
    killed = False
    while run.poll() is None and time.monotonic() < deadline:
        if not killed and list((storage / "killed" / "checkpoints").glob("step-*")):
            worker = _worker(secret["HF_TOKEN"])
            if worker is not None:
                os.kill(worker, signal.SIGKILL)
                killed = True
        time.sleep(0.1)
    assert run.poll() == 0, said.read_text()[-3000:]
    assert killed

    diverged = start("--run-name", "diverged", "--optimizer.lr", "1e30", "--divergence.skip", "0")
    assert diverged.wait(300) == 1, said.read_text()[-3000:]

    assert (storage / "killed" / "result.json").exists()
    assert list(place.rglob("*.out")), "no logs of Ray were looked at"
    assert hits(secret, tmp_path) == []
    assert hits(secret, place) == []
    text = said.read_bytes()
    assert [name for name, value in secret.items() if value.encode() in text] == []
