"""Writing: byte for byte what FFCV alone writes, whole or not at all, and once however many ask for it."""

from __future__ import annotations

import json
import logging
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from data_loaders import layout
from data_loaders.beton import Beton, sidecar_path
from data_loaders.encode import ARRAY_PAGE, IMAGE_PAGE, Encoder
from data_loaders.plan import Format, resize
from data_loaders.sources.base import Source
from data_loaders.write import ensure, relabel, write
from robustscale.errors import InputError
from robustscale.run import Data

Digits = tuple[NDArray[np.uint8], NDArray[np.int64]]
MakeSource = Callable[..., Source]


@pytest.fixture
def small(make_source: MakeSource, digits: Digits) -> Source:
    return make_source(list(digits[0]), digits[1])


@pytest.fixture
def large(make_source: MakeSource, photographs: list[NDArray[np.uint8]]) -> Source:
    return make_source(photographs, np.arange(6))


@pytest.mark.parametrize("format_", ["array", "jpg", "raw"])
def test_the_bytes_are_ffcvs(format_: Format, small: Source, large: Source, tmp_path: Path) -> None:
    """FFCV's own writer, with one process, makes the same file; so what FFCV reads is what it would have written."""
    from ffcv.fields import IntField, NDArrayField, RGBImageField
    from ffcv.writer import DatasetWriter

    source = small if format_ == "array" else large
    field = NDArrayField(np.dtype("u1"), (8, 8, 1)) if format_ == "array" else RGBImageField(format_, jpeg_quality=85)
    page = ARRAY_PAGE if format_ == "array" else IMAGE_PAGE
    writer = DatasetWriter(str(tmp_path / "ffcv"), {"image": field, "label": IntField()}, page, num_workers=1)
    writer.from_indexed_dataset(source)
    write(source, tmp_path / "ours.beton", format=format_, quality=85)
    assert (tmp_path / "ours.beton").read_bytes() == (tmp_path / "ffcv").read_bytes()


def test_more_than_a_page(make_source: MakeSource, tmp_path: Path) -> None:
    images = [np.full((512, 512, 3), i, np.uint8) for i in range(5)]
    sidecar = write(make_source(images, np.arange(5)), tmp_path / "pages.beton", format="array")
    beton = Beton(tmp_path / "pages.beton")
    assert sidecar["size"] > 3 * ARRAY_PAGE
    assert all((beton.image(i) == i).all() for i in range(5))


def test_the_number_of_threads_changes_nothing(large: Source, tmp_path: Path) -> None:
    one = write(large, tmp_path / "one.beton", format="mixed")
    four = write(large, tmp_path / "four.beton", format="mixed", workers=4)
    assert one == four
    assert (tmp_path / "one.beton").read_bytes() == (tmp_path / "four.beton").read_bytes()


def test_auto(small: Source, large: Source, make_source: MakeSource, digits: Digits, tmp_path: Path) -> None:
    out = tmp_path / "out.beton"
    assert write(small, out)["format"] == "array"
    assert write(large, out)["format"] == "jpg"
    unequal = make_source([digits[0][0], digits[0][1][:, :5]], np.arange(2))
    assert write(unequal, out)["format"] == "jpg"
    assert Beton(out).image(1).shape == (8, 5, 3)


def test_grey_among_colour(make_source: MakeSource, digits: Digits, tmp_path: Path) -> None:
    """Grey stays one channel only where all are; FFCV's image field has three."""
    grey, colour = digits[0][0], np.repeat(digits[0][1], 3, axis=2) // 2
    for images in ([grey, colour], [colour, grey]):
        sidecar = write(make_source(images, np.arange(2)), tmp_path / "out.beton")
        beton = Beton(tmp_path / "out.beton")
        assert (sidecar["format"], sidecar["channels"]) == ("array", 3)
        assert all(np.array_equal(beton.image(i), np.broadcast_to(images[i], (8, 8, 3))) for i in range(2))
    write(make_source([grey], np.arange(1)), tmp_path / "out.beton", format="raw")
    assert np.array_equal(Beton(tmp_path / "out.beton").image(0), np.repeat(grey, 3, axis=2))


def test_resolution_is_of_the_shorter_side(photographs: list[NDArray[np.uint8]]) -> None:
    image = photographs[0][:90, :60]
    assert np.array_equal(resize(image, 30), cv2.resize(image, (30, 45), interpolation=cv2.INTER_AREA))
    assert resize(image, 61) is image
    assert resize(image[..., :1], 30).shape == (45, 30, 1)
    assert np.array_equal(resize(image, 30, square=True), resize(image, 30)[7:37])
    assert resize(image, 100, square=True).shape == (100, 100, 3)
    assert resize(image[:, :1], 30).shape == (90, 1, 3)


