"""The store must give the old state or the new one, whatever happens to the process, the disk or the files.

Run as a script (`python test_store_crashes.py FOLDER TASK NUMBER`) it is the driver of the tests that kill: it forks
a child that dies amid a save, and prints what the store held afterwards, as JSON.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from robustscale.engine.checkpoint import Store
from robustscale.engine.manifest import Broken, verify
from robustscale.errors import InputError
from tests.engine.stores import check, flip_bit, groups, names, save, state

slow = pytest.mark.slow


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in memory where there is one: thousands of fsyncs take a disk minutes, and decide nothing here."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as place:
        yield Path(place)


CHANGES = ("open", "write", "fsync", "mkdir", "rename", "replace", "unlink", "rmdir")


@contextlib.contextmanager
def intercepted(handle: Callable[..., Any]) -> Iterator[None]:
    """What the store does to the disk goes through `handle(name, call, *args, **kwargs)`."""
    calls = {name: getattr(os, name) for name in CHANGES}

    def only_changes(name: str, *args: Any, **kwargs: Any) -> Any:
        reads = name == "open" and not args[1] & os.O_CREAT
        return calls[name](*args, **kwargs) if reads else handle(name, calls[name], *args, **kwargs)

    for name in CHANGES:
        setattr(os, name, functools.partial(only_changes, name))
    try:
        yield
    finally:
        for name, call in calls.items():
            setattr(os, name, call)


class Scene(NamedTuple):
    """A store before a save of step 30: steps 10 and 20, and what a killed attempt left."""

    keep: int
    keep_best: int = 0
    before: bool = True
    damaged: bool = False

    def save(self, root: Path, step: int) -> None:
        save(root, step, self.keep, self.keep_best)

    def prepare(self, root: Path) -> int | None:
        """The step that it gives; step 30 is there and damaged where the scene says so."""
        if not self.before:
            return None
        self.save(root, 10)
        self.save(root, 20)
        if self.damaged:
            self.save(root, 30)
            flip_bit(root / "step-00000030" / "model.safetensors", 7000)
        (root / ".tmp-old").mkdir()
        (root / ".tmp-old" / "model.safetensors").write_bytes(b"half")
        return 20


SCENES = {
    "first": Scene(3, before=False),
    "keep 1": Scene(1),
    "damaged": Scene(2, damaged=True),
    "best": Scene(1, 1),
}


# --- A process that dies


def dying(k: int, mode: str) -> Callable[..., Any]:
    """Ends the process at the k-th change. after: once it is made, which is also before the next. half: before it, but
    of a write, half is made."""
    count = itertools.count(1)

    def handle(name: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if next(count) != k:
            return call(*args, **kwargs)
        if mode == "half" and name == "write":
            call(args[0], args[1][: len(args[1]) // 2])
        elif mode == "after":
            with contextlib.suppress(OSError):
                call(*args, **kwargs)
        os._exit(9)

    return handle


def verifies(folder: Path) -> bool:
    try:
        verify(folder)
    except Broken:
        return False
    return True


def crash(root: Path, scene: Scene, k: int, mode: str) -> dict[str, Any]:
    """Save step 30 in a child that dies at change k; what the store gives then, and after another save."""
    before = scene.prepare(root)
    child = os.fork()
    if child == 0:
        with intercepted(dying(k, mode)):
            scene.save(root, 30)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        given = check(root)
    result: dict[str, Any] = {"before": before, "code": code, "given": given, "warnings": len(caught)}
    result["broken"] = [folder.name for folder in root.glob("step-*") if not verifies(folder)]
    scene.save(root, 40)
    result |= {"then": check(root), "folders": names(root)}
    shutil.rmtree(root)
    return result


def crash_everywhere(place: Path, stride: int) -> None:
    for (name, scene), (first, mode) in itertools.product(SCENES.items(), enumerate(("half", "after"), 1)):
        for k in itertools.count(first, stride):
            result = crash(place / "checkpoints", scene, k, mode)
            print(json.dumps({"scene": name, "k": k, "mode": mode, **result}))
            if result["code"] == 0:
                break


def driven(place: Path, *task: str) -> list[dict[str, Any]]:
    """What this file prints as a script: a process with one thread, which may be forked."""
    root = Path(__file__).parents[2]
    command = [sys.executable, __file__, str(place), *task]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    driver = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=root, env=environment)
    assert driver.returncode == 0, driver.stderr
    return [json.loads(line) for line in driver.stdout.splitlines()]


@pytest.mark.parametrize("stride", [3, pytest.param(1, marks=slow)])
def test_dying_at_any_operation_leaves_the_old_state_or_the_new(memory: Path, stride: int) -> None:
    results = driven(memory, "crash", str(stride))
    for result in results:
        scene = SCENES[result["scene"]]
        assert result["code"] in (0, 9), result
        assert result["given"] in ({result["before"], 30} if result["code"] else {30}), result
        assert result["then"] == 40, result
        steps = [folder for folder in result["folders"] if not folder.startswith(".corrupt-")]
        assert [folder for folder in steps if folder.startswith(".tmp-")] == [], result
        # What a damaged step 30 leaves is dropped with its neighbours.
        assert len(steps) <= scene.keep + scene.keep_best + scene.damaged, result
        assert not scene.keep_best or "step-00000010" in steps, result
        assert result["broken"] in ([], ["step-00000030"] * scene.damaged), result
        assert result["warnings"] <= scene.damaged, result
    for name in SCENES:
        reached = [r for r in results if r["scene"] == name and r["code"] == 9]
        assert len(reached) >= 40 // stride
        both = {r["given"] for r in reached} == {reached[0]["before"], 30}
        assert both or (name == "first" and stride > 1), "both sides of the commit were reached"


def attempt(root: Path, k: int | None, mode: str, said: int) -> None:
    """A child's life: it goes on from the latest step, and says each that it has saved."""
    with contextlib.nullcontext() if k is None else intercepted(dying(k, mode)):
        first = (check(root) or 0) + 10
        # A save takes 30 to 45 changes.
        for step in range(first, first + 60, 10):
            save(root, step, 2, 1)
            os.pwrite(said, f"{step:8}".encode(), 0)
    os._exit(0)


