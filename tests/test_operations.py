"""docs/operations.md: its commands run as they are written, all in one shell, but for those that say why they can't."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cluster.gauges import OF_RUN, OF_WORKER

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "docs" / "operations.md").read_text()
BLOCK = re.compile(r"(?:<!-- not run: (?P<reason>.+?) -->\n)?```sh\n(?P<commands>.*?)```", re.DOTALL)


def blocks(run: bool) -> list[str]:
    return [match["commands"] for match in BLOCK.finditer(GUIDE) if (match["reason"] is None) == run]


def free_ports(count: int) -> list[int]:
    with socket.socket() as first, socket.socket() as second, socket.socket() as third:
        sockets = [first, second, third][:count]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [int(s.getsockname()[1]) for s in sockets]


def test_every_block_is_run_or_says_why_not() -> None:
    assert len(blocks(True)) + len(blocks(False)) == GUIDE.count("```sh")
    assert len(blocks(True)) >= 8 and len(blocks(False)) == 3


@pytest.mark.parametrize("commands", blocks(True) + blocks(False))
def test_every_block_is_bash_that_names_what_there_is(commands: str) -> None:
    subprocess.run(["bash", "-n"], input=commands, text=True, check=True, timeout=30)
    for path in re.findall(r"\b((?:cluster|k8s|docs)/[a-z./-]+)", commands):
        assert (ROOT / path).exists(), path
    for module in re.findall(r"python -m ([a-z_.]+)", commands):
        assert (ROOT / f"{module.replace('.', '/')}.py").exists(), module


def test_the_metrics_are_those_that_there_are() -> None:
    tables = re.findall(r"^\| (of every worker|of rank 0) \|.*?(?=\n\n)", GUIDE, re.DOTALL | re.MULTILINE)
    assert len(tables) == 2
    for title, names in (("of every worker", OF_WORKER), ("of rank 0", OF_RUN)):
        table = re.search(rf"^\| {title} \|.*?(?=\n\n)", GUIDE, re.DOTALL | re.MULTILINE)
        assert table is not None
        told = {name for row in table[0].splitlines() for name in re.findall(r"`([a-z_]+)`", row.split("|")[1])}
        assert told == set(names)


def test_prometheus_takes_its_configuration(tmp_path: Path) -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", GUIDE, re.DOTALL)
    (job,) = yaml.safe_load(text)["scrape_configs"]
    assert job["file_sd_configs"][0]["files"] == ["/tmp/ray/prom_metrics_service_discovery.json"]
    if shutil.which("promtool"):
        config = tmp_path / "prometheus.yml"
        config.write_text(text)
        subprocess.run(["promtool", "check", "config", config], check=True, timeout=60)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy, which the commands may write to."""
    copy = tmp_path / "checkout"
    leave = shutil.ignore_patterns(".*", "runs", "tests", "benchmarks", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, copy, ignore=leave)
    shutil.copy(ROOT / ".gitignore", copy)
    (copy / ".venv").symlink_to(ROOT / ".venv")
    return copy


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_commands_run(checkout: Path, tmp_path: Path) -> None:
    """On other ports, and below another folder than /tmp/ray: a cluster of somebody else's may be there."""
    port, dashboard, agent = free_ports(3)
    script = "set -euo pipefail\n" + "\n".join(f"echo '--- {n}'\n{text}" for n, text in enumerate(blocks(True)))
    script = script.replace("6379", str(port)).replace("8265", str(dashboard))
    script = script.replace("--head --block", f"--head --block --dashboard-agent-listen-port {agent}")
    temp = Path(f"/tmp/rs-ops-{os.getpid()}")
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    env |= {"HOME": str(tmp_path / "home"), "RAY_TMPDIR": str(temp), "RAY_USAGE_STATS_ENABLED": "0"}
    env |= {"PATH": f"{Path(sys.executable).parent}:{env['PATH']}"}
    (tmp_path / "home").mkdir()
    printed = tmp_path / "printed"
    with printed.open("w") as out:
        shell = subprocess.Popen(
            ["bash", "-c", script], cwd=checkout, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = shell.wait(3000)
        finally:
            os.killpg(shell.pid, signal.SIGTERM)  # the cluster that stays
            shutil.rmtree(temp, ignore_errors=True)
    assert code == 0, printed.read_text()[-6000:]
    results = {path.parent.name for path in checkout.glob("runs/*/result.json")}
    assert results == {"first", "second", "third", "fourth", "long", "elastic"}
    assert (checkout / "remote" / "fifth" / "result.json").exists()
