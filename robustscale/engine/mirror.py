"""A run that is kept under a URL: a working copy on each machine that works on it, and what goes to and fro.

What lies under the URL is the run: a working copy is made equal to it before work begins, and what a killed process did
not push is not there. Objects can't be renamed, so a checkpoint exists there when its manifest does, which is pushed
last and removed first, and when it verifies. Names that begin with a dot, and the folders LOCAL, stay on their machine.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal

from torch import Tensor

from robustscale.engine.checkpoint import Store
from robustscale.engine.manifest import FILE, MANIFEST, Broken, verify
from robustscale.engine.remote import Found, Remote, Unreachable, name_in
from robustscale.errors import InputError
from robustscale.types import State
from robustscale.untrusted import expanded

Which = Literal["none", "all"]
"""Checkpoints to pull."""
PULLING = ".pulling"
"""A lock, which is there from the first pull on."""
LOCAL = ("ray", "stacks")
WRITER = "writer.json"
"""The attempt that may write checkpoints; see cluster.beats."""
EVERY = 30.0
"""Seconds between two looks at what there is to push."""
PATIENCE = 300.0
"""Seconds for which pushing a checkpoint is tried. Less than `cluster.hang`: the next one waits for it."""
_LAST = ("result.json", "trial.json")
"""They say that the rest is there."""
_STEP = re.compile(r"step-[0-9]{8,18}")


class Mirror:
    """Thread-safe. Methods raise Unreachable where they don't say otherwise."""

    def __init__(self, url: str, copy: str = "") -> None:
        """`copy`: names a working copy beside this machine's usual one."""
        name = name_in(url)
        if name in ("", ".", ".."):
            raise InputError(f"{url}: has no name of its own at its end; give the run's folder")
        self.url, self.remote = url, Remote(url)
        digest = hashlib.sha256(f"{copy}{url}".encode()).hexdigest()[:16]
        self.local = working_copies() / digest / name
        self._lock = threading.RLock()
        self._pulled: tuple[int, int] | None = None
        """Device and inode of the lock of this copy."""
        self._same: dict[str, Found] = {}
        """Files as they lay here when they were last equal to the URL's."""
        self._sealed: dict[str, bytes] = {}
        """The manifests of the checkpoints that are sound at the URL."""
        self._writer: bytes | None = None

    def pull(self, checkpoints: Which = "none") -> None:
        """Make the working copy equal to what lies under the URL. Where another process works in it, only what is
        missing is added."""
        with self._lock, self._flock(PULLING):
            self._pull(checkpoints)

    def push(self) -> None:
        """Files that were written here since they were last equal, and the removal of those that were removed here.
        Raises InputError where all of them were."""
        with self._lock:
            self._require_whole()
            here = {name: stamp for name, path in self._files() if (stamp := _stamp(path)) is not None}
            for name in sorted(here, key=lambda name: (name in _LAST, name)):
                if self._same.get(name) != here[name]:
                    self._push_file(name, here[name])
            for name in sorted(self._same.keys() - here.keys()):
                self._require_whole()  # it may be being removed right now
                self.remote.remove(name)
                del self._same[name]

    def push_checkpoints(self) -> None:
        """Make the checkpoints under the URL equal to those here, and the files with them: the metrics up to a
        checkpoint must not be missing beside it. Raises InputError if it can't be done within PATIENCE, or if another
        attempt has begun."""
        self.insist(self._push_checkpoints)

    def insist(self, push: Callable[[], None]) -> None:
        """Try until it is done; raises InputError after PATIENCE."""
        begun, told = time.monotonic(), False
        while True:
            try:
                return push()
            except Unreachable as error:
                if time.monotonic() - begun > PATIENCE:
                    raise InputError(f"{error}; tried for {PATIENCE:g} s; {self.local} has what is missing") from None
                if not told:
                    warnings.warn(f"{error}; trying for {PATIENCE:g} s", stacklevel=2)
                told = True
            time.sleep(min(5.0, PATIENCE / 10))

    def has_checkpoint(self) -> bool:
        return any(MANIFEST in files for files in _steps(self.remote.list("checkpoints")).values())

    @contextlib.contextmanager
    def working(self, checkpoints: Which, pushes: bool) -> Iterator[None]:
        """For a rank: pulls first, and keeps others on this machine from overwriting what it works on. `pushes`: files
        are pushed while it works, and at its end."""
        with contextlib.ExitStack() as stack:
            with self._lock, self._flock(PULLING):
                self._pull(checkpoints)
                stack.enter_context(self._flock(".working", fcntl.LOCK_SH))
                self._writer = _content(self.local / WRITER)
            if not pushes:
                yield
                return
            ended = threading.Event()
            thread = threading.Thread(target=self._push_on, args=(ended,), name="mirror", daemon=True)
            thread.start()
            try:
                yield
            finally:
                ended.set()
                thread.join()
            self.insist(self.push)

    def _push_on(self, ended: threading.Event) -> None:
        while not ended.wait(EVERY):
            with contextlib.suppress(Unreachable, InputError):  # told where a checkpoint, or the end, can't be pushed
                self.push()

    def _require_whole(self) -> None:
        """Raises InputError where the working copy was removed under our feet, as by one who clears caches: what is
        missing here must not be taken for removed by the run."""
        if self._pulled is not None and self._pulled != self._copy():
            raise InputError(
                f"{self.local}: this working copy of {self.url} was removed while it was in use; what lies there is as "
                "it was; the same command goes on from it"
            )

    def _copy(self) -> tuple[int, int] | None:
        """Another process that pulls makes another one, whose files come one by one."""
        try:
            found = (self.local / PULLING).stat()
        except FileNotFoundError:
            return None
        return found.st_dev, found.st_ino

    def _push_file(self, name: str, stamp: Found) -> None:
        path = self.local / name
        try:
            self.remote.upload(path, name)
        except FileNotFoundError:
            return
        self._same[name] = stamp
        there = self.remote.found(name)
        if there is None or there.mtime_ns is None or there.size != stamp.size:
            return
        # As the other side tells the time, so that the next pull sees at once that they are equal. Of the file that is
        # open: one that takes its name meanwhile, of the same size perhaps, must not pass for it.
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
            if _found(os.fstat(file.fileno())) == stamp:
                os.utime(file.fileno(), ns=(there.mtime_ns, there.mtime_ns))
                self._same[name] = there

    def _pull(self, checkpoints: Which) -> None:
        self._pulled = self._copy()
        alone = self._alone()
        found = {name: at for name, at in self.remote.list().items() if _mirrored(name)}
        files = {name: at for name, at in found.items() if not _in_checkpoints(name)}
        for name, at in files.items():
            stamp = _stamp(self.local / name)
            if stamp != at and (alone or stamp is None):
                self._fetch(name, self.local / name, at)
        for name, path in self._files():
            if alone and name not in files:
                path.unlink()
        self._same = {name: stamp for name in files if (stamp := _stamp(self.local / name)) is not None}
        if checkpoints != "none":
            self._pull_checkpoints([name for name in found if _in_checkpoints(name)], alone)

    def _pull_checkpoints(self, names: list[str], alone: bool) -> None:
        steps = _steps(names)
        self._sealed = {}
        for step in sorted(steps, key=_number, reverse=True):
            self._pull_checkpoint(step, steps[step], alone)
        for path in _entries(self.local / "checkpoints") if alone else []:
            if path.name.startswith(".pull-") or (_STEP.fullmatch(path.name) and path.name not in steps):
                shutil.rmtree(path)

    def _pull_checkpoint(self, step: str, files: list[str], alone: bool) -> None:
        """One that does not verify is pulled, too: the store tells of it, and uses the one before it."""
        folder = self.local / "checkpoints" / step
        try:
            seal = self.remote.read(f"checkpoints/{step}/{MANIFEST}")
            equal = _content(folder / MANIFEST) == seal and _sound(folder)
            if not equal and (alone or not folder.exists()):
                self._fetch_checkpoint(folder, files)
        except FileNotFoundError:  # pruned meanwhile
            return
        if _sound(folder):
            self._sealed[step] = seal

    def _fetch_checkpoint(self, folder: Path, files: list[str]) -> None:
        staged = folder.with_name(f".pull-{secrets.token_hex(8)}")
        try:
            with _writing_to(staged):
                staged.mkdir(parents=True)
            for file in files:
                with _writing_to(staged / file):
                    self.remote.download(f"checkpoints/{folder.name}/{file}", staged / file)
            if folder.exists():
                shutil.rmtree(folder)
            staged.rename(folder)
        finally:
            shutil.rmtree(staged, ignore_errors=True)

    def _fetch(self, name: str, path: Path, at: Found) -> None:
        beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        try:
            with _writing_to(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                self.remote.download(name, beside)
                if at.mtime_ns is not None:
                    os.utime(beside, ns=(at.mtime_ns, at.mtime_ns))
                beside.replace(path)
        except FileNotFoundError:  # removed meanwhile
            return
        finally:
            beside.unlink(missing_ok=True)

    def _push_checkpoints(self) -> None:
        with self._lock:
            self._require_writer()
            self.push()
            there = _steps(self.remote.list("checkpoints"))
            here = {path.name: path for path in _entries(self.local / "checkpoints") if _STEP.fullmatch(path.name)}
            for step, folder in sorted(here.items()):
                seal = _content(folder / MANIFEST)
                if seal is not None and seal != self._sealed.get(step) and _sound(folder):
                    self._push_checkpoint(step, folder, seal, there.get(step, []))
            for step in there.keys() - here.keys():
                self._require_whole()
                self._remove_checkpoint(step, there[step])

    def _push_checkpoint(self, step: str, folder: Path, seal: bytes, there: list[str]) -> None:
        at = f"checkpoints/{step}"
        if there:
            self._remove_checkpoint(step, there)
        for path in sorted(_entries(folder)):
            if path.name != MANIFEST:
                self.remote.upload(path, f"{at}/{path.name}")
        self._require_writer()
        self.remote.write(f"{at}/{MANIFEST}", seal)
        self._sealed[step] = seal

    def _remove_checkpoint(self, step: str, files: list[str]) -> None:
        self._sealed.pop(step, None)
        for file in sorted(files, key=lambda file: file != MANIFEST):
            self.remote.remove(f"checkpoints/{step}/{file}")
        self.remote.remove_folder(f"checkpoints/{step}")

    def _require_writer(self) -> None:
        try:
            there = self.remote.read(WRITER)
        except FileNotFoundError:
            return
        if self._writer is not None and there != self._writer:
            raise InputError(f"{self.url}: another attempt has begun to write here; this one ends, let that one go on")

    def _files(self) -> list[tuple[str, Path]]:
        """What may be pushed, by name: regular files, no links."""
        found = []
        for folder, folders, files in os.walk(self.local):
            above = Path(folder).relative_to(self.local)
            folders[:] = [name for name in folders if _mirrored((above / name).as_posix())]
            names = [(above / name).as_posix() for name in files]
            found += [(name, self.local / name) for name in names if _mirrored(name) and not _in_checkpoints(name)]
        return [(name, path) for name, path in found if path.is_file() and not path.is_symlink()]

    def _alone(self) -> bool:
        with (self.local / ".working").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

    @contextlib.contextmanager
    def _flock(self, name: str, kind: int = fcntl.LOCK_EX) -> Iterator[None]:
        with _writing_to(self.local):
            self.local.mkdir(parents=True, exist_ok=True)
            file = (self.local / name).open("a")
        with file:
            fcntl.flock(file, kind)
            yield


class MirroredStore(Store):
    """A checkpoint is saved when it lies under the URL."""

    copied = True

    def __init__(self, mirror: Mirror, root: Path, keep: int, keep_best: int = 0) -> None:
        super().__init__(root, keep, keep_best)
        self.mirror = mirror

    def save(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: State) -> Path:
        path = super().save(step, tensors, state)
        self.mirror.push_checkpoints()
        return path


def working_copies() -> Path:
    """Where the working copies of this machine lie."""
    return expanded(os.environ.get("ROBUSTSCALE_MIRRORS") or "~/.cache/robustscale/mirrors")


def _mirrored(name: str) -> bool:
    """Whether a name is of the run. Objects may have any name, also `../x`."""
    parts = name.split("/")
    return parts[0] not in LOCAL and not any(part == "" or part.startswith(".") for part in parts)


def _in_checkpoints(name: str) -> bool:
    return name.startswith("checkpoints/")


def _steps(names: Iterable[str]) -> dict[str, list[str]]:
    """The files of each step, by its folder's name."""
    steps: dict[str, list[str]] = {}
    for name in names:
        step, _, file = name.removeprefix("checkpoints/").partition("/")
        if _STEP.fullmatch(step) and (file == MANIFEST or FILE.fullmatch(file)):
            steps.setdefault(step, []).append(file)
    return steps


def _number(step: str) -> int:
    return int(step.rpartition("-")[2])


def _sound(folder: Path) -> bool:
    try:
        verify(folder)
    except Broken:
        return False
    return True


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _stamp(path: Path) -> Found | None:
    try:
        return _found(path.lstat())
    except FileNotFoundError:
        return None


def _found(stat: os.stat_result) -> Found:
    return Found(stat.st_size, stat.st_mtime_ns)


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


@contextlib.contextmanager
def _writing_to(path: Path) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, Unreachable):
        raise
    except OSError as error:
        remedy = "free space, or set ROBUSTSCALE_MIRRORS to a folder that may be written"
        raise InputError(f"{path}: cannot be written ({error.strerror or error}); {remedy}") from error
