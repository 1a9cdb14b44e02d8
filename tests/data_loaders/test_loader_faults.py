"""What goes wrong underneath a loader surfaces: an error that says so, within seconds; or the right data all the same.

`InputError` ends a run, for another attempt would meet the same; `LoaderFailed` is followed by one.
"""

from __future__ import annotations

import functools
import itertools
import os
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_loaders import ffcv_loader, torch_loader
from data_loaders.augment import Request
from data_loaders.beton import Beton, sidecar_path
from data_loaders.ffcv_loader import FfcvImages
from data_loaders.pipelines import make_loader
from data_loaders.torch_loader import TorchImages
from robustscale.errors import InputError, LoaderFailed
from tests.data_loaders.hostile import NeverDecodes
from tests.data_loaders.loader_fixtures import noise_images, smooth_images, write

N = 24
SECONDS = 5.0
"""Until the error, from the moment of the fault; a time-out counts on top."""
slow = functools.partial(pytest.param, marks=pytest.mark.slow)
_fault: list[float] = [0.0]
"""When the fault came."""


@pytest.fixture(scope="module")
def jpgs(tmp_path_factory: pytest.TempPathFactory) -> Beton:
    return write(tmp_path_factory.mktemp("betons") / "jpg.beton", smooth_images([(30, 40)] * N), "jpg")


@pytest.fixture
def file(jpgs: Beton, tmp_path: Path) -> Path:
    """A copy to spoil."""
    path = tmp_path / "spoilt.beton"
    shutil.copy(jpgs.path, path)
    shutil.copy(sidecar_path(jpgs.path), sidecar_path(path))
    return path


def requests(at_third: Callable[[], Any] = lambda: None) -> Iterator[Request]:
    """Eight batches; `at_third` is called, in the thread that loads, before the third."""
    for k, rows in enumerate(np.arange(N).reshape(8, 3)):
        if k == 2:
            _fault[0] = time.monotonic()
            at_third()
        yield Request(rows, np.tile(np.array([0, 0, 30, 40]), (3, 1)))


def ffcv(beton: Beton, at_third: Callable[[], Any] = lambda: None, *, batch_size: int = 3) -> list[torch.Tensor]:
    images = FfcvImages(beton, (16, 16), batch_size, 1).images(requests(at_third))
    return [batch.clone() for batch in images]


def fails(run: Callable[[], Any], kind: type[Exception], message: str, within: float = SECONDS) -> None:
    _fault[0] = time.monotonic()
    with pytest.raises(kind, match=message) as caught:
        run()
    assert "\n" not in str(caught.value)
    assert time.monotonic() - _fault[0] < within
    assert not [thread for thread in threading.enumerate() if isinstance(thread, ffcv_loader.EpochIterator)]


@pytest.fixture(scope="module", autouse=True)
def _compiled(jpgs: Beton) -> None:
    """By the first test; what is measured here is not Numba's compiling."""
    ffcv(jpgs)


# In FFCV's thread


def raising(error: BaseException) -> Callable[[], None]:
    def do() -> None:
        raise error

    return do


@pytest.mark.parametrize(
    "error, message",
    [
        (
            ConnectionError("the storage is gone"),
            r"FFCV failed: ConnectionError\('the storage is gone'\); loader=torch",
        ),
        slow(OSError(5, "Input/output error"), r"FFCV failed: OSError\(5"),
        slow(MemoryError("no more"), "FFCV failed: MemoryError.*lower batch_size or image_size"),
        (SystemExit(1), r"FFCV failed: SystemExit\(1\)"),
        slow(GeneratorExit(), "FFCV failed: "),
    ],
)
def test_the_thread_fails(jpgs: Beton, error: BaseException, message: str) -> None:
    fails(lambda: ffcv(jpgs, raising(error)), LoaderFailed, message)


def test_the_thread_waits_for_ever(jpgs: Beton, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ffcv_loader, "TIMEOUT", 0.3)
    fails(
        lambda: ffcv(jpgs, lambda: time.sleep(1.0)),
        LoaderFailed,
        "FFCV gave no batch for 0 s; is its storage reachable",
    )


