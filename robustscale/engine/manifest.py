"""What makes a folder a checkpoint: a manifest that names each file's size and SHA-256, and files that bear it out.

The manifest has one spelling and holds its own digest, so that no change to it goes unseen. A digest tells damage
from content; it does not tell who wrote it, so what is read is still only JSON and safetensors.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
from torch import Tensor

from robustscale.errors import InputError
from robustscale.types import State

SCHEMA = 1
MANIFEST = "MANIFEST.json"
FILE = re.compile(r"[a-z_]+\.(safetensors|json)")
_KEYS = {"schema", "step", "parent", "files", "digest"}
_LARGEST = 2**20


class Broken(Exception):
    """A folder does not verify; the message names the file and what is wrong with it."""


class File(NamedTuple):
    size: int
    sha256: str


@dataclass(frozen=True)
class Saved:
    """A checkpoint that verified."""

    path: Path
    step: int
    state: State
    files: Mapping[str, File]

    @property
    def mark(self) -> int:
        """48 bits of its files' digests: tells checkpoints of one step apart."""
        return int(_digest(to_json(self.files))[:12], 16)

    def tensors(self, group: str, device: str = "cpu") -> dict[str, Tensor]:
        """A group as it was saved. Verified once more, as this may be long after `latest`; raises InputError."""
        name = f"{group}.safetensors"
        if name not in self.files:
            raise InputError(f"{self.path}: has no {name}, only {', '.join(self.files)}; take another run name")
        try:
            tensors = safetensors.torch.load(_read_verified(self.path / name, self.files[name]))
        except (Broken, safetensors.SafetensorError) as error:
            raise InputError(f"{self.path}: {error}; remove this folder to use the checkpoint before it") from None
        return {key: tensor.to(device) for key, tensor in tensors.items()}


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def to_json(value: Any) -> bytes:
    """Raises ValueError for a number that is not finite."""
    return json.dumps(value, indent=1, allow_nan=False).encode()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _seal(body: Mapping[str, Any]) -> bytes:
    return to_json({**body, "digest": _digest(to_json(body))})


def manifest(step: int, parent: int | None, files: Mapping[str, File]) -> bytes:
    """The manifest of these files; `parent` is the step of the checkpoint before this one."""
    return _seal({"schema": SCHEMA, "step": step, "parent": parent, "files": files})


def verify(folder: Path) -> Saved:
    """Read and check the whole of a checkpoint; raises Broken, or InputError if it is sound but of another format."""
    raw = _read(folder / MANIFEST)
    try:
        body = dict(json.loads(raw))
        body.pop("digest", None)
        sealed = raw == _seal(body)
    except (TypeError, ValueError, RecursionError):
        raise Broken(f"{MANIFEST} is damaged") from None
    foreign = body.keys().isdisjoint(_KEYS) and not (folder / "state.json").exists()
    # What bears a right digest is not damaged.
    if foreign or (sealed and body.get("schema") != SCHEMA):
        raise InputError(
            f"{folder}: made by another program or version (schema {body.get('schema')!r}, not {SCHEMA}); "
            "go on with the one that made it, or take another run name"
        )
    try:
        files = {name: File(*entry) for name, entry in body["files"].items()}
        step, right = body["step"], sealed and folder.name == folder_name(body["step"]) and "state.json" in files
    except (KeyError, TypeError, ValueError, AttributeError):
        right = False
    if not right or not all(map(FILE.fullmatch, files)):
        raise Broken(f"{MANIFEST} is damaged, or of another checkpoint")
    for name, file in files.items():
        _check(folder / name, file)
    try:
        state = dict(json.loads(_read_verified(folder / "state.json", files["state.json"])))
    except (TypeError, ValueError, RecursionError):
        raise Broken("state.json is no mapping") from None
    return Saved(folder, step, state, files)


def _check(path: Path, file: File) -> None:
    """Raises Broken; holds no more than a piece of the file."""
    with _opened(path, file.size) as content:
        _compare(path, file, hashlib.file_digest(content, "sha256").hexdigest())


def _read_verified(path: Path, file: File) -> bytes:
    data = _read(path, file.size)
    _compare(path, file, _digest(data))
    return data


def _compare(path: Path, file: File, digest: str) -> None:
    if digest != file.sha256:
        raise Broken(f"{path.name} is damaged: its content is not what was saved")


def _read(path: Path, size: int | None = None) -> bytes:
    with _opened(path, size) as content:
        return content.read()


@contextlib.contextmanager
def _opened(path: Path, size: int | None) -> Iterator[BufferedReader]:
    """A regular file of this size, or a manifest; raises Broken, also for what fails while it is read."""
    try:
        found = path.lstat()
        # Before opening: a link may lead out of the folder, a pipe waits for ever, a wrong size may fill the memory.
        if not stat.S_ISREG(found.st_mode):
            raise Broken(f"{path.name} is not a regular file")
        if found.st_size > _LARGEST if size is None else found.st_size != size:
            raise Broken(f"{path.name} has {found.st_size} bytes" + f", not {size}" * (size is not None))
        with path.open("rb") as content:
            yield content
    except PermissionError:
        # No damage: to go on without it would throw the run's progress away.
        raise InputError(f"{path}: may not be read; give this user access to the checkpoints") from None
    except OSError as error:
        raise Broken(f"{path.name} cannot be read ({error.strerror})") from None
