"""A run's folder: the one place that knows its layout."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, cast, get_args

import safetensors.torch
from torch import Tensor, nn

from robustscale.config import decode, encode
from robustscale.engine.checkpoint import Store
from robustscale.engine.lease import lease
from robustscale.engine.mirror import Mirror, MirroredStore
from robustscale.engine.remote import Unreachable, is_url
from robustscale.errors import InputError
from robustscale.models.network import as_spec, build, shapes
from robustscale.run import Run
from robustscale.types import DataSpec, Model
from robustscale.untrusted import (
    expanded,
    is_there,
    open_tensors,
    parse_json,
    read_json,
    read_tensors,
    require_printable,
)

Weights = Literal["best", "last"]
_SNAPSHOT = re.compile(r"epoch-(\d+)\.safetensors")
_RESTORE = "restore it from a copy"


class RunFolder:
    """run.json, data.json, metrics.jsonl, weights/, checkpoints/, result.json and what is drawn from them.

    It may be somebody else's: what is read from it is JSON and tensors, and no link in it may lead out of it.
    """

    def __init__(self, path: str | os.PathLike[str], copy: str = "") -> None:
        """`path` may be a URL: `self.path` is this machine's working copy of it then; see Mirror."""
        self.mirror = Mirror(os.fspath(path), copy) if is_url(path) else None
        place = path if self.mirror is None else self.mirror.local
        # Ray Train moves its workers to a folder of its own. Not Path.resolve, which raises where links go in a circle.
        self.path = Path(os.path.realpath(expanded(place)))
        self.where = str(self.path) if self.mirror is None else self.mirror.url
        """What a person is told, and what names the run on another machine."""
        self.metrics = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"
        self.evaluation = self.path / "evaluation"
        self.gallery = self.path / "gallery.safetensors"

    @classmethod
    def existing(cls, path: str | os.PathLike[str]) -> RunFolder:
        require_printable(path)
        folder = cls(path)
        folder.pull()
        if not is_there(folder.path / "run.json"):
            raise InputError(f"{path}: not a run's folder (it has no run.json); give the folder that pretrain printed")
        folder.require_whole()
        return folder

    def pull(self) -> None:
        """Of a URL: bring the working copy up to date, but for checkpoints. Raises InputError."""
        if self.mirror is not None:
            try:
                self.mirror.pull()
            except Unreachable as error:
                raise InputError(str(error)) from None

    def push(self) -> None:
        """Of a URL: what was written to the working copy goes there, but for checkpoints. Raises InputError."""
        if self.mirror is not None:
            self.mirror.insist(self.mirror.push)

    def require_usable(self) -> None:
        """Raise InputError for a URL that can't be read, written and removed from."""
        if self.mirror is not None:
            self.mirror.remote.require_usable()

    def has_checkpoint(self) -> bool:
        """Raises InputError where a URL can't be read."""
        if self.mirror is not None:
            try:
                return self.mirror.has_checkpoint()
            except Unreachable as error:
                raise InputError(str(error)) from None
        return any(self.checkpoints.glob("step-*"))

    def store(self, keep: int, keep_best: int) -> Store:
        if self.mirror is not None:
            return MirroredStore(self.mirror, self.checkpoints, keep, keep_best)
        return Store(self.checkpoints, keep, keep_best)

    def require_whole(self) -> None:
        """Raise InputError for a link, at the top or one folder below, that leads out of the folder: what is written to
        it would be written elsewhere."""
        for entry in [inner for outer in _entries(self.path) for inner in (outer, *_entries(outer))]:
            if entry.is_symlink() and not Path(os.path.realpath(entry)).is_relative_to(self.path):
                raise InputError(f"{entry}: a link that leads out of the run's folder; put there what it leads to")

    def read(self, name: str) -> Any:
        """A JSON file of the folder; raises InputError if it is missing or torn."""
        path = self.path / name
        try:
            return read_json(path, _RESTORE)
        except FileNotFoundError:
            raise InputError(f"{path}: missing; the run did not get so far, go on with --resume {self.where}") from None

    @contextlib.contextmanager
    def reading(self, name: str) -> Iterator[Any]:
        """A JSON file of the folder: where the block finds other fields in it than we write, InputError says so."""
        value = self.read(name)
        try:
            yield value
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{self.path / name}: not what is written there; {_RESTORE}") from error

    def write(self, name: str, value: Any) -> None:
        publish(self.path / name, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """For whoever trains the run. The lock goes with its process, however that ends."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.require_whole()
            file = (self.path / ".lock").open("a")
        except OSError as error:
            raise unwritable(self.path, error) from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"{self.path}: in training by another process; take another --run-name") from None
            with contextlib.nullcontext() if self.mirror is None else lease(self.mirror.remote):
                yield

    def run(self) -> Run:
        data = self.read("run.json")
        try:
            return decode(Run, data)
        except InputError as error:
            raise InputError(f"{self.path / 'run.json'}: {error}") from None

    def rollbacks(self) -> list[dict[str, Any]]:
        """Where training diverged and went back to its last checkpoint, in order."""
        if not (self.path / "rollbacks.json").exists():
            return []
        with self.reading("rollbacks.json") as rollbacks:
            return list(rollbacks)

    def reported_weights(self) -> Weights:
        """Those behind result.json."""
        result = self.read("result.json")
        weights = result.get("weights") if isinstance(result, dict) else None
        if weights not in get_args(Weights):
            raise InputError(f"{self.path / 'result.json'}: not what pretrain writes; {_RESTORE}")
        return cast(Weights, weights)

    def spec(self) -> DataSpec:
        data = self.read("data.json")
        try:
            return as_spec(data["spec"])
        except (LookupError, TypeError, ValueError):
            raise InputError(f"{self.path / 'data.json'}: not what pretrain writes; {_RESTORE}") from None

    def write_run(self, run: Run) -> None:
        self.write("run.json", encode(run))

    def weights_path(self, which: str) -> Path:
        """`which`: best, last, or the name of a snapshot."""
        return self.path / "weights" / f"{which}.safetensors"

    def snapshots(self) -> list[int]:
        """The epochs after which weights were kept (checkpoints.snapshots), in order."""
        found = map(_SNAPSHOT.fullmatch, (entry.name for entry in _entries(self.path / "weights")))
        return sorted(int(match[1]) for match in found if match is not None)

    def save_weights(self, which: str, network: nn.Module, **facts: object) -> None:
        """Weights and buffers under the network's own names; the facts go into the file's metadata."""
        tensors = {name: t.detach().contiguous().cpu() for name, t in network.state_dict().items()}
        # One key: safetensors writes several in random order, and equal weights should be equal files.
        publish(self.weights_path(which), safetensors.torch.save(tensors, {"facts": json.dumps(facts)}))

    def load_weights(self, which: str, network: nn.Module) -> dict[str, Any]:
        """Load into a network of this run's shape; returns the facts that were saved. Raises InputError."""
        tensors, facts = self._read_weights(which, network.state_dict())
        network.load_state_dict(tensors)
        return facts

    def network(self, which: str = "best", model: Model | None = None) -> nn.Module:
        """The trained network, in eval mode, on the CPU: [0, 1] images in, logits out. `model`: the run's, read at
        another operating point."""
        model, spec = model or self.run().model, self.spec()
        # A few lines of configuration can ask for any amount of memory; the weights must bear them out first.
        tensors, _ = self._read_weights(which, shapes(model, spec).state_dict())
        network = build(model, spec)
        network.load_state_dict(tensors)
        return network.eval()

    def _read_weights(self, which: str, like: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        path, wrong, remedy = self.weights_path(which), "not weights of this run's network", "restore the file"
        try:
            with open_tensors(path, remedy, wrong) as file:
                facts = parse_json((file.metadata() or {})["facts"], f"{path}: metadata", remedy)
                return read_tensors(file, like), dict(facts)
        except FileNotFoundError:
            raise InputError(f"{path}: missing; the run has no {which} weights yet") from None
        except (LookupError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{path}: {wrong} ({reason}); {remedy}") from None


def snapshot(epoch: int) -> str:
    """The name of the weights after so many epochs."""
    return f"epoch-{epoch:04d}"


def _entries(folder: Path) -> list[Path]:
    try:
        return [Path(entry) for entry in os.scandir(folder)] if folder.is_dir() and not folder.is_symlink() else []
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({error.strerror}); check its owner") from None


def publish(path: Path, content: bytes) -> None:
    """Write a file whole or not at all. Raises InputError if the disk is full or may not be written."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise unwritable(path, error) from error


def unwritable(path: Path, error: OSError) -> InputError:
    return InputError(f"{path}: cannot be written ({error.strerror or error}); free space or choose another --storage")
