"""Thousands of spoilt files: refused in a line, or the data that was written; FFCV never crashes or hangs."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_loaders.beton import PAGE, Beton, sidecar_path
from data_loaders.verified import verify_once
from robustscale.errors import InputError
from tests.data_loaders.hostile import Victim, fuzz
from tests.data_loaders.loader_fixtures import noise_images, smooth_images, write

SIZES = [(30 + i, 40 - i) for i in range(12)]


@pytest.fixture(scope="module")
def victim() -> Iterator[Victim]:
    with contextlib.closing(Victim()) as victim:
        yield victim


@pytest.fixture
def originals(tmp_path: Path) -> dict[str, Beton]:
    return {
        "array": write(tmp_path / "array.beton", noise_images([(8, 8)] * 12, 1), "array"),
        "raw": write(tmp_path / "raw.beton", noise_images(SIZES, 3), "raw"),
        "jpg": write(tmp_path / "jpg.beton", smooth_images(SIZES), "jpg"),
    }


@pytest.mark.parametrize("count", [200, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(7200)])])
def test_spoilt_files(originals: dict[str, Beton], victim: Victim, tmp_path: Path, count: int) -> None:
    began = time.monotonic()
    tally = fuzz(originals, victim, tmp_path, count, seed=count)
    print(dict(tally.counts), f"{time.monotonic() - began:.0f} s, slowest proof {tally.slowest:.2f} s")
    assert not tally.failures, "\n".join(tally.failures[:20])
    # Each way to end is really met.
    for way in ("refused when opened", "refused by its pages", "accepted", "read by FFCV"):
        assert tally.counts[way] > count / 50, tally.counts


def test_cut_short_while_it_is_decoded(tmp_path: Path, victim: Victim) -> None:
    """The system ends the process, and nothing in it can help that; the next attempt says why, in a line."""
    file = write(tmp_path / "jpg.beton", smooth_images(SIZES), "jpg")
    assert "pixels" in victim.read(file.path)
    assert victim.read(file.path, cut_to=1 << 21) == {"died": "SIGBUS"}
    with pytest.raises(InputError, match=r"header, byte 16: .* a table at byte .* do not fit in 2,097,152 bytes"):
        Beton(file.path)


# Checksums of the pages


@pytest.fixture
def pages(tmp_path: Path) -> Beton:
    """Three pages and a half."""
    images = noise_images([(512, 512)] * 27, 3)
    file = write(tmp_path / "pages.beton", images, "raw")
    assert len(file.sidecar["pages"]) == -(-file.size // PAGE) > 3
    return file


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def test_a_flipped_bit_is_found_in_its_page(pages: Beton) -> None:
    flip(pages.path, 2 * PAGE + 12345)
    flip(pages.path, 3 * PAGE + 1)
    with pytest.raises(InputError, match="page 2, byte 16,777,216: not what was written") as caught:
        Beton(pages.path).verify()
    assert "\n" not in str(caught.value)


def test_a_sidecar_of_schema_1_is_read(pages: Beton) -> None:
    said = {key: value for key, value in pages.sidecar.items() if key != "pages"}
    said |= {"schema": 1, "sha256": hashlib.sha256(pages.path.read_bytes()).hexdigest()}
    sidecar_path(pages.path).write_text(json.dumps(said))
    Beton(pages.path).verify()
    flip(pages.path, 2 * PAGE + 12345)
    with pytest.raises(InputError, match=r"not what its sidecar's sha256 says.*robustscale\.prepare"):
        Beton(pages.path).verify()


def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are read whole from now on."""
    read: list[Path] = []
    verify = Beton.verify
    monkeypatch.setattr(Beton, "verify", lambda beton: (read.append(beton.path), verify(beton))[1])
    return read


def test_pages_are_read_once(pages: Beton, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    read = reads(monkeypatch)
    for _ in range(3):
        verify_once(Beton(pages.path))
    assert read == [pages.path]
    # Also where the time of the last write is set back.
    state = pages.path.stat()
    flip(pages.path, 2 * PAGE + 12345)
    os.utime(pages.path, ns=(state.st_atime_ns, state.st_mtime_ns))
    for _ in range(2):
        with pytest.raises(InputError, match="page 2"):
            verify_once(Beton(pages.path))
    flip(pages.path, 2 * PAGE + 12345)
    verify_once(Beton(pages.path))
    assert len(read) == 4


def test_pages_are_read_each_time_where_nothing_can_be_kept(
    pages: Beton, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    read = reads(monkeypatch)
    with caplog.at_level(logging.WARNING):
        verify_once(Beton(pages.path))
        verify_once(Beton(pages.path))
    assert len(read) == 2
    assert "no room to remember" in caplog.text


def test_a_gigabyte_takes_two_seconds(tmp_path: Path) -> None:
    """The processor's time, divided by its cores: the machine may be busy with something else."""
    file = write(tmp_path / "large.beton", noise_images([(512, 512)] * 120, 3), "raw")
    began = time.process_time()
    Beton(file.path).verify()
    seconds = (time.process_time() - began) / (file.size / 1e9)
    print(f"{seconds:.2f} s of a core for each GB")
    assert seconds < 2 * len(os.sched_getaffinity(0))
