"""The checkpoint store. A checkpoint exists when its manifest verifies; nothing points to the latest.

    <root>/step-00000120/model.safetensors, optimizer.safetensors, ...   a file for each group of tensors
                         state.json                                      everything else
                         MANIFEST.json                                   size and SHA-256 of each; written last

All of it is written and synced in `<root>/.tmp-<uuid>/` and appears by one rename, so that a crash at any moment
leaves the old state or the new one. One process at a time writes to a store. Nothing is pickled.
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
import warnings
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from robustscale.engine.manifest import FILE, MANIFEST, Broken, Saved, folder_name, manifest, to_json, verify
from robustscale.engine.tensors import serialize
from robustscale.errors import Diverged, InputError
from robustscale.fields import require
from robustscale.types import State

_STEP = re.compile(r"step-([0-9]{8,18})")
_ASIDE = re.compile(r"\.corrupt-step-([0-9]{8,18})-[0-9a-f]{32}")


class Store:
    """The checkpoints of a run: the newest `keep` that verify."""

    def __init__(self, root: Path, keep: int) -> None:
        require(keep >= 1, f"keep: {keep} is below 1; without a checkpoint nothing can resume")
        self.root, self.keep = root, keep
        self._verified: dict[Path, list[tuple[str, int, int]]] = {}

    def save(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: State) -> Path:
        """Write a checkpoint, then drop older ones; a step that is there and verifies is left as it is.

        `state` holds JSON types. Raises Diverged for anything not finite, and InputError if the disk is full or may
        not be written; the checkpoints that were there are intact then.
        """
        folders = dict(self._folders())
        if step not in folders or not self._verifies(folders[step]):
            parent = next((s for s, folder in folders.items() if s != step and self._verifies(folder)), None)
            self._commit(step, parent, _contents(step, tensors, state))
        try:
            self._prune()
        except OSError as error:
            warnings.warn(
                f"{self.root}: old checkpoints cannot be removed ({error}); remove them by hand", stacklevel=2
            )
        return self.root / folder_name(step)

    def latest(self) -> Saved | None:
        """The highest step that verifies; warns of each above it. Raises InputError if another program made it."""
        saved, broken = None, []
        for _, folder in self._folders():
            try:
                saved = verify(folder)
                break
            except Broken as error:
                broken.append(f"checkpoint {folder} is not used: {error}")
        instead = "no other is left, training starts anew" if saved is None else f"{saved.path.name} is used instead"
        for message in broken:
            warnings.warn(f"{message}; {instead}", stacklevel=2)
        return saved

    def _folders(self) -> list[tuple[int, Path]]:
        """Steps and folders, newest first."""
        found = [(int(match[1]), path) for path in _folders_in(self.root) if (match := _STEP.fullmatch(path.name))]
        return sorted(((step, path) for step, path in found if path.name == folder_name(step)), reverse=True)

    def _verifies(self, folder: Path) -> bool:
        # Hashing costs a second for a few hundred MB: once is enough for a folder that nobody has touched since.
        touched = sorted((p.name, p.lstat().st_size, p.lstat().st_mtime_ns) for p in folder.iterdir())
        if self._verified.get(folder) != touched:
            try:
                verify(folder)
            except Broken:
                return False
            self._verified[folder] = touched
        return True

    def _commit(self, step: int, parent: int | None, files: Mapping[str, bytes]) -> None:
        final, staged = self.root / folder_name(step), self.root / f".tmp-{uuid.uuid4().hex}"
        self._drop_staged()
        try:
            staged.mkdir(parents=True)
            for name, data in files.items():
                _write(staged / name, data)
            _write(staged / MANIFEST, manifest(step, parent, files))
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
            self._drop_staged()

    def _drop_staged(self) -> None:
        """Remove what earlier attempts left unfinished: nothing of worth, and it may be what fills the disk."""
        for path in _folders_in(self.root):
            if path.name.startswith(".tmp-"):
                # A failure must not keep a checkpoint from being written, nor hide why it could not be.
                shutil.rmtree(path, ignore_errors=True)

    def _prune(self) -> None:
        folders = self._folders()
        kept = [step for step, folder in folders if self._verifies(folder)]
        oldest = kept[: self.keep][-1] if kept else 0
        for step, folder in folders:
            if step < oldest:
                # A folder that is half removed must not bear a checkpoint's name.
                folder.rename(self.root / f".tmp-{uuid.uuid4().hex}")
                self._verified.pop(folder, None)
        for path in _folders_in(self.root):
            aside = _ASIDE.fullmatch(path.name)
            if path.name.startswith(".tmp-") or (aside and int(aside[1]) < oldest):
                shutil.rmtree(path)


def _contents(step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: State) -> dict[str, bytes]:
    for group in tensors:
        require(FILE.fullmatch(f"{group}.json") is not None, f"group: {group!r} will not do; write it in a-z and '_'")
    files = {f"{group}.safetensors": serialize(named, f"step {step}: {group}") for group, named in tensors.items()}
    try:
        return {**files, "state.json": to_json(state)}
    except ValueError:
        raise Diverged(f"step {step}: the state holds a number that is not finite; such a state is not saved") from None


def _write(path: Path, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(fd, rest) :]
        os.fsync(fd)
    finally:
        os.close(fd)


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