def test_arrays_are_cut_square(large: Source, tmp_path: Path) -> None:
    sidecar = write(large, tmp_path / "out.beton", resolution=32, format="array")
    assert (sidecar["height"], sidecar["width"], sidecar["resolution"]) == (32, 32, 32)
    expected = resize(large.image(1), 32, square=True)
    assert np.array_equal(Beton(tmp_path / "out.beton").image(1), expected)


def spoilt(source: Source, *rows: int) -> Source:
    def image(i: int) -> NDArray[np.uint8]:
        if i in rows:
            raise InputError(f"file {i}.jpg: can't be decoded")
        return source.image(i)

    return replace(source, image=image)


def test_bad_images_are_named_or_left_out(small: Source, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = tmp_path / "out.beton"
    with pytest.raises(InputError, match=r"file 3.jpg: can't be decoded"):
        write(spoilt(small, 3), out)
    assert list(tmp_path.iterdir()) == []
    with caplog.at_level(logging.WARNING):
        sidecar = write(spoilt(small, 0, 3, 29), out, skip_bad=True, workers=2)
    assert (sidecar["skipped"], sidecar["num_examples"]) == (3, 27)
    assert {f"left out: file {i}.jpg: can't be decoded" for i in (0, 3, 29)} == set(caplog.messages)
    kept = [i for i in range(30) if i not in (0, 3, 29)]
    assert np.array_equal(Beton(out).labels, small.labels[kept])
    assert np.array_equal(Beton(out).images(range(27)), np.stack([small.image(i) for i in kept]))
    with pytest.raises(InputError, match="none of its 30 images can be read"):
        write(spoilt(small, *range(30)), out, skip_bad=True)


BAD_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "format": ({"format": "png"}, "format: 'png' is none of auto, array"),
    "resolution": ({"resolution": 0}, "resolution: 0 is below 1"),
    "quality": ({"quality": 101}, "quality: 101 is outside"),
    "workers": ({"workers": 0}, "workers: 0 is below 1"),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_bad_options(name: str, small: Source, tmp_path: Path) -> None:
    options, pattern = BAD_OPTIONS[name]
    with pytest.raises(InputError, match=pattern):
        write(small, tmp_path / "out.beton", **options)


def test_bad_images_and_labels(make_source: MakeSource, tmp_path: Path, digits: Digits) -> None:
    out, image = tmp_path / "out.beton", digits[0][0]
    good = np.zeros((70, 70, 3), np.uint8)
    cases: list[tuple[list[Any], list[int], dict[str, Any], str]] = [
        ([image, image], [0, 10], {}, "row 1: label 10 is outside the 10 classes 0..9"),
        ([image, image], [-1, 0], {"skip_bad": True}, "row 0: label -1 is outside"),
        ([image / 2], [0], {}, "row 0: float64 of shape"),
        ([image[..., 0]], [0], {}, "not a grey or RGB image"),
        ([image[:0]], [0], {}, "not a grey or RGB image"),
        ([np.zeros((2, 70_000, 3), np.uint8)], [0], {}, "row 0: 2 x 70000 is too large; give a resolution"),
        ([good, good[:50]], [0, 1], {"format": "array"}, "row 1: 50 x 70 pixels, but the first image has 70 x 70"),
        (
            [np.zeros((2000, 1500, 3), np.uint8)],
            [0],
            {"format": "raw"},
            "row 0: an image of 9,000,000 bytes; .*resolution",
        ),
    ]
    for images, labels, options, pattern in cases:
        with pytest.raises(InputError, match=pattern):
            write(make_source(images, np.array(labels)), out, **options)
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match="none of its 0 images"):
        write(make_source([], np.zeros(0, int)), out, format="jpg")
    with pytest.raises(InputError, match=r"call the file out.beton"):
        write(make_source([image], np.zeros(1, int)), tmp_path / "out.ffcv")


