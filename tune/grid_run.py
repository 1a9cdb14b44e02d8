"""Does a plan on a Ray cluster: every node that is ready, as many at a time as there is room for.

A node of one worker runs inside an actor that is used again: a Ray Train group takes longer to start than a small
training takes. There is no ledger: a node is done when its file is there, so that a killed grid is started once more.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.attempt import short
from cluster.nodes import prepare_nodes, wants_gpu
from cluster.orders import interruptible
from cluster.ray_cluster import in_cluster, ray_cluster
from robustscale.engine.folder import RunFolder
from robustscale.errors import Diverged, InputError
from robustscale.fields import require
from robustscale.run import Cluster, Data
from tune.grid import Course, Node
from tune.grid_node import do_node, finished, node_job, nodes_folder
from tune.trial import last_words

Show = Callable[[dict[str, Any]], None]
Seen = Mapping[str, list[str]]
"""By the key of a training, what its data.json is to tell of what it starts from: see `require_ready`."""


@dataclass(frozen=True, kw_only=True)
class GridSettings:
    """How nodes share a cluster."""

    concurrent: int | None = None
    """Nodes at a time; by default as many as the cluster has room for."""
    gpus_per_worker: float = 1.0
    """A part of a GPU puts several nodes on one; for one worker each."""
    retries: int = 1
    """How often a node is begun again, from its last checkpoint, where its process or its machine died."""
    hang: float = 900.0
    """Seconds without a step after which a node counts as hung."""

    def __post_init__(self) -> None:
        require(self.concurrent is None or self.concurrent >= 1, f"concurrent: {self.concurrent} is below 1")
        require(0 < self.gpus_per_worker <= 1, f"gpus_per_worker: {self.gpus_per_worker!r} is outside (0, 1]")
        require(self.retries >= 0, f"retries: {self.retries} is negative; 0 gives up at once")
        require(0 < self.hang < math.inf, f"hang: {self.hang!r} is not positive and finite; it is in seconds")


def run_grid(course: Course, storage: Path, cluster: Cluster, settings: GridSettings, show: Show, seen: Seen) -> None:
    """Until every node is done, failed or left out. Where nothing is left to do, Ray is not started."""
    if course.over:
        return
    with ray_cluster(cluster, show), interruptible():
        import ray

        from tune.search import slots

        there = ray.cluster_resources()
        gpu = wants_gpu(cluster)
        room = slots(cluster, settings, gpu, there)
        if in_cluster():
            _prepare(run.data for run in course.needed())
        show({"event": "note", "message": f"{room} nodes at a time, on {'GPUs' if gpu else 'CPUs'}"})
        _Grid(course, storage, cluster, settings, show, gpu, room, seen).run_on()


def _prepare(every: Iterable[Data]) -> None:
    for data in {(each.source, each.root): each for each in every}.values():
        error = prepare_nodes(data)
        if error is not None:
            raise InputError(f"data.source: a machine could not prepare {data.source} ({error}); try again")


class _Bench:
    """An actor's class: where one node after the other is done."""

    def do(self, config: dict[str, Any]) -> None:
        do_node(config)