def endure(place: Path, kills: int) -> None:
    """One store, killed again and again: at a random change, and every second time at a random moment."""
    rng, root, saved = np.random.default_rng(0), place / "checkpoints", place / "saved"
    said = os.open(saved, os.O_RDWR | os.O_CREAT)
    done, best = 0, None
    while done < kills:
        left = {path.name for path in root.glob(".tmp-*")}
        timed = done % 2 == 1
        k, mode = int(rng.integers(1, 200)), str(rng.choice(["half", "after"]))
        child = os.fork()
        if child == 0:
            attempt(root, None if timed else k, mode, said)
        if timed:
            time.sleep(float(rng.uniform(0, 0.05)))
            os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        done += code != 0
        folders = names(root) if root.exists() else []
        tmp = {name for name in folders if name.startswith(".tmp-")}
        best = best or next((name for name in folders if name.startswith("step-")), None)
        said_step = int(saved.read_text() or 0)
        print(json.dumps({
            "code": code, "said": said_step, "given": check(root), "old": sorted(tmp & left), "new": sorted(tmp - left),
            "steps": sum(name.startswith("step-") for name in folders), "others": len(folders) - len(tmp) - sum(
                name.startswith("step-") for name in folders), "best": best is None or best in folders,
        }))  # fmt: skip


@pytest.mark.parametrize("kills", [20, pytest.param(500, marks=slow)])
def test_kill_after_kill_leaves_no_rubbish(memory: Path, kills: int) -> None:
    results = driven(memory, "endure", str(kills))
    assert sum(result["code"] != 0 for result in results) == kills
    for result in results:
        assert result["code"] in (0, 9, -9), result
        assert (result["given"] or 0) >= result["said"], result
        assert result["steps"] <= 2 + 1 + 1 and result["others"] == 0 and result["best"], result
        # An attempt makes nothing new before all that is left of others is gone.
        assert not (result["old"] and result["new"]), result
    assert results[-1]["given"] > 10 * kills / 4


# --- A disk that loses power


