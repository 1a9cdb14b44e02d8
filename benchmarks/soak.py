"""A long run on a real Ray cluster of two nodes, in which something is killed all the time.

    python -m benchmarks.soak --minutes 30

Every so often, at random, SIGKILL hits a worker, all workers, the driver (which is started again by the same command),
or a node (which is started again after a while; the run is elastic). Ends with the run: whether its weights are bitwise
those of the same run undisturbed in one process, each step logged once; what is left on the disk; how long it took from
each kill to the next step; and how the driver's memory and files grew.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import statistics
import tempfile
import time
from pathlib import Path

import psutil

from robustscale.engine.folder import RunFolder
from tests.edges.machines import Driver, Machines, assert_as_undisturbed, kill_group, machines, steps, workers

KINDS = ("worker", "all workers", "driver", "node")


class Soak:
    def __init__(self, cluster: Machines, folder: Path, epochs: int, seed: int) -> None:
        self.cluster, self.run = cluster, RunFolder(folder / "runs" / "soak")
        self.draw = random.Random(seed)
        self.args = ["digits", "--model.base", "4", "--epochs", epochs, "--run-name", "soak"]
        self.args += ["--storage", folder / "runs", "--data.root", folder / "data", "--log-every", "1"]
        self.args += ["--reduction", "deterministic", "--cluster.workers", "4", "--cluster.min-workers", "1"]
        self.args += ["--cluster.max-failures", "100", "--cluster.wait", "120", "--checkpoints.every-steps", "10"]
        self.args += ["--evaluation.monitor.steps", "2", "--evaluation.every", "20"]
        self.driver = self._start()
        self.kills: dict[str, list[float]] = {kind: [] for kind in KINDS}
        self.sizes: list[tuple[float, int, int]] = []

    def _start(self) -> Driver:
        return Driver(self.cluster.env, *self.args)

    def wait_for_step(self, anew: bool, timeout: float = 180) -> float | None:
        """Seconds until a step is logged that was not before, by workers that were started `anew`: a step that was
        under way at a kill is none. None where the run ended first."""
        began, first = time.monotonic(), self._newest_log()
        before = first
        while self.driver.process.poll() is None:
            now = self._newest_log()
            if now[0] == before[0] and now[1] > before[1] and not (anew and now[0] == first[0]):
                return time.monotonic() - began
            before = now  # written anew, it has no further step yet
            if time.monotonic() - began > timeout:
                raise SystemExit(f"no step for {timeout:.0f} s:\n{self.driver.output[-3000:]}")
            time.sleep(0.1)
        return None

    def _newest_log(self) -> tuple[int, int]:
        """On resuming, the log is written anew: its inode tells."""
        try:
            found = self.run.metrics.stat()
        except FileNotFoundError:
            return 0, 0
        return found.st_ino, found.st_size

    def _newest_node_has(self, pids: list[int]) -> bool:
        below = psutil.Process(self.cluster.nodes[-1].pid).children(recursive=True)
        return not {process.pid for process in below}.isdisjoint(pids)

    def disturb(self) -> None:
        kind = self.draw.choice(KINDS)
        pids = workers(self.cluster.env)
        if kind == "node" and not self._newest_node_has(pids):
            kind = "worker"  # a node that has just come has none yet, and nobody would miss it
        if kind == "driver":
            kill_group(self.driver.process)
            self.driver = self._start()
        elif kind == "node":
            kill_group(self.cluster.nodes.pop())
        else:
            for pid in pids if kind == "all workers" else pids[:1]:
                os.kill(pid, signal.SIGKILL)
        seconds = self.wait_for_step(anew=True)
        if seconds is not None:
            self.kills[kind].append(seconds)
        if kind == "node":
            self.cluster.add_node(2)
        with contextlib.suppress(psutil.NoSuchProcess):  # the run is over
            process = psutil.Process(self.driver.process.pid)
            self.sizes.append((time.monotonic(), process.memory_info().rss, process.num_fds()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--every", type=float, default=30, help="mean seconds between a recovery and the next kill")
    parser.add_argument(
        "--epochs", type=int, default=600, help="of the run; the kills end with it, or with the minutes"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir="/tmp") as name, machines(Path(name), 2, 2) as cluster:
        folder, began = Path(name), time.monotonic()
        soak = Soak(cluster, folder, args.epochs, args.seed)
        soak.wait_for_step(anew=False)
        while time.monotonic() - began < 60 * args.minutes and soak.driver.process.poll() is None:
            time.sleep(soak.draw.uniform(0, 2 * args.every))
            if soak.driver.process.poll() is None:
                soak.disturb()
                last = {kind: f"{times[-1]:.1f} s" for kind, times in soak.kills.items() if times}
                print(f"{(time.monotonic() - began) / 60:.1f} min, step {max(steps(soak.run), default=0)}: {last}")
        code = soak.driver.wait(3600)
        print(f"ended after {(time.monotonic() - began) / 60:.1f} min with code {code}")
        for kind, times in soak.kills.items():
            if times:
                middle, worst = statistics.median(times), max(times)
                print(f"{kind}: {len(times)} kills, next step after {middle:.1f} s (median), {worst:.1f} s (worst)")
        left = sorted(path.name for path in soak.run.checkpoints.iterdir())
        print(f"checkpoints left: {left}")
        if len(soak.sizes) > 1:
            (_, rss, fds), (_, last_rss, last_fds) = soak.sizes[0], soak.sizes[-1]
            print(f"driver: {rss / 2**20:.0f} to {last_rss / 2**20:.0f} MiB, {fds} to {last_fds} open files")
        assert_as_undisturbed(soak.run, folder, timeout=7200)
        print("weights bitwise those of the undisturbed run; each step logged once")


if __name__ == "__main__":
    main()