def test_a_full_disk_leaves_what_was_there(small: Source, tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk: a write fails, at first in part."""
    out = tmp_path / "out.beton"
    before = write(small, out)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (0, 100, ARRAY_PAGE + 10, 2 * ARRAY_PAGE + 5):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(InputError, match=r"out.beton: can't be written \(.*check the disk's space"):
                write(small, out, quality=50)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert sorted(p.name for p in tmp_path.iterdir()) == ["out.beton", "out.beton.json"]
        assert Beton(out).sidecar == before


def test_a_disk_that_was_full_for_a_moment(tmp_path: Path) -> None:
    """FFCV takes no notice of a page of which only a part was written, and would put the next one in its place."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Encoder(tmp_path / "out.beton", 5, (1024, 1024, 1)) as encoder:
        resource.setrlimit(resource.RLIMIT_FSIZE, (ARRAY_PAGE + 10, hard))
        try:
            for label in range(3):  # two fill a page
                encoder.add(bytes(1024 * 1024), label, layout.RAW, 1024, 1024)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        for label in range(3, 5):
            encoder.add(bytes(1024 * 1024), label, layout.RAW, 1024, 1024)
        with pytest.raises(OSError, match="No space left"):
            encoder.finish()


def shared_memory() -> list[str]:
    """What this process has of it, by name."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [line.split(maxsplit=5)[5] for line in lines if "/dev/shm/psm_" in line]


def test_shared_memory_is_given_back(small: Source, tmp_path: Path) -> None:
    seen: list[str] = []
    looking = replace(small, image=lambda i: (seen.extend(shared_memory()), small.image(i))[1])
    write(looking, tmp_path / "out.beton")
    # Without a name even in the meantime, so that no end of the process leaves it behind.
    assert seen and all(name.endswith("(deleted)") for name in seen)
    assert shared_memory() == []
    # The error's traceback holds on to the writer.
    with pytest.raises(InputError, match=r"file 20\.jpg") as error:
        write(spoilt(looking, 20), tmp_path / "out.beton")
    assert shared_memory() == []
    assert error.traceback


@pytest.mark.slow
def test_writing_leaves_torchs_threads_alone() -> None:
    program = "import torch; torch.set_num_threads(3); import data_loaders.encode; print(torch.get_num_threads())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "3\n"


def test_a_folder_that_cannot_be_written_to(small: Source, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"can't be written \(.*permissions"):
        write(small, tmp_path / "file" / "out.beton")
    (tmp_path / "folder.beton").mkdir()
    with pytest.raises(InputError, match="can't be written"):
        write(small, tmp_path / "folder.beton")


def dies_at(operation: int, folder: Path, do: Callable[[], object]) -> bool:
    """Run `do` in a process that dies at the given file operation within `folder`; whether it came to that."""
    child = os.fork()
    if child == 0:
        seen = 0

        def watch(event: str, args: tuple[Any, ...]) -> None:
            nonlocal seen
            if event in ("open", "os.rename", "os.remove", "os.truncate") and str(args[0]).startswith(str(folder)):
                seen += 1
                if seen == operation:
                    os._exit(9)

        sys.addaudithook(watch)
        do()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def test_dying_anywhere_leaves_the_old_the_new_or_nothing(small: Source, tmp_path: Path) -> None:
    """The new file has the same labels and sizes: only the pixels tell it from the old."""
    inverted = replace(small, spec="inverted", image=lambda i: 255 - small.image(i))
    folder = tmp_path / "data"
    out = folder / "out.beton"
    outcomes = set()
    for operation in range(1, 100):
        old = write(small, out)
        died = dies_at(operation, folder, lambda: write(inverted, out))
        try:
            beton = Beton(out)
            beton.verify()
            outcomes.add(beton.sidecar["source"])
            assert (beton.sidecar == old) == (beton.sidecar["source"] == "made")
        except InputError as error:
            outcomes.add("sidecar" if "sidecar out.beton.json is missing" in str(error) else str(error))
        for left_over in folder.glob(".*.tmp"):
            left_over.unlink()
        if not died:
            break
    assert operation > 5
    assert outcomes == {"made", "inverted", "sidecar"}


def test_progress(small: Source, make_source: MakeSource, digits: Digits, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    many = make_source([digits[0][i % 30] for i in range(250)], np.zeros(250, int))
    write(many, tmp_path / "out.beton", progress=lambda done, total: told.append((done, total)))
    assert told == [(100, 250), (200, 250), (250, 250)]


# ensure


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if not p.name.endswith(".lock"))


def test_ensure_prepares_once(tmp_path: Path) -> None:
    data = Data(source="digits", root=str(tmp_path))
    train, test = ensure(data)
    assert (train, test) == (tmp_path / "digits-train.beton", tmp_path / "digits-test.beton")
    assert (len(Beton(train)), len(Beton(test))) == (1437, 360)
    written = train.stat().st_mtime_ns
    assert ensure(data) == (train, test)
    assert train.stat().st_mtime_ns == written


def test_ensure_by_many_at_once(tmp_path: Path) -> None:
    def child() -> None:
        told: list[int] = []
        train, test = ensure(Data(source="digits", root=str(tmp_path)), progress=lambda done, _: told.append(done))
        Beton(train).verify()
        Beton(test).verify()
        os._exit(7 if told else 0)

    children = []
    for _ in range(4):
        children.append(os.fork())
        if children[-1] == 0:
            child()
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    assert sorted(codes) == [0, 0, 0, 7]
    assert names(tmp_path) == [
        "digits-test.beton",
        "digits-test.beton.json",
        "digits-train.beton",
        "digits-train.beton.json",
    ]


def test_ensure_mends_what_a_crash_left(tmp_path: Path) -> None:
    data = Data(source="digits", root=str(tmp_path))
    train, test = ensure(data)
    sidecar_path(train).unlink()
    os.truncate(test, 1000)
    (tmp_path / ".digits-train.beton.0123abcd.tmp").write_bytes(b"half")
    ensure(data)
    Beton(train).verify()
    Beton(test).verify()
    assert len(names(tmp_path)) == 4


def test_ensure_takes_a_folder_of_prepared_files(small: Source, tmp_path: Path) -> None:
    data = Data(source=str(tmp_path), root=str(tmp_path / "never"))
    write(small, tmp_path / "train.beton")
    with pytest.raises(InputError, match=r"test.beton: No such file"):
        ensure(data)
    write(small, tmp_path / "test.beton")
    assert ensure(data) == (tmp_path / "train.beton", tmp_path / "test.beton")
    assert not (tmp_path / "never").exists()
    write(replace(small, classes=(*small.classes, "eleven")), tmp_path / "test.beton")
    with pytest.raises(InputError, match="10 classes to train on, 11 to test on"):
        ensure(data)


def save_npz(path: Path, digits: Digits, *splits: str) -> Data:
    path.mkdir(exist_ok=True)
    for split in splits:
        np.savez(path / f"{split}.npz", x=digits[0], y=digits[1])
    return Data(source=f"npz:{path}", root=str(path.parent / "root"))


def test_ensure_without_a_test_split(digits: Digits, tmp_path: Path) -> None:
    data = save_npz(tmp_path / "set", digits, "train")
    with pytest.raises(InputError, match="no split 'test'; it has train"):
        ensure(data)
    save_npz(tmp_path / "set", digits, "val")
    assert Beton(ensure(data)[1]).sidecar["split"] == "val"


def test_ensure_sees_that_a_source_has_changed(digits: Digits, tmp_path: Path) -> None:
    data = save_npz(tmp_path / "set", digits, "train", "test")
    before = ensure(data)[0]
    assert before.name.startswith("npz-set-")
    np.savez(tmp_path / "set" / "train.npz", x=255 - digits[0], y=digits[1])
    after = ensure(data)[0]
    assert np.array_equal(Beton(after).image(0), 255 - Beton(before).image(0))


def test_ensure_where_nothing_can_be_kept(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"set data.root to a folder that can be written to"):
        ensure(Data(source="digits", root=str(tmp_path / "file")))


def test_the_sidecar_is_plain_json(small: Source, tmp_path: Path) -> None:
    sidecar = write(small, tmp_path / "out.beton")
    assert json.loads(sidecar_path(tmp_path / "out.beton").read_text()) == sidecar
    content = (tmp_path / "out.beton").read_bytes()
    assert sidecar["pages"] == [sha256(content).hexdigest()]
    assert len(sidecar["fingerprint"]) == 64


def test_some_rows_are_kept_as_they_are_stored_under_other_labels(mixed_beton: Beton, tmp_path: Path) -> None:
    rows, labels = np.array([5, 0, 3]), np.array([9, 1, 0])
    sidecar = relabel(mixed_beton, tmp_path / "deep" / "some.beton", rows, labels, {"why": "a test"})
    some = Beton(tmp_path / "deep" / "some.beton")
    some.verify()
    assert sidecar == some.sidecar
    assert (sidecar["why"], sidecar["format"], some.classes) == ("a test", "mixed", mixed_beton.classes)
    assert some.labels.tolist() == labels.tolist()
    for i, row in enumerate(rows):
        assert some.stored(i) == mixed_beton.stored(row)
        assert np.array_equal(some.image(i), mixed_beton.image(row))


def test_relabelling_on_a_full_disk_leaves_nothing(array_beton: Beton, tmp_path: Path) -> None:
    out = tmp_path / "out" / "none.beton"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
    try:
        with pytest.raises(InputError, match=r"none\.beton: can't be written \(File too large\)"):
            relabel(array_beton, out, np.arange(3), np.zeros(3, np.int64), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(out.parent.iterdir()) == []