Entries = dict[str, int | None]
Tree = dict[str, "bytes | Tree"]


class Recorder:
    """Every change of the disk, as it was made, in terms of files and folders (numbers) and not of paths."""

    def __init__(self, disk: Path) -> None:
        self.disk, self.numbers = disk, itertools.count()
        self.log: list[tuple[Any, ...]] = []
        self.folders: dict[int, Entries] = {}
        self._there(disk)

    def _there(self, path: Path) -> int:
        """What is there when recording starts is synced."""
        number = next(self.numbers)
        if path.is_file():
            self.log += [("file", number), ("write", number, path.read_bytes()), ("sync", number)]
        else:
            self.log.append(("folder", number))
            self.folders[number] = {}
            for inner in path.iterdir():
                self._enter(number, {inner.name: self._there(inner)})
            self.log.append(("sync", number))
        return number

    def _enter(self, folder: int, changes: Entries) -> None:
        self.log.append(("enter", folder, changes))
        for name, number in changes.items():
            if number is None:
                del self.folders[folder][name]
            else:
                self.folders[folder][name] = number

    def _number(self, path: Path) -> int | None:
        """None for what is outside the disk."""
        if not path.is_relative_to(self.disk):
            return None
        number = 0
        for part in path.relative_to(self.disk).parts:
            inner = self.folders[number][part]
            assert inner is not None
            number = inner
        return number

    def _folder(self, path: Path) -> int:
        number = self._number(path.parent)
        assert number is not None
        return number

    def handle(self, name: str, call: Callable[..., Any], *args: Any, dir_fd: int | None = None, **kwargs: Any) -> Any:
        result = call(*args, **kwargs) if dir_fd is None else call(*args, dir_fd=dir_fd, **kwargs)
        if name in ("write", "fsync"):
            number = self._number(Path(f"/proc/self/fd/{args[0]}").readlink())
            if name == "write":
                self.log.append(("write", number, bytes(args[1][:result])))
            elif number is not None:
                self.log.append(("sync", number))
            return result
        path = Path(args[0]) if dir_fd is None else Path(f"/proc/self/fd/{dir_fd}").readlink() / args[0]
        if name in ("open", "mkdir"):
            number = next(self.numbers)
            if name == "mkdir":
                self.folders[number] = {}
            self.log.append(("folder" if name == "mkdir" else "file", number))
            self._enter(self._folder(path), {path.name: number})
        elif name in ("rename", "replace"):
            target = Path(args[1])
            assert path.parent == target.parent
            self._enter(self._folder(path), {path.name: None, target.name: self._number(path)})
        else:
            self._enter(self._folder(path), {path.name: None})
        return result


@functools.cache
def may_be(synced: bytes, written: bytes) -> list[bytes]:
    """What a file holds, for each answer."""
    half = len(written) // 2
    return [synced + rest for rest in (b"", written, written[:half], bytes(half) + written[half:], bytes(2 * half))]


