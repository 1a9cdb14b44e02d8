"""The Slurm script: as it is read, and as it runs where there is no Slurm, on this machine alone."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "cluster" / "slurm.sh"
SMALL = ["digits", "--model.base", "4", "--evaluation.monitor.steps", "2", "--run-name", "s"]


def directives() -> dict[str, str]:
    """What sbatch reads: up to the first command."""
    text = SCRIPT.read_text()
    found = re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", text.partition("\nset -euo pipefail")[0], re.MULTILINE)
    assert len(found) == text.count("#SBATCH")
    return dict(found)


def test_bash_and_shellcheck_have_nothing_against_it() -> None:
    subprocess.run(["bash", "-n", SCRIPT], check=True, timeout=30)
    assert os.access(SCRIPT, os.X_OK)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "--severity", "warning", SCRIPT], check=True, timeout=60)


def test_a_job_is_warned_in_time_and_may_be_put_back_into_the_queue() -> None:
    given = directives()
    assert "requeue" in given and given["open-mode"] == "append" and given["ntasks-per-node"] == "1"
    # B: the script alone gets it. Not TERM, which scancel sends as well: a cancelled job must not come back.
    warned = re.fullmatch(r"B:USR1@(\d+)", given["signal"])
    assert warned and int(warned[1]) >= 120
    text = SCRIPT.read_text()
    assert "trap 'again=yes; tell' USR1" in text and "trap tell TERM INT" in text
    assert "[[ -n $again && $code == 143 && -n ${SLURM_JOB_ID:-} ]]; then scontrol requeue" in text


def test_without_a_command_it_says_how_it_is_used() -> None:
    done = subprocess.run([SCRIPT], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2 and "usage" in done.stderr


def start(tmp_path: Path, *command: object, ports: int | None = None) -> tuple[subprocess.Popen[str], Path]:
    """The script, with a home of its own, and the file of what it prints."""
    home = tmp_path / "home"
    home.mkdir(exist_ok=True)
    first = ports or 21000 + secrets.randbelow(3000) * 3
    env = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "SLURM_"))}
    env |= {"HOME": str(home), "ROBUSTSCALE_PORTS": str(first), "PATH": f"{Path(sys.executable).parent}:{env['PATH']}"}
    env |= {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "1"}
    printed = tmp_path / "printed"
    with printed.open("a") as out:
        process = subprocess.Popen(
            [SCRIPT, *map(str, command)], env=env, stdout=out, stderr=subprocess.STDOUT, text=True, cwd=tmp_path
        )
    return process, printed


def left_over(process: subprocess.Popen[str], tmp_path: Path) -> list[str]:
    """Processes, sockets and the token's file."""
    temp = f"/tmp/robustscale-{process.pid}"
    lines = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True, timeout=30).stdout
    found = [line for line in lines.splitlines() if temp in line]
    return found + [temp] * Path(temp).exists() + [str(path) for path in (tmp_path / "home").glob(".robustscale-*")]


@pytest.mark.slow
def test_it_gives_a_command_a_cluster_and_ends_with_its_code(tmp_path: Path) -> None:
    seen = "stat -c %a $RAY_AUTH_TOKEN_PATH; python -c 'import ray; ray.init(); print(len(ray.nodes()), \"node\")'"
    process, printed = start(tmp_path, "bash", "-c", f"{seen}; exit 7")
    assert process.wait(200) == 7, printed.read_text()
    lines = printed.read_text().splitlines()
    assert "600" in lines and "1 node" in lines
    assert left_over(process, tmp_path) == []


@pytest.mark.slow
def test_a_head_that_cannot_start_ends_it(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        process, printed = start(tmp_path, "true", ports=taken.getsockname()[1])
        assert process.wait(200) == 1, printed.read_text()
    assert "Ray's head did not start" in printed.read_text()
    assert "not a pid" not in printed.read_text()
    assert left_over(process, tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_run_that_is_warned_saves_and_leaves_and_the_same_command_goes_on(tmp_path: Path, number: int) -> None:
    folder = tmp_path / "runs" / "s"
    command = ["python", "-m", "robustscale.pretrain", *SMALL, "--storage", tmp_path / "runs", "--epochs", 12]
    process, printed = start(tmp_path, *command)
    deadline = time.monotonic() + 600
    while not list(folder.glob("checkpoints/*/MANIFEST.json")):
        assert process.poll() is None and time.monotonic() < deadline, printed.read_text()
        time.sleep(0.2)
    process.send_signal(number)
    assert process.wait(120) == 143, printed.read_text()
    assert not (folder / "result.json").exists()
    assert left_over(process, tmp_path) == []
    process, printed = start(tmp_path, *command)
    assert process.wait(300) == 0, printed.read_text()
    assert "resumed at step" in printed.read_text() and (folder / "result.json").exists()
    assert left_over(process, tmp_path) == []
