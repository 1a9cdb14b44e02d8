"""Every file that we read, exchanged for a hostile one: nothing in it runs, and the answer is one line."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import itertools
import json
import os
import pickle
import resource
import shutil
import signal
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from data_loaders.beton import Beton, sidecar_path
from data_loaders.sources import open_source
from data_loaders.write import write
from robustscale.config import override
from robustscale.engine.folder import RunFolder
from robustscale.engine.manifest import MANIFEST
from robustscale.errors import InputError
from robustscale.models import model_file, pretrained
from robustscale.reports.finish import finish_run
from tests.engine.small import SPEC, small_run, train
from tests.security.payloads import CANARY, payloads

SECONDS = 20
"""That one reading may take on a busy machine; what hangs takes for ever."""


@pytest.fixture(scope="module")
def canary(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("canary") / "sang"
    # What asks for more memory fails by itself, and takes nobody else's.
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CANARY, str(path))
        resource.setrlimit(resource.RLIMIT_DATA, (8 * 2**30, before[1]))
        yield path
        resource.setrlimit(resource.RLIMIT_DATA, before)


@dataclass
class Place:
    """What there is to read: a trained run, its data, and a search."""

    run: Path
    search: Path
    data: Path
    model: Path
    detector: Path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    root = tmp_path_factory.mktemp("place")
    folder = RunFolder(root / "run")
    run = small_run(name="run", objective="natural", epochs=1, cluster={"workers": 1})
    folder.write_run(run)
    parts = {part: {"fingerprint": part} for part in ("train", "test")}
    folder.write("data.json", {"spec": SPEC._asdict(), "classes": list("0123456789"), "held_out": 12, **parts})
    _losses, _state, trainer = train(run, root=folder.checkpoints)
    folder.save_weights("last", trainer.network, epoch=1, step=trainer.step)
    folder.write("result.json", {"weights": "last"})
    model_file.save(root / "net.safetensors", folder.network("last"), run.model, folder.spec())
    shutil.copytree(folder.path, root / "search")
    few = dataclasses.replace(source := open_source("digits"), labels=source.labels[:20])
    write(few, root / "data" / "train.beton")
    return Place(folder.path, root / "search", root / "data", root / "net.safetensors", folder.path / "detector")


def door(module: str, *args: object) -> Callable[[], object]:
    """The command, in this process. No cluster answers it: one that has read all it needs says so."""

    def call() -> object:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [module, *map(str, args)])
            patch.setenv("RAY_ADDRESS", "127.0.0.1:1")
            return importlib.import_module(f"robustscale.{module}").main()

    return call


def _resume(place: Place) -> None:
    folder = RunFolder(place.run)
    train(folder.run(), root=folder.checkpoints)


def _checkpoint(place: Place) -> Path:
    return next(iter(sorted((place.run / "checkpoints").glob("step-*"))))


Entry = tuple[Path, Callable[[], object]]


def entries(place: Place) -> dict[str, Entry]:
    """Every way in: the file that is exchanged, and what reads it."""
    from robustscale.evaluation.certify import Kept
    from robustscale.evaluation.detector import load_detector
    from tune.ledger import Ledger
    from tune.storage import existing_storage

    run, out = place.run, place.run.parent / "out"
    doors = {
        "evaluate": door("evaluate", run),
        "certify": door("certify", run, "--sigma", "0.25"),
        "export": door("export", run, "--format", "safetensors", "--output", out / "x.safetensors"),
        "pseudo_label": door("pseudo_label", run, place.data, out / "more.beton"),
        "forensics": door("forensics", run, "--image", "none.png"),
        "frontier": door("frontier", "--mix", run, run, "--at", "0.5"),
        "interpolate": door("frontier", "--interpolate", run, run, "--at", "0,1"),
    }
    found: dict[str, Entry] = {
        f"{name} {file}": (run / file, call)
        for name, call in doors.items()
        for file in ("run.json", "data.json", "weights/last.safetensors", "result.json")
    }
    config = run.parent / "config"
    found |= {
        "pretrain --resume": (run / "run.json", door("pretrain", "--resume", run)),
        "pretrain --config YAML": (
            config.with_suffix(".yaml"),
            door("pretrain", "--config", config.with_suffix(".yaml"), "--print-config"),
        ),
        "pretrain --config JSON": (
            config.with_suffix(".json"),
            door("pretrain", "--config", config.with_suffix(".json"), "--print-config"),
        ),
        "frontier --resume": (place.search / "ledger.jsonl", door("frontier", "--resume", place.search)),
        "frontier --report": (place.search / "ledger.jsonl", door("frontier", "--report", place.search)),
        "ledger": (place.search / "ledger.jsonl", lambda: Ledger(place.search / "ledger.jsonl").records()),
        "optuna journal": (
            run.parent / "journal",
            lambda: existing_storage(str(run.parent / "journal")).get_all_studies(),
        ),
        "model file": (place.model, lambda: model_file.load(place.model)),
        "weights .pth": (run.parent / "w.pth", lambda: pretrained.read(run.parent / "w.pth", "")),
        "weights .safetensors": (
            run.parent / "w.safetensors",
            lambda: pretrained.read(run.parent / "w.safetensors", ""),
        ),
        "gallery": (run / "gallery.safetensors", lambda: finish_run(RunFolder(run))),
        "certificates": (run / "c.jsonl", lambda: Kept(run / "c.jsonl").read()),
        "detector": (place.detector, lambda: load_detector(place.detector, ("a",))),
        "sidecar": (sidecar_path(place.data / "train.beton"), lambda: Beton(place.data / "train.beton")),
        "beton": (place.data / "train.beton", lambda: Beton(place.data / "train.beton")),
        "source .pt": (run.parent / "x.pt", lambda: open_source(f"tensor:{run.parent / 'x.pt'}")),
        "source .npz": (run.parent / "x.npz", lambda: open_source(f"npz:{run.parent / 'x.npz'}")),
        "source .parquet": (run.parent / "x.parquet", lambda: open_source(f"parquet:{run.parent / 'x.parquet'}")),
    }
    return found


HARMLESS = {
    (f"pretrain --config {kind}", payload)
    for kind in ("YAML", "JSON")
    for payload in ("empty-object", "huge-network", "utf16")
} | {
    ("weights .safetensors", payload)
    for payload in ("dtype-other", "escape-name", "facts-list", "facts-missing", "many-names", "nul-name", "path-name")
}
"""No fields are the defaults, a network's size is judged where it is built, and UTF-16 is text. Names of tensors are
compared with the network's, never followed."""