class Disk:
    """What may be on a disk that loses power, by the weakest reading of POSIX (as ALICE, Pillai et al., OSDI 2014).

    Of the writes to a file since it was last synced: nothing, all, the first half, the second half after zeros, or
    zeros alone. Of the changes to a folder's entries since that was last synced: any of them, whatever became of those
    before. A rename is one change.
    """

    def __init__(self) -> None:
        self.files: dict[int, tuple[bytes, bytes]] = {}
        self.folders: dict[int, tuple[Entries, list[Entries]]] = {}

    def apply(self, op: str, number: int, value: Any = None) -> None:
        if op == "file":
            self.files[number] = b"", b""
        elif op == "folder":
            self.folders[number] = {}, []
        elif op == "write":
            synced, rest = self.files[number]
            self.files[number] = synced, rest + value
        elif op == "enter":
            self.folders[number][1].append(value)
        elif number in self.files:
            self.files[number] = b"".join(self.files[number]), b""
        else:
            self.folders[number] = self._entries(number, [True] * len(self.folders[number][1])), []

    def _entries(self, number: int, made: list[bool]) -> Entries:
        entries = dict(self.folders[number][0])
        for changes in itertools.compress(self.folders[number][1], made):
            entries |= changes
        return entries

    def open_questions(self) -> list[int]:
        """The number of answers to each."""
        return [5] * sum(bool(rest) for _, rest in self.files.values()) + [2] * sum(
            len(changes) for _, changes in self.folders.values()
        )

    def after(self, answers: list[int]) -> Tree:
        """0 everywhere: all that was not synced is lost. 1: nothing is."""
        rest = iter(answers)
        contents = {n: may_be(*file)[next(rest) if file[1] else 0] for n, file in self.files.items()}
        entries = {n: self._entries(n, [bool(next(rest)) for _ in changes]) for n, (_, changes) in self.folders.items()}

        def tree(number: int) -> Tree:
            inner = {name: n for name, n in entries[number].items() if n is not None}
            return {name: contents[n] if n in contents else tree(n) for name, n in inner.items()}

        return tree(0)

    def states(self, at_most: int, rng: np.random.Generator) -> Iterator[Tree]:
        """All of them, or so many drawn, the two extremes among them."""
        questions = self.open_questions()
        if math.prod(questions) <= at_most:
            yield from (self.after(list(answers)) for answers in itertools.product(*map(range, questions)))
            return
        yield self.after([0] * len(questions))
        yield self.after([1] * len(questions))
        for _ in range(at_most - 2):
            # Few or many of the changes were made.
            share = rng.uniform()
            made = rng.uniform(size=len(questions)) < share
            yield self.after([int(rng.integers(1, n)) if m else 0 for n, m in zip(questions, made, strict=True)])


def key(tree: Tree) -> Hashable:
    return frozenset((name, inner if isinstance(inner, bytes) else key(inner)) for name, inner in tree.items())


def write_tree(place: Path, tree: Tree) -> None:
    place.mkdir()
    for name, inner in tree.items():
        if isinstance(inner, bytes):
            (place / name).write_bytes(inner)
        else:
            write_tree(place / name, inner)


def read_tree(place: Path) -> Tree:
    return {p.name: p.read_bytes() if p.is_file() else read_tree(p) for p in place.iterdir()}


class Loss(NamedTuple):
    tree: Tree
    allowed: tuple[int | None, ...]
    """The step whose save has returned, and those begun since."""


class Killed(BaseException):
    pass


