"""The weights that a run starts from: looked up where they are, kept in the run's own folder.

A copy is there from before the first step, so that workers on other machines need no other storage, and nothing is
missing where the run goes on after the file, or the run that it is of, is gone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch

from robustscale.config import decode, encode
from robustscale.engine.folder import RunFolder, publish
from robustscale.errors import InputError
from robustscale.models import pretrained
from robustscale.models.transfer import Start, Transfer
from robustscale.run import Run
from robustscale.types import Model
from robustscale.untrusted import expanded, is_there, open_tensors, parse_json

START = "start"
"""Of weights/start.safetensors."""


def pinned(transfer: Transfer) -> Transfer:
    """With the whole path, and with the whole SHA-256 of the file. Raises InputError for another file, and, where no
    digits are known that the file's copy could be told by, for a missing one."""
    if transfer.weights is None:
        return transfer
    path = expanded(transfer.weights).absolute()
    digest = transfer.sha256
    if is_there(path) or digest == "":
        with _naming():
            digest = pretrained.digest_of(path, digest)
    return dataclasses.replace(transfer, weights=str(path), sha256=digest)


def tuned(run: Run, weights: Path) -> Run:
    """The run, from these weights on; where it leaves mean and std to its data, those that the weights expect."""
    transfer = pinned(dataclasses.replace(run.transfer, weights=str(weights)))
    found, data = _read(weights, transfer.sha256).normalisation(), run.data
    if found is not None and data.mean == "dataset":
        data = dataclasses.replace(data, mean=found[0])
    if found is not None and data.std == "dataset":
        data = dataclasses.replace(data, std=found[1])
    return dataclasses.replace(run, transfer=transfer, data=data)


class Source(NamedTuple):
    """The run whose weights another starts from."""

    run: Run
    train_path: Path
    train_fingerprint: str
    test_path: Path
    test_fingerprint: str
    classes: tuple[str, ...]
    left_out: dict[str, Any] | None = None
    """Which training images it left out, as data.json has it."""
    before: tuple[Source, ...] = ()
    """Those that its own weights come from, the newest first."""

    @classmethod
    def of(cls, run: Run, files: Mapping[str, Any]) -> Source:
        """`files`: as data.json has them."""
        places = [value for part in ("train", "test") for value in (files[part]["path"], files[part]["fingerprint"])]
        train, train_fingerprint, test, test_fingerprint = map(str, places)
        classes = tuple(map(str, files["classes"]))
        left_out = files["train"].get("left_out")
        return cls(run, Path(train), train_fingerprint, Path(test), test_fingerprint, classes, left_out)

    def fingerprints(self) -> dict[str, Any]:
        """As data.json has them."""
        train = {"fingerprint": self.train_fingerprint, "left_out": self.left_out}
        return {"train": train, "test": {"fingerprint": self.test_fingerprint}}


def model_of(weights: Path) -> Model | None:
    """The network that they are of: of the run in whose folder they lie, or as export wrote it down; else None."""
    source = _run_of(weights)
    if source is not None:
        return source.run().model
    if weights.suffix != ".safetensors":
        return None
    with open_tensors(weights, "give another file") as file:
        described = (file.metadata() or {}).get("model")
    if described is None:
        return None
    return decode(Model, parse_json(described, f"{weights}: metadata", "export it anew"))  # type: ignore[type-abstract]


def bring(run: Run, folder: RunFolder) -> Source | None:
    """Put the weights into the run's folder, unless they are there; what they are of, where that is known. Raises
    InputError where they cannot be read."""
    if run.transfer.weights is None:
        return None
    path, weights = folder.weights_path(START), Path(run.transfer.weights)
    if not is_there(path) or not _same(run, _facts(path)):
        start, source = _read(weights, run.transfer.sha256), _run_of(weights)
        facts: dict[str, Any] = {"from": str(weights), "classes": start.classes}
        facts["sha256"] = pretrained.digest_of(weights, run.transfer.sha256)
        if source is not None:
            facts |= {"run": encode(source.run()), "data": source.read("data.json"), "before": _facts_before(source)}
        tensors = {name: t.contiguous() for name, t in start.tensors.items()}
        # One key: safetensors writes several in random order, and equal weights should be equal files.
        publish(path, safetensors.torch.save(tensors, {"facts": json.dumps(facts)}))
    return source_of(folder)


def read_start(run: Run, folder: RunFolder) -> Start:
    """What the run starts from: the copy in its folder, or where there is none, as in a trial of a search, the file."""
    path, weights = folder.weights_path(START), str(run.transfer.weights)
    if not is_there(path):
        return _read(Path(weights), run.transfer.sha256)
    facts = _facts(path)
    if not _same(run, facts):
        raise InputError(f"{path}: not a copy of {weights}; take another --run-name")
    with open_tensors(path, _REMEDY) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    classes = facts.get("classes")
    return Start(tensors, None if classes is None else tuple(map(str, classes)), str(facts.get("from", weights)))


def source_of(folder: RunFolder) -> Source | None:
    """What the run in this folder started from; None where that is not known."""
    path = folder.weights_path(START)
    facts = _facts(path) if is_there(path) else {}
    if "run" not in facts:
        return None
    try:
        return _source(facts)._replace(before=tuple(_source(each) for each in facts.get("before", ())))
    except (LookupError, TypeError, AttributeError, InputError) as error:
        raise InputError(f"{path}: not a copy that was made here ({error}); {_REMEDY}") from None


def _source(facts: dict[str, Any]) -> Source:
    return Source.of(decode(Run, facts["run"]), facts["data"])


def _facts_before(source: RunFolder) -> list[dict[str, Any]]:
    """Run and data of every run that this one's weights come from, the newest first, as far as they are known."""
    path = source.weights_path(START)
    facts = _facts(path) if is_there(path) else {}
    return [{"run": facts["run"], "data": facts["data"]}, *facts.get("before", [])] if "run" in facts else []


_REMEDY = "remove it, and put the file that the run starts from back where it was"


def _facts(path: Path) -> dict[str, Any]:
    with open_tensors(path, _REMEDY) as file:
        facts = parse_json((file.metadata() or {}).get("facts", "null"), f"{path}: metadata", _REMEDY)
    if not isinstance(facts, dict) or not isinstance(facts.get("sha256"), str):
        raise InputError(f"{path}: not a copy that was made here; {_REMEDY}")
    return facts


def _same(run: Run, facts: dict[str, Any]) -> bool:
    digest: str = facts["sha256"]
    return digest.startswith(run.transfer.sha256.lower())


def _read(weights: Path, digest: str) -> Start:
    with _naming():
        tensors = pretrained.read(weights, digest)
    source, classes = _run_of(weights), None
    if source is not None:
        with source.reading("data.json") as data:
            classes = tuple(map(str, data["classes"]))
    return Start(tensors, classes, str(weights))


def _run_of(weights: Path) -> RunFolder | None:
    """The folder of the run whose weights these are, where the file still lies in it."""
    folder = weights.absolute().parent.parent
    of_run = weights.parent.name == "weights" and is_there(folder / "run.json") and is_there(folder / "data.json")
    return RunFolder.existing(folder) if of_run else None


@contextlib.contextmanager
def _naming() -> Iterator[None]:
    try:
        yield
    except InputError as error:
        raise InputError(f"transfer.{error}") from None