def judge(entry: Entry, put: Callable[[Path], None], canary: Path) -> str | None:
    """What is wrong with how a payload was met, or None."""
    path, call = entry
    before = path.with_name(path.name + ".before")
    there = os.path.lexists(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if there:
        path.rename(before)
    try:
        put(path)
        return _outcome(call, canary, path)
    finally:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif os.path.lexists(path):
            path.unlink()
        if there:
            before.rename(path)


def _outcome(call: Callable[[], object], canary: Path, path: Path) -> str | None:
    try:
        with _limited(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read = call()
        # Of what grows by lines, a torn last one is left out: no records are no records.
        wrong = "" if read in ([], {}) else "was accepted"
    except InputError as error:
        text = str(error)
        # What it says must be of this file; else it was accepted, and something else was missing.
        accepted = not any(words in text for words in (str(path), str(path.parent), "model", "data.json", "ledger"))
        long = "\n" in text or len(text) > 2_000
        wrong = f"was accepted: {text[:200]}" if accepted else f"says {text[:300]!r}" if long else ""
    except TimeoutError:
        wrong = "hangs"
    except Exception as error:  # noqa: BLE001 (whatever it is, nobody has handled it)
        wrong = f"{type(error).__name__}: {error}"[:300]
    if canary.exists():
        canary.unlink()
        return f"RAN, and {wrong}"
    return wrong or None


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    def ring(number: int, frame: FrameType | None) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def listed(wrong: dict[str, str]) -> str:
    return "\n".join(f"{pair}: {said}" for pair, said in wrong.items())


def run_matrix(place: Place, canary: Path, step: int, first: int = 0) -> tuple[int, dict[str, str]]:
    """Every step-th pair of payload and entry; returns how many, and what went wrong."""
    pairs = list(itertools.product(entries(place).items(), payloads().items()))[first::step]
    wrong = {}
    for (entry, way_in), (payload, put) in pairs:
        said = judge(way_in, put, canary)
        if said is not None and not (said == "was accepted" and (entry, payload) in HARMLESS):
            wrong[f"{entry} < {payload}"] = said
    return len(pairs), wrong


def test_the_payloads_are_live(canary: Path) -> None:
    """Read carelessly, they do run."""
    from tests.security.payloads import gadgets

    for gadget in gadgets().values():
        pickle.loads(pickle.dumps(gadget))  # noqa: S301 (that is the point)
        assert canary.exists()
        canary.unlink()


def test_there_are_a_hundred(canary: Path) -> None:
    assert len(payloads()) >= 100


def test_what_is_sound_is_read(place: Place, canary: Path) -> None:
    """Else every hostile file would be refused for another reason."""
    for name in ("evaluate", "certify", "frontier"):
        _path, call = entries(place)[f"{name} run.json"]
        with pytest.raises(InputError, match=r"nothing answers at 127\.0\.0\.1:1"):
            call()
    assert model_file.load(place.model) is not None
    _resume(place)


def test_a_sample_of_the_matrix(place: Place, canary: Path) -> None:
    num, wrong = run_matrix(place, canary, 89)
    assert num >= 60
    assert not wrong, listed(wrong)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("part", range(8))
def test_every_payload_at_every_entry(part: int, place: Place, canary: Path) -> None:
    num, wrong = run_matrix(place, canary, 8, part)
    print(f"{num} pairs, {len(wrong)} wrong")
    assert not wrong, listed(wrong)


def _spoilt_checkpoint(place: Place, name: str, put: Callable[[Path], None], *, sealed: bool) -> Callable[[], object]:
    """The checkpoint with one of its files exchanged; `sealed`: and a manifest that bears it out."""
    folder = _checkpoint(place)

    def call() -> None:
        kept = folder.with_name("kept")
        shutil.copytree(folder, kept)
        try:
            (folder / name).unlink()
            put(folder / name)
            if sealed:
                seal(folder)
            _resume(place)
        finally:
            shutil.rmtree(folder)
            for path in (place.run / "checkpoints").glob("*corrupt*"):
                shutil.rmtree(path)
            kept.rename(folder)

    return call


def seal(folder: Path) -> None:
    """As anybody can who knows the format: a digest is no signature."""
    import hashlib

    from robustscale.engine.manifest import SCHEMA

    files = {}
    for path in sorted(folder.iterdir()):
        if path.name != MANIFEST:
            files[path.name] = [path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()]
    body = {"schema": SCHEMA, "step": int(folder.name.removeprefix("step-")), "parent": None, "files": files}
    digest = hashlib.sha256(json.dumps(body, indent=1).encode()).hexdigest()
    (folder / MANIFEST).write_bytes(json.dumps({**body, "digest": digest}, indent=1).encode())


SPOILT = ("MANIFEST.json", "state.json", "model.safetensors", "optimizer.safetensors")


def checkpoint_matrix(place: Place, canary: Path, step: int, first: int = 0) -> tuple[int, dict[str, str]]:
    """One that its manifest does not bear out, or whose state is no mapping, is passed over with a warning; any other
    is refused."""
    written = {name: put for name, put in payloads().items() if not name.startswith(("link", "sparse"))}
    pairs = [
        (name, payload, put, sealed)
        for name in SPOILT
        for payload, put in written.items()
        for sealed in (False, True)
        if not (sealed and (name == MANIFEST or payload in ("fifo", "socket", "folder", "dcp-folder")))
    ][first::step]
    wrong = {}
    for name, payload, put, sealed in pairs:
        said = _outcome(_spoilt_checkpoint(place, name, put, sealed=sealed), canary, _checkpoint(place) / name)
        # An optimizer that has taken no step has no tensors either.
        empty = name == "optimizer.safetensors" and payload in ("no-tensors", "facts-deep")
        anew = not sealed or name == "state.json" or empty
        if said is not None and not (said == "was accepted" and anew):
            wrong[f"{name}{' sealed' if sealed else ''} < {payload}"] = said
    return len(pairs), wrong


def test_a_sample_of_hostile_checkpoints(place: Place, canary: Path) -> None:
    num, wrong = checkpoint_matrix(place, canary, 71)
    assert num >= 8
    assert not wrong, listed(wrong)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("part", range(4))
def test_every_hostile_checkpoint(part: int, place: Place, canary: Path) -> None:
    num, wrong = checkpoint_matrix(place, canary, 4, part)
    print(f"{num} pairs, {len(wrong)} wrong")
    assert not wrong, listed(wrong)


def _state(place: Place) -> dict[str, Any]:
    return dict(json.loads((_checkpoint(place) / "state.json").read_text()))


LIES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "position names the network": lambda s: s["position"].update(network="gone"),
    "position names a method": lambda s: s["position"].update(fit="gone"),
    "position names a dunder": lambda s: s["position"].update(__class__="gone"),
    "position is text": lambda s: s["position"].update(step="7"),
    "position is negative": lambda s: s["position"].update(step=-7),
    "position is missing": lambda s: s["position"].clear(),
    "position is a list": lambda s: s.update(position=[1, 2]),
    "identity is missing": lambda s: s.pop("identity"),
    "identity is text": lambda s: s.update(identity="x"),
    "identity of other types": lambda s: s["identity"].update(data=7),
    "metrics are text": lambda s: s.update(metrics="x"),
    "optimizer is missing": lambda s: s.pop("optimizer"),
    "optimizer's groups are numbers": lambda s: s["optimizer"].update(param_groups=[1]),
    "optimizer's state is a list": lambda s: s["optimizer"].update(state=[1]),
    "callbacks are missing": lambda s: s.pop("callbacks"),
    "callbacks are text": lambda s: s.update(callbacks="x"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_checkpoint_that_lies_under_its_own_seal_is_refused(lie: str, place: Place, canary: Path) -> None:
    state = _state(place)
    LIES[lie](state)

    def put(path: Path) -> None:
        path.write_text(json.dumps(state, indent=1))

    assert _outcome(_spoilt_checkpoint(place, "state.json", put, sealed=True), canary, _checkpoint(place)) is None


LEDGERS: dict[str, list[dict[str, Any]]] = {
    "no header": [{"kind": "asked", "trial": "../../escaped", "number": 0}],
    "header without fields": [{"kind": "sweep"}],
    "header of other types": [{"kind": "sweep", "run": 7, "space": [], "settings": "x"}],
    "foreign class": [
        {
            "kind": "sweep",
            "run": {"model": {"name": "os.system"}},
            "space": {},
            "settings": {"objectives": ["sa", "ra"]},
        }
    ],
    "options of other types": [
        {"kind": "sweep", "run": {}, "space": {}, "settings": {}},
        {"kind": "options", "options": 3},
    ],
    "a kind that is a list": [{"kind": ["sweep"]}],
}


@pytest.mark.parametrize("which", LEDGERS)
@pytest.mark.parametrize("option", ["--resume", "--report"])
def test_a_ledger_that_lies_under_its_checksums_is_refused(which: str, option: str, place: Place, canary: Path) -> None:
    def put(path: Path) -> None:
        for record in LEDGERS[which]:
            body = json.dumps({"time": 0.0, **record}, separators=(",", ":")).encode()
            with path.open("ab") as file:
                file.write(b"%08x %s\n" % (zlib.crc32(body), body))

    ledger = place.search / "ledger.jsonl"
    assert judge((ledger, door("frontier", option, place.search)), put, canary) is None


def test_nothing_was_written_elsewhere(place: Place) -> None:
    assert not list(place.run.parent.rglob("*escaped*"))


def test_weights_cannot_ask_for_more_memory_than_they_have(place: Place) -> None:
    """A configuration of a network of 10^18 weights is refused before any is made."""
    folder = RunFolder(place.run)
    network = {"name": "wide_resnet", "depth": 28, "widen": 10**6}
    path = place.run / "run.json"
    before = path.read_text()
    try:
        folder.write_run(override(folder.run(), {"model": network}))
        with pytest.raises(InputError, match=r"model: no such network|not weights of this run's network"):
            folder.network("last")
    finally:
        path.write_text(before)
    assert torch.get_default_dtype() == torch.float32
