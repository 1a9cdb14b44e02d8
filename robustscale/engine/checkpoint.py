"""The checkpoint store. A checkpoint exists when its manifest verifies; nothing points to the latest.

    <root>/step-00000120/model.safetensors, optimizer.safetensors, ...   a file for each group of tensors
                         state.json                                      everything else
                         MANIFEST.json                                   size and SHA-256 of each; written last

All of it is written and synced in `<root>/.tmp-<uuid>/` and appears by one rename, so that a crash at any moment
leaves the old state or the new one. One thread of one process at a time saves; others may read meanwhile. Nothing is
pickled.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import shutil
import uuid
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from robustscale.engine.manifest import FILE, MANIFEST, Broken, File, Saved, folder_name, manifest, to_json, verify
from robustscale.engine.tensors import Parts, serialize
from robustscale.errors import Diverged, InputError
from robustscale.fields import require
from robustscale.types import State

_STEP = re.compile(r"step-([0-9]{8,18})")
_ASIDE = re.compile(r"\.corrupt-step-([0-9]{8,18})-[0-9a-f]{32}")


class Store:
    """The checkpoints of a run that verify: the newest `keep`, and the `keep_best` with the highest scores.

    One may be both. A score is a finite number `score` in the state; of equal ones the later is higher.
    """

    copied = False
    """Whether each machine has a copy of its own: of what is damaged where they come from, some may be sound."""

    def __init__(self, root: Path, keep: int, keep_best: int = 0) -> None:
        require(keep >= 1, f"keep: {keep} is below 1; without a checkpoint nothing can resume")
        require(keep_best >= 0, f"keep_best: {keep_best} is negative; 0 keeps the newest alone")
        self.root, self.keep, self.keep_best = root, keep, keep_best
        self._seen: dict[Path, tuple[list[tuple[str, int, int]], Saved]] = {}
        self._rooted = False

    def save(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: State) -> Path:
        """Write a checkpoint, then drop older ones; a step that is there and verifies is left as it is.

        `state` holds JSON types. The tensors must not change meanwhile: contiguous ones on the CPU are written from
        where they lie, others are copied first. Raises Diverged for anything not finite, and InputError if the disk is
        full or may not be written; the checkpoints that were there are intact then.
        """
        # Before, too: kills that always strike between the two would add a checkpoint each.
        self._tidy()
        folders = dict(self._folders())
        if step not in folders or not self._verified(folders[step]):
            parent = next((s for s, folder in folders.items() if s != step and self._verified(folder)), None)
            self._commit(step, parent, _contents(step, tensors, state))
            self._tidy()
        return self.root / folder_name(step)

    def latest(self, most: float = math.inf) -> Saved | None:
        """The highest step up to `most` that verifies; warns of each above it that does not. Raises InputError if
        another program made it."""
        while True:
            folders = self._folders()
            saved, broken = _first_sound((step, folder) for step, folder in folders if step <= most)
            # One that was pruned under the reader's eyes is not damaged: there is a newer one by now.
            if self._folders() == folders:
                break
        instead = "no other is left, training starts anew" if saved is None else f"{saved.path.name} is used instead"
        for message in broken:
            warnings.warn(f"{message}; {instead}", stacklevel=2)
        return saved

    def set_aside(self, above: int) -> None:
        """What is newer than the checkpoint that is gone on from: its steps will be taken, and saved, anew."""
        for step, folder in self._folders():
            if step > above:
                folder.rename(self.root / f".corrupt-{folder.name}-{uuid.uuid4().hex}")
                self._seen.pop(folder, None)

    def _folders(self) -> list[tuple[int, Path]]:
        """Steps and folders, newest first."""
        found = [(int(match[1]), path) for path in _folders_in(self.root) if (match := _STEP.fullmatch(path.name))]
        return sorted(((step, path) for step, path in found if path.name == folder_name(step)), reverse=True)

    def _verified(self, folder: Path) -> Saved | None:
        # Hashing costs a second for a few hundred MB: once is enough for a folder that nobody has touched since.
        try:
            touched = sorted((p.name, p.lstat().st_size, p.lstat().st_mtime_ns) for p in folder.iterdir())
        except OSError:
            touched = []  # what can't be listed is no checkpoint, or not ours to read: verify says which
        seen = self._seen.get(folder)
        if seen is None or not touched or seen[0] != touched:
            try:
                seen = self._seen[folder] = touched, verify(folder)
            except Broken:
                return None
        return seen[1]

    def _commit(self, step: int, parent: int | None, files: Mapping[str, Parts]) -> None:
        final, staged = self.root / folder_name(step), self.root / f".tmp-{uuid.uuid4().hex}"
        try:
            self._make_root()
            staged.mkdir()
            written = {name: _write(staged / name, parts) for name, parts in files.items()}
            _write(staged / MANIFEST, [manifest(step, parent, written)])
            _sync(staged)
            if os.path.lexists(final):
                final.rename(self.root / f".corrupt-{final.name}-{uuid.uuid4().hex}")
            staged.rename(final)
            _sync(self.root)
        except OSError as error:
            kept = "none was there before" if parent is None else f"the last good one, step {parent}, is intact"
            raise InputError(
                f"{self.root}: the checkpoint of step {step} cannot be written ({error.strerror}); {kept}; "
                "free space or make the folder writable, then start again under the same run name"
            ) from error
        finally:
            shutil.rmtree(staged, ignore_errors=True)

    def _make_root(self) -> None:
        """And sync the way to it: a folder whose entry is not on the disk is lost with all that is in it."""
        if self._rooted and self.root.is_dir():
            return
        self.root.mkdir(parents=True, exist_ok=True)
        device = self.root.stat().st_dev
        for parent in self.root.absolute().parents:
            if parent.stat().st_dev != device or not os.access(parent, os.R_OK):
                break
            _sync(parent)
        self._rooted = True

    def _tidy(self) -> None:
        try:
            self._prune()
        except OSError as error:
            warnings.warn(
                f"{self.root}: old checkpoints cannot be removed ({error}); remove them by hand", stacklevel=3
            )

    def _prune(self) -> None:
        """Remove what is not kept, and what earlier attempts left unfinished: that may be what fills the disk."""
        folders = self._folders()
        sound = [(step, saved) for step, folder in folders if (saved := self._verified(folder))]
        oldest = sound[: self.keep][-1][0] if sound else 0
        scored = [(score, step) for step, saved in sound if (score := _score(saved.state)) is not None]
        best = {step for _, step in sorted(scored, reverse=True)[: self.keep_best]}
        dropped = [folder for step, folder in folders if step < oldest and step not in best]
        if dropped:
            # Whoever renamed the newest may have been killed before this.
            _sync(self.root)
        for folder in dropped:
            # A folder that is half removed must not bear a checkpoint's name.
            folder.rename(self.root / f".tmp-{uuid.uuid4().hex}")
            self._seen.pop(folder, None)
        for path in _folders_in(self.root):
            aside = _ASIDE.fullmatch(path.name)
            if path.name.startswith(".tmp-") or (aside and int(aside[1]) < oldest):
                shutil.rmtree(path)


def _first_sound(folders: Iterable[tuple[int, Path]]) -> tuple[Saved | None, list[str]]:
    """The first that verifies, and what is wrong with those before it."""
    broken: list[str] = []
    for _, folder in folders:
        try:
            return verify(folder), broken
        except Broken as error:
            broken.append(f"checkpoint {folder} is not used: {error}")
    return None, broken


def size_of(step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: State) -> int:
    """Bytes of the checkpoint that `save` would write, to the byte but for the step of its parent."""
    sizes = {name: File(sum(map(len, parts)), "0" * 64) for name, parts in _contents(step, tensors, state).items()}
    return sum(file.size for file in sizes.values()) + len(manifest(step, None, sizes))


def _score(state: State) -> float | None:
    score = state.get("score")
    return score if isinstance(score, int | float) and abs(score) < math.inf else None


def _contents(step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: State) -> dict[str, Parts]:
    for group in tensors:
        require(FILE.fullmatch(f"{group}.json") is not None, f"group: {group!r} will not do; write it in a-z and '_'")
    files = {f"{group}.safetensors": serialize(named, f"step {step}: {group}") for group, named in tensors.items()}
    try:
        return {**files, "state.json": [to_json(state)]}
    except ValueError:
        raise Diverged(f"step {step}: the state holds a number that is not finite; such a state is not saved") from None


def _write(path: Path, parts: Parts) -> File:
    """Hashed as it is written: both let other threads run, and nothing is copied."""
    digest, size = hashlib.sha256(), 0
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        for part in parts:
            digest.update(part)
            size += len(part)
            rest = memoryview(part)
            while rest:
                rest = rest[os.write(fd, rest) :]
        os.fsync(fd)
    finally:
        os.close(fd)
    return File(size, digest.hexdigest())


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _folders_in(root: Path) -> list[Path]:
    try:
        return [Path(entry) for entry in os.scandir(root) if entry.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InputError(f"{root}: cannot be read ({error.strerror}); give a folder that this user may list") from None