def operation(do: Callable[[], Any]) -> type[Any]:
    """The last operation of FFCV's pipeline, after `do`."""

    class Spoilt(ffcv_loader._Checked):
        def generate_code(self) -> Callable[..., Any]:
            check = super().generate_code()

            def spoilt(decoded: Any, memory: Any, boxes: Any) -> Any:
                _fault[0] = time.monotonic()
                do()
                return check(decoded, memory, boxes)

            spoilt.with_indices = True  # type: ignore[attr-defined]
            return spoilt

    return Spoilt


def test_an_operation_never_ends(jpgs: Beton, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first batch, even: as a decoder that a file has sent round in circles."""
    monkeypatch.setattr(ffcv_loader, "COMPILE_TIMEOUT", 0.3)
    monkeypatch.setattr(ffcv_loader, "_Checked", operation(lambda: time.sleep(1.0)))
    fails(lambda: ffcv(jpgs), LoaderFailed, "FFCV gave no batch for 0 s")


def test_an_operation_fails(jpgs: Beton, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ffcv_loader, "_Checked", operation(lambda: 1 // 0))
    fails(lambda: ffcv(jpgs), LoaderFailed, r"FFCV failed: ZeroDivisionError")


def test_an_operation_does_not_compile(jpgs: Beton, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ffcv_loader, "_decode", lambda *columns: None)
    fails(lambda: ffcv(jpgs), LoaderFailed, "FFCV failed: Typing")


def test_batches_that_do_not_fit_into_memory(jpgs: Beton) -> None:
    fails(lambda: ffcv(jpgs, batch_size=2**42), LoaderFailed, "FFCV failed: .*emory.*lower batch_size or image_size")


def test_no_more_open_files(jpgs: Beton) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        fails(lambda: ffcv(jpgs), LoaderFailed, "Too many open files")
        fails(lambda: Beton(jpgs.path), LoaderFailed, r"can't be opened \(Too many open files\)")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


# The file changes while it is read


def cut(path: Path) -> None:
    """Before the last row's image."""
    os.truncate(path, int(Beton(path)._tables.offsets[-1]))


def grow(path: Path) -> None:
    with path.open("ab") as appended:
        appended.write(b"more")


def overwrite(path: Path) -> None:
    """As `cp` does: the same file, with another's content of the same size."""
    path.write_bytes(path.read_bytes()[::-1])


CHANGES = {cut: "bytes instead of", grow: "bytes instead of", overwrite: "was written to while it was read"}


def by_ffcv(path: Path, change: Callable[[Path], None]) -> Any:
    return ffcv(Beton(path), lambda: change(path))


def by_ffcv_at_the_start(path: Path, change: Callable[[Path], None]) -> Any:
    beton = Beton(path)
    change(path)
    return ffcv(beton)


def by_torch(path: Path, change: Callable[[Path], None]) -> Any:
    return list(TorchImages(Beton(path), (16, 16), 0).images(requests(lambda: change(path))))


def by_resident(path: Path, change: Callable[[Path], None]) -> Any:
    beton = Beton(path)
    change(path)
    settings: dict[str, Any] = {"rank": 0, "world": 1, "device": torch.device("cpu"), "seed": 0, "shuffle": True}
    return make_loader("resident", beton, np.arange(N), batch_size=3, shards=1, image_size=16, **settings)


READERS = (by_ffcv, by_ffcv_at_the_start, by_torch, by_resident)
SHORTLY = {(cut, by_ffcv), (grow, by_ffcv_at_the_start), (overwrite, by_torch), (cut, by_resident)}


@pytest.mark.parametrize(
    "change, read",
    [pair if pair in SHORTLY else slow(*pair) for pair in itertools.product(CHANGES, READERS)],
)
def test_the_file_changes(
    file: Path, change: Callable[[Path], None], read: Callable[[Path, Callable[[Path], None]], Any]
) -> None:
    fails(lambda: read(file, change), LoaderFailed, f"{file}: .*{CHANGES[change]}")
    # The next attempt says what is wrong with it.
    fails(lambda: Beton(file).verify(), InputError, f"{file}: .*robustscale.prepare")


@pytest.mark.parametrize("read", [by_ffcv_at_the_start, slow(by_ffcv), slow(by_torch), slow(by_resident)])
def test_the_file_gets_another_name_or_none(
    file: Path, jpgs: Beton, tmp_path: Path, read: Callable[[Path, Callable[[Path], None]], Any]
) -> None:
    """A loader goes on with what was proved; whoever comes later meets the new file."""

    def replace(path: Path) -> None:
        other = write(tmp_path / "other.beton", noise_images([(30, 40)] * N, 3), "jpg")
        other.path.rename(path)
        sidecar_path(other.path).rename(sidecar_path(path))

    expected = read(jpgs.path, lambda path: None)
    for change in (replace, Path.unlink):
        shutil.copy(jpgs.path, file)
        shutil.copy(sidecar_path(jpgs.path), sidecar_path(file))
        got = read(file, change)
        if read is by_resident:
            got, expected = (
                [s.batch.x for s in one.epoch(0)] if hasattr(one, "epoch") else one for one in (got, expected)
            )
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


# torch's processes


def by_processes(beton: Beton, then: Callable[[int], Any]) -> Any:
    """`then` is given the process that decodes, after its first batch."""
    images = TorchImages(beton, (16, 16), 1)
    batches = images.images(requests())
    next(batches)
    then(images._loader._iterator._workers[0].pid)  # type: ignore[union-attr]
    return lambda: list(batches)


@pytest.mark.slow
def test_a_process_is_killed(jpgs: Beton) -> None:
    fails(
        by_processes(jpgs, lambda pid: os.kill(pid, signal.SIGKILL)),
        LoaderFailed,
        "torch loader failed: DataLoader worker",
    )


@pytest.mark.slow
def test_a_process_decodes_for_ever(jpgs: Beton, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_loader, "TIMEOUT", 20.0)
    monkeypatch.setattr(torch_loader, "_Images", NeverDecodes)
    images = TorchImages(jpgs, (16, 16), 1).images(requests())
    fails(lambda: next(images), LoaderFailed, r"timed out after 20\.0 seconds", within=30 + SECONDS)


@pytest.mark.slow
def test_a_process_starts_after_the_file_was_replaced(file: Path, tmp_path: Path) -> None:
    """The labels are of the file that was opened first."""
    beton = Beton(file)
    other = write(tmp_path / "other.beton", noise_images([(30, 40)] * N, 3), "jpg")
    other.path.rename(file)
    sidecar_path(other.path).rename(sidecar_path(file))
    run = lambda: list(TorchImages(beton, (16, 16), 1).images(requests()))  # noqa: E731
    fails(run, LoaderFailed, "torch loader failed: DataLoader worker", within=30)


# Images that can't be decoded


# OpenCV, by which torch's loader decodes, lets the second pass: the sums of the pages are what finds that.
UNDECODABLE = [("end missing", by_torch), ("no image", by_ffcv), slow("noise", by_ffcv), slow("end missing", by_ffcv)]


@pytest.mark.parametrize("damage, read", UNDECODABLE)
def test_an_image_cannot_be_decoded(file: Path, damage: str, read: Callable[..., Any]) -> None:
    beton = Beton(file)
    content, stored = bytearray(file.read_bytes()), beton.stored(7)
    start = int(beton._tables.offsets[7])
    scan = start + stored.index(b"\xff\xda") + 14
    end = start + len(stored)
    if damage == "end missing":
        content[end - 40 : end] = bytes(40)
    elif damage == "no image":
        content[scan:end] = (b"\xff\xd9" * len(stored))[: end - scan]
    else:
        content[scan - 12 : scan] = bytes(range(12))
    file.write_bytes(content)
    fails(lambda: read(file, lambda path: None), InputError, "row 7, field image.*the JPEG can't be decoded")
