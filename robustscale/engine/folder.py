"""A run's folder: the one place that knows its layout."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, cast, get_args

import safetensors
import safetensors.torch
from torch import nn

from robustscale.config import decode, encode
from robustscale.errors import InputError
from robustscale.models.network import build
from robustscale.run import Run
from robustscale.types import DataSpec

Weights = Literal["best", "last"]


class RunFolder:
    """run.json, data.json, metrics.jsonl, weights/, checkpoints/, result.json and what is drawn from them."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        # Ray Train moves its workers to a folder of its own.
        self.path = Path(path).expanduser().resolve()
        self.metrics = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"
        self.evaluation = self.path / "evaluation"
        self.gallery = self.path / "gallery.safetensors"

    @classmethod
    def existing(cls, path: str | os.PathLike[str]) -> RunFolder:
        folder = cls(path)
        if not (folder.path / "run.json").is_file():
            raise InputError(f"{path}: not a run's folder (it has no run.json); give the folder that pretrain printed")
        return folder

    def read(self, name: str) -> Any:
        """A JSON file of the folder; raises InputError if it is missing or torn."""
        path = self.path / name
        try:
            return json.loads(path.read_text())
        except FileNotFoundError:
            raise InputError(f"{path}: missing; the run did not get so far, go on with --resume {self.path}") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: not JSON ({error}); restore it from a copy") from None

    def write(self, name: str, value: Any) -> None:
        publish(self.path / name, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """For whoever trains the run. The lock goes with its process, however that ends."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = (self.path / ".lock").open("a")
        except OSError as error:
            raise unwritable(self.path, error) from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"{self.path}: in training by another process; take another --run-name") from None
            yield

    def run(self) -> Run:
        data = self.read("run.json")
        try:
            return decode(Run, data)
        except InputError as error:
            raise InputError(f"{self.path / 'run.json'}: {error}") from None

    def reported_weights(self) -> Weights:
        """Those behind result.json."""
        result = self.read("result.json")
        weights = result.get("weights") if isinstance(result, dict) else None
        if weights not in get_args(Weights):
            raise InputError(f"{self.path / 'result.json'}: not what pretrain writes; restore it from a copy")
        return cast(Weights, weights)

    def spec(self) -> DataSpec:
        data = self.read("data.json")
        try:
            fields = dict(data["spec"])
            return DataSpec(**{**fields, "mean": tuple(fields["mean"]), "std": tuple(fields["std"])})
        except (KeyError, TypeError, ValueError):
            raise InputError(f"{self.path / 'data.json'}: not what pretrain writes; restore it from a copy") from None

    def write_run(self, run: Run) -> None:
        self.write("run.json", encode(run))

    def weights_path(self, which: Weights) -> Path:
        return self.path / "weights" / f"{which}.safetensors"

    def save_weights(self, which: Weights, network: nn.Module, **facts: object) -> None:
        """Weights and buffers under the network's own names; the facts go into the file's metadata."""
        tensors = {name: t.detach().contiguous().cpu() for name, t in network.state_dict().items()}
        # One key: safetensors writes several in random order, and equal weights should be equal files.
        publish(self.weights_path(which), safetensors.torch.save(tensors, {"facts": json.dumps(facts)}))

    def load_weights(self, which: Weights, network: nn.Module) -> dict[str, Any]:
        """Load into a network of this run's shape; returns the facts that were saved. Raises InputError."""
        path = self.weights_path(which)
        try:
            with safetensors.safe_open(path, "pt") as file:
                facts = json.loads((file.metadata() or {})["facts"])
                network.load_state_dict({name: file.get_tensor(name) for name in sorted(file.keys())})
        except FileNotFoundError:
            raise InputError(f"{path}: missing; the run has no {which} weights yet") from None
        except (safetensors.SafetensorError, RuntimeError, KeyError, json.JSONDecodeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{path}: not weights of this run's network ({reason}); restore the file") from None
        return dict(facts)

    def network(self, which: Weights = "best") -> nn.Module:
        """The trained network, in eval mode, on the CPU: [0, 1] images in, logits out."""
        network = build(self.run().model, self.spec())
        self.load_weights(which, network)
        return network.eval()


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
