"""Hostile files: what somebody may have put in the place of a file that we read."""

from __future__ import annotations

import io
import json
import os
import pickle
import socket
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

Put = Callable[[Path], None]
"""Puts a payload at a path, where nothing is."""

CANARY = "ROBUSTSCALE_CANARY"
"""Names, in the environment, the file that a payload makes if it is run."""


class Gadget:
    """Unpickled, it makes the canary's file."""

    def __init__(self, call: Callable[..., Any], *args: Any) -> None:
        self.call, self.args = call, args

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call, self.args


def gadgets() -> dict[str, Gadget]:
    import subprocess

    touch = f"__import__('pathlib').Path(__import__('os').environ['{CANARY}']).touch()"
    return {
        "system": Gadget(os.system, f'touch "${CANARY}"'),
        "popen": Gadget(subprocess.getoutput, f'touch "${CANARY}"'),
        "eval": Gadget(eval, touch),
        "exec": Gadget(exec, touch),
        "touch": Gadget(Path.touch, Path(os.environ[CANARY])),
    }


def pickles() -> Iterator[tuple[str, bytes]]:
    for name, gadget in gadgets().items():
        for protocol in range(6):
            yield f"pickle-{protocol}-{name}", pickle.dumps({"model": gadget, "step": 1}, protocol)
        for zipped in (True, False):
            file = io.BytesIO()
            torch.save({"weight": gadget}, file, _use_new_zipfile_serialization=zipped)
            yield f"torch-{'zip' if zipped else 'legacy'}-{name}", file.getvalue()
        array = np.array([gadget], dtype=object)
        file = io.BytesIO()
        np.save(file, array, allow_pickle=True)
        yield f"npy-{name}", file.getvalue()
        file = io.BytesIO()
        np.savez(file, images=array, labels=array, train_images=array)
        yield f"npz-{name}", file.getvalue()