@dataclass
class _Grid:
    course: Course
    storage: Path
    cluster: Cluster
    settings: GridSettings
    show: Show
    gpu: bool
    room: int
    seen: Seen = field(default_factory=dict)
    running: dict[Any, tuple[str, Any]] = field(default_factory=dict)
    """Answer to wait for -> (node, its actor)."""
    idle: list[Any] = field(default_factory=list)
    died: dict[str, int] = field(default_factory=dict)
    """Of each node, how often its process died."""

    def run_on(self) -> None:
        import ray

        while not self.course.over:
            self._start()
            if not self.running:
                time.sleep(0.5)  # what may start is at work in another grid
            elif done := ray.wait(list(self.running), timeout=0.5)[0]:
                self._end(done[0])
            self._tell_progress()

    def _start(self) -> None:
        for node in self.course.ready():
            if finished(node, self.storage):  # by another grid, meanwhile
                self.course.start(node.key)
                self._finish(node)
            elif len(self.running) < self.room and _free(nodes_folder(self.storage) / node.folder):
                self.course.start(node.key)
                bench = self.idle.pop() if self.idle else self._bench()
                seen = self.seen.get(node.key)
                config = node_job(node, self.storage, self.cluster, self.gpu, self.settings.hang, seen)
                self.running[bench.do.remote(config)] = (node.key, bench)
                self._tell(node)

    def _bench(self) -> Any:
        import ray

        if self.cluster.workers > 1:
            # A group has its own placement, and its node only waits for it.
            return ray.remote(num_cpus=0)(_Bench).remote()
        gpus = self.settings.gpus_per_worker if self.gpu else 0
        return ray.remote(num_cpus=self.cluster.cpus_per_worker, num_gpus=gpus)(_Bench).remote()

    def _end(self, answer: Any) -> None:
        import ray

        key, bench = self.running.pop(answer)
        node = self.course.plan[key]
        folder = nodes_folder(self.storage) / node.folder
        lasting, reason = False, None
        try:
            ray.get(answer)
        except ray.exceptions.RayTaskError as error:
            cause = getattr(error, "cause", error)
            lasting, reason = isinstance(cause, (InputError, Diverged)), f"{_kind(cause)}{short(cause)}"
        except ray.exceptions.RayError as error:
            reason = last_words(folder, self.settings.hang) or short(error)
        if reason is None and self.cluster.workers == 1:
            self.idle.append(bench)
        else:
            self._clear(bench, folder)
        if reason is None:
            self._finish(node)
        else:
            self._failed(node, reason, lasting)

    def _clear(self, bench: Any, folder: Path) -> None:
        """Processes of a group must end with their node, and what failed may have left anything behind."""
        import ray

        ray.kill(bench)
        if self.cluster.workers > 1 and _free(folder):  # or else it is another grid's group
            from tune.groups import release

            release(folder)

    def _finish(self, node: Node) -> None:
        self.course.finish(node.key)
        self._tell(node)

    def _failed(self, node: Node, reason: str, lasting: bool) -> None:
        if lasting and not _free(nodes_folder(self.storage) / node.folder):
            # Another grid was quicker, and does it: `_start` waits for that.
            self.course.again(node.key)
            self._tell(node)
            return
        self.died[node.key] = self.died.get(node.key, 0) + 1
        if not lasting and self.died[node.key] <= self.settings.retries:
            self.show({"event": "note", "message": f"{node.name}: {reason}; going on from its last checkpoint"})
            self.course.again(node.key)
            return
        before = set(self.course.keys("left out"))
        self.course.fail(node.key, reason)
        self._tell(node, reason=reason)
        for key in set(self.course.keys("left out")) - before:
            self._tell(self.course.plan[key])

    def _tell(self, node: Node, **more: Any) -> None:
        state = self.course.states[node.key]
        self.show({"event": "node", "key": node.key, "name": node.name, "state": state, **more})
        self.show({"event": "grid", "states": dict(self.course.states)})

    def _tell_progress(self) -> None:
        for key, _ in self.running.values():
            node = self.course.plan[key]
            if node.key == node.folder:
                metrics = RunFolder(nodes_folder(self.storage) / node.folder).metrics
                epochs = node.training.run.epochs
                self.show({"event": "progress", "key": key, "epoch": _last_epoch(metrics), "epochs": epochs})


def _kind(cause: BaseException) -> str:
    """What is not meant to be read by a person is told with its type."""
    return "" if isinstance(cause, (InputError, Diverged)) else f"{type(cause).__name__}: "


def _free(folder: Path) -> bool:
    """Whether no process works there: one of another grid, or of one that was killed a moment ago."""
    try:
        with RunFolder(folder).locked():
            return True
    except InputError:
        return False


def _last_epoch(metrics: Path) -> int:
    """From the last complete line of metrics.jsonl; 0 before there is one."""
    try:
        with metrics.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - 4096))
            lines = file.read().split(b"\n")[1:-1]
        return int(json.loads(lines[-1])["epoch"])
    except (OSError, IndexError, ValueError, KeyError):
        return 0