def killed_before_the_last_sync(recorder: Recorder, root: Path) -> Callable[..., Any]:
    def handle(name: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # The sync before it prunes finds nothing to drop yet.
        if name == "fsync" and Path(f"/proc/self/fd/{args[0]}").readlink() == root:
            raise Killed
        return recorder.handle(name, call, *args, **kwargs)

    return handle


def losses(place: Path, scene: Scene, at_most: int) -> list[Loss]:
    """What may be on the disk, each once, after a power loss at any moment of three saves, of which the first dies."""
    disk = place / "disk"
    root = disk / "run" / "checkpoints"
    disk.mkdir()
    saved = scene.prepare(root)
    recorder = Recorder(disk)
    start, ends = len(recorder.log), []
    with contextlib.suppress(Killed), intercepted(killed_before_the_last_sync(recorder, root)):
        scene.save(root, 25)
    ends.append(len(recorder.log))
    with intercepted(recorder.handle):
        # One store for both, and step 30 again where it is damaged.
        store = Store(root, scene.keep, scene.keep_best)
        for step in (30, 40):
            store.save(step, groups(step), state(step))
            ends.append(len(recorder.log))
    model, found, rng = Disk(), {}, np.random.default_rng(0)
    for i, op in enumerate(recorder.log, 1):
        model.apply(*op)
        if i >= start:
            allowed = ((saved, 25), (saved, 25, 30), (30, 40), (40,))[sum(i >= end for end in ends)]
            for tree in model.states(at_most, rng):
                found.setdefault((key(tree), allowed), Loss(tree, allowed))
    assert model.after([1] * len(model.open_questions())) == read_tree(disk), (
        "the model is the disk, if nothing is lost"
    )
    return list(found.values())


@pytest.mark.parametrize("at_most, least", [(3, 250), pytest.param(500, 6000, marks=slow)])
def test_power_loss_leaves_the_old_state_or_the_new(memory: Path, at_most: int, least: int) -> None:
    count = 0
    for name, scene in SCENES.items():
        (memory / name).mkdir()
        for loss in losses(memory / name, scene, at_most):
            disk = memory / "after"
            write_tree(disk, loss.tree)
            root = disk / "run" / "checkpoints"
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                assert check(root) in loss.allowed, (name, loss)
            assert len(caught) <= scene.damaged, (name, loss)
            scene.save(root, 50)
            assert check(root) == 50
            assert not list(root.glob(".tmp-*"))
            shutil.rmtree(disk)
            count += 1
    assert count >= least
    print(f"{count} states", end=" ")


# --- Damage


def mutant(rng: np.random.Generator, content: bytes, others: list[bytes]) -> bytes:
    at = int(rng.integers(len(content)))
    kind = rng.integers(6)
    if kind == 0:
        return content[:at] + bytes([content[at] ^ 1 << int(rng.integers(8))]) + content[at + 1 :]
    if kind == 1:
        return content[:at]
    if kind == 2:
        page = at // 512 * 512
        return content[:page] + bytes(len(content[page : page + 512])) + content[page + 512 :]
    if kind == 3:
        return content + content[:at] + b" "
    if kind == 4:
        return content[:at] + content[at + 1 :]
    return others[int(rng.integers(len(others)))]


@pytest.mark.parametrize("count", [150, pytest.param(10_000, marks=slow)])
def test_no_mutant_is_accepted(memory: Path, count: int) -> None:
    """Bit flips, truncation, zeroed pages, growth, lost bytes, swapped files, other steps' and other runs' files."""
    save(memory / "run", 1)
    newest = save(memory / "run", 2)
    Store(memory / "other", 1).save(2, groups(9), state(9))
    pool = {path: path.read_bytes() for path in memory.rglob("*") if path.is_file()}
    rng = np.random.default_rng(0)
    for file in sorted(newest.iterdir()):
        foreign = sorted({content for content in pool.values() if content != pool[file]})
        tried = 0
        while tried < count:
            content = mutant(rng, pool[file], foreign)
            if content == pool[file]:
                continue
            tried += 1
            file.write_bytes(content)
            # A whole manifest of another run speaks of other contents: the first of those is named then.
            named = r"\w+\.\w+" if file.name == "MANIFEST.json" else file.name
            with pytest.warns(UserWarning, match=rf"step-00000002 is not used: {named} .*step-00000001 is used"):
                assert check(memory / "run") == 1
        file.write_bytes(pool[file])
    assert check(memory / "run") == 2


@slow
def test_the_last_good_one_is_found_within_ten_seconds(memory: Path) -> None:
    """Each has 288 MiB, as a ResNet-50 with momentum and average; the newer two are damaged at their end."""
    store = Store(memory, 3)
    for step in (1, 2, 3):
        weights = {str(i): torch.full((2**20,), float(step)) for i in range(24)}
        store.save(step, {"average": weights, "model": weights, "optimizer": weights}, state(step))
    for step in (2, 3):
        path = memory / f"step-{step:08}" / "optimizer.safetensors"
        with path.open("r+b") as file:
            file.seek(-5, os.SEEK_END)
            file.write(b"\x01")
    start = time.perf_counter()
    with pytest.warns(UserWarning, match="step-00000001 is used"):
        saved = Store(memory, 3).latest()
    seconds = time.perf_counter() - start
    print(f"{seconds:.2f} s", end=" ")
    assert saved is not None and saved.step == 1
    assert seconds < 10


# --- A disk that fails


def full(free: int) -> Callable[..., Any]:
    """A disk with so many bytes left."""

    def handle(name: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        nonlocal free
        if name != "write":
            return call(*args, **kwargs)
        if not free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = call(args[0], args[1][:free])
        free -= written
        return written

    return handle


def test_space_that_ends_at_any_byte_leaves_the_last_good_one(memory: Path) -> None:
    size = sum(file.stat().st_size for file in save(memory, 1).iterdir())
    for free in np.linspace(0, size - 1, 200, dtype=int).tolist():
        with intercepted(full(free)), pytest.raises(InputError) as caught:
            save(memory, 2, keep=1)
        assert "step 2 cannot be written (No space left on device); the last good one, step 1, is in" in str(
            caught.value
        )
        assert "\n" not in str(caught.value)
        assert names(memory) == ["step-00000001"]
    assert check(memory) == 1
    with intercepted(full(size + 100)):
        save(memory, 2, keep=1)
    assert names(memory) == ["step-00000002"] and check(memory) == 2


def failing(k: int) -> Callable[..., Any]:
    """The k-th change fails, and those after it do not."""
    count = itertools.count(1)

    def handle(name: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if next(count) == k:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return call(*args, **kwargs)

    return handle


@pytest.mark.parametrize("name", SCENES)
def test_any_operation_may_fail(memory: Path, name: str) -> None:
    scene, told = SCENES[name], set()
    for k in range(1, 60):
        root = memory / str(k)
        before = scene.prepare(root)
        with warnings.catch_warnings(record=True) as caught, intercepted(failing(k)):
            warnings.simplefilter("always")
            try:
                scene.save(root, 30)
                said = "; ".join(str(warning.message) for warning in caught) or None
            except InputError as error:
                said = str(error)
        told.add(said.split(": ", 1)[1].partition("(")[0].strip() if said else None)
        assert said is None or "Input/output error" in said
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert check(root) in ({before, 30} if said and "cannot be written" in said else {30})
        assert len(caught) <= scene.damaged
        scene.save(root, 40)
        assert check(root) == 40
        assert not list(root.glob(".tmp-*"))
    # The last k are past the end.
    pruned = {"old checkpoints cannot be removed"} if name != "first" else set()
    assert told == {None, "the checkpoint of step 30 cannot be written"} | pruned


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_limit_on_file_size_leaves_the_last_good_one(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    largest = max(file.stat().st_size for file in folder.iterdir())
    for size in np.linspace(0, largest - 1, 60, dtype=int).tolist():
        with file_size_limit(size), pytest.raises(InputError, match=r"step 2 cannot be written .*step 1, is intact"):
            save(tmp_path, 2, keep=1)
        assert names(tmp_path) == ["step-00000001"]
    assert check(tmp_path) == 1
    with file_size_limit(0), pytest.raises(InputError, match="none was there before; free space"):
        save(tmp_path / "new", 1)
    with file_size_limit(largest + 1000):
        save(tmp_path, 2, keep=1)
    assert names(tmp_path) == ["new", "step-00000002"]


@pytest.fixture
def small_disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A file system of so many KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={request.param}k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize(
    "small_disk, size", [(128, 4000), pytest.param(1280, 50_000, marks=slow)], indirect=["small_disk"]
)
def test_full_disk(small_disk: Path, size: int) -> None:
    root = small_disk / "checkpoints"
    large = functools.partial(groups, size=size)
    assert Store(root, 1).save(1, large(1), state(1))
    with pytest.raises(InputError, match=r"No space left on device.*step 1, is intact; free space"):
        Store(root, 1).save(2, large(2), state(2))
    # Space runs out at every page of a file in turn.
    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_bsize
    for filler in range(free, 0, -4096):
        (small_disk / "filler").write_bytes(bytes(filler))
        with pytest.raises(InputError, match="No space left on device"):
            Store(root, 1).save(2, large(2), state(2))
        assert names(root) == ["step-00000001"]
    (small_disk / "filler").unlink()
    # What a killed attempt left may be all the space there is.
    (root / ".tmp-killed").mkdir()
    (root / ".tmp-killed" / "model.safetensors").write_bytes(bytes(free - 8192))
    save(root, 2, keep=1)
    assert names(root) == ["step-00000002"] and check(root) == 2
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(InputError, match=r"Read-only file system.*step 2, is intact"):
        save(root, 3)
    assert check(root) == 2


if __name__ == "__main__":
    torch.set_num_threads(1)
    task = crash_everywhere if sys.argv[2] == "crash" else endure
    task(Path(sys.argv[1]), int(sys.argv[3]))