def _tensors(header: Any, body: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def _entry(shape: list[Any], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def tensors() -> Iterator[tuple[str, bytes]]:
    """safetensors whose header lies."""
    deep = b'{"__metadata__": {"facts": "' + b"[" * 100_000 + b'"}}'
    facts = {"facts": json.dumps({"epoch": 1, "step": 1})}
    one = _entry([1], 0, 4)
    yield from {
        "header-longer-than-file": _tensors(b"{}", length=2**20),
        "header-2^63": _tensors(b"{}", length=2**63),
        "header-101-MB": _tensors(b"{}" + b" " * 100, length=101 * 10**6),
        "header-empty": _tensors(b""),
        "header-list": _tensors(b"[1]"),
        "header-cut": _tensors(b'{"a": {'),
        "header-not-utf8": _tensors(b'{"\xff": 1}'),
        "header-deep": _tensors(b"[" * 50_000),
        "facts-deep": _tensors(deep),
        "facts-list": _tensors({"__metadata__": {"facts": "[1]"}, "a": one}, b"0000"),
        "facts-number": _tensors({"__metadata__": {"facts": 5}, "a": one}, b"0000"),
        "facts-missing": _tensors({"__metadata__": {"other": "{}"}, "a": one}, b"0000"),
        "no-tensors": _tensors({"__metadata__": facts}),
        "overlapping": _tensors({"a": one, "b": _entry([1], 2, 6)}, b"000000"),
        "hole": _tensors({"a": one, "b": _entry([1], 8, 12)}, b"0" * 12),
        "backwards": _tensors({"a": _entry([1], 4, 0)}, b"0000"),
        "negative-offset": _tensors({"a": _entry([1], -4, 0)}, b"0000"),
        "negative-shape": _tensors({"a": _entry([-1], 0, 4)}, b"0000"),
        "float-shape": _tensors({"a": _entry([0.5], 0, 4)}, b"0000"),
        "dtype-unknown": _tensors({"a": _entry([1], 0, 4, "PICKLE")}, b"0000"),
        "dtype-other": _tensors({"__metadata__": facts, "a": _entry([4], 0, 4, "U8")}, b"0000"),
        "billions": _tensors({"a": _entry([2**40], 0, 2**42)}, b"0000"),
        "overflow": _tensors({"a": _entry([2**33, 2**33], 0, 4)}, b"0000"),
        "path-name": _tensors({"__metadata__": facts, "../../escaped": one}, b"0000"),
        "nul-name": _tensors({"__metadata__": facts, "a\0b": one}, b"0000"),
        "escape-name": _tensors({"__metadata__": facts, "\x1b[31m\u202e\n": one}, b"0000"),
        "many-names": _tensors({"__metadata__": facts, **{f"t{i}": _entry([0], 0, 0) for i in range(20_000)}}),
        "trailing": _tensors({"a": one}, b"0" * 64),
    }.items()


def _spec(**changes: int) -> bytes:
    spec = {"channels": 1, "height": 8, "width": 8, "classes": 10, "mean": [0.5], "std": [1.0], **changes}
    return json.dumps({"spec": spec}).encode()


def jsons() -> Iterator[tuple[str, bytes]]:
    yield from {
        "deep-list": b"[" * 200_000 + b"]" * 200_000,
        "deep-dict": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
        "100-deep": b'{"model":' * 100 + b"{}" + b"}" * 100,
        "long-number": b'{"epochs": ' + b"9" * 100_000 + b"}",
        "huge-float": b'{"epochs": 1e999, "spec": {"channels": 1e999}}',
        "nan": b'{"epochs": NaN, "spec": {"channels": NaN, "mean": [Infinity]}}',
        "null": b"null",
        "number": b"7",
        "text": b'"run.json"',
        "list": b"[[1, 2], 3]",
        "empty-object": b"{}",
        "duplicates": b'{"name": "a", "name": {"name": "b"}}',
        "not-utf8": b'{"name": "\xff\xfe"}',
        "utf16": '{"name": "a"}'.encode("utf-16"),
        "surrogate": b'{"name": "\\ud800"}',
        "nul": b'{"name": "a\\u0000b", "data": {"root": "\\u0000"}}',
        "escapes": b'{"\\u001b[31m\\u202e\\n": 1}',
        "class": b'{"model": {"name": "os.system"}, "objective": {"name": "subprocess:Popen"}}',
        "dunder": b'{"__class__": "os.system", "__reduce__": ["os.system", ["id"]]}',
        "huge-network": b'{"model": {"name": "basic", "channels": 1000000000000, "hidden": 1000000000}}',
        "huge-spec": _spec(height=2**32),
        "many-classes": _spec(classes=10**10),
        "odd-spec": b'{"spec": {"channels": "1", "height": [], "width": {}, "classes": null, "mean": 3, "std": "x"}}',
        "odd-parts": b'{"train": 3, "test": [], "spec": null, "weights": {"best": 1}, "held_out": "x", "classes": 5}',
    }.items()


def others() -> Iterator[tuple[str, bytes]]:
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", bytes(50 * 2**20))
    yield "zip-bomb", bomb.getvalue()
    yield "empty", b""
    yield "newline", b"\n"
    yield "nuls", bytes(4096)
    yield "elf", b"\x7fELF" + bytes(range(256))


def _link(target: str) -> Put:
    return lambda path: path.symlink_to(target)


def _metadata_folder(path: Path) -> None:
    """As torch.distributed.checkpoint writes one: its metadata is a pickle."""
    path.mkdir()
    (path / ".metadata").write_bytes(pickle.dumps(gadgets()["touch"]))
    (path / "__0_0.distcp").write_bytes(pickle.dumps(gadgets()["system"]))


def _socket(path: Path) -> None:
    # The name of a socket may have 107 characters, and a test's folder has more.
    here = Path.cwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as s:
            s.bind(path.name)
    finally:
        os.chdir(here)


def _sparse(size: int) -> Put:
    def put(path: Path) -> None:
        with path.open("wb") as file:
            file.truncate(size)

    return put


def not_files() -> Iterator[tuple[str, Put]]:
    yield "fifo", os.mkfifo
    yield "socket", _socket
    yield "folder", Path.mkdir
    yield "dcp-folder", _metadata_folder
    yield "link-to-zeros", _link("/dev/zero")
    yield "link-to-random", _link("/dev/urandom")
    yield "link-to-tty", _link("/dev/tty")
    yield "link-to-passwd", _link("/etc/passwd")
    yield "link-to-itself", lambda path: path.symlink_to(path.name)
    yield "link-to-nothing", _link("nowhere/at/all")
    yield "link-to-folder", _link("..")
    yield "sparse-1-TB", _sparse(2**40)


def _bytes(content: bytes) -> Put:
    return lambda path: path.write_bytes(content) and None


def payloads() -> dict[str, Put]:
    """All of them, by name. The environment must name the canary."""
    written = [*pickles(), *tensors(), *jsons(), *others()]
    return {**{name: _bytes(content) for name, content in written}, **dict(not_files())}
