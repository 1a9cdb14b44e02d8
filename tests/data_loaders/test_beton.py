"""Whatever is done to a .beton file or its sidecar: one line that says what is wrong, or the data that was written."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from data_loaders import layout
from data_loaders.beton import Beton, sidecar_path
from robustscale.errors import InputError

Digits = tuple[NDArray[np.uint8], NDArray[np.int64]]


class Editable:
    """A copy of a file whose tables can be changed in place."""

    def __init__(self, beton: Beton, path: Path) -> None:
        self.path = path
        shutil.copy(beton.path, path)
        shutil.copy(sidecar_path(beton.path), sidecar_path(path))
        self.bytes = np.memmap(path, np.uint8, "r+")
        self.header = self.bytes[:24].view(layout.HEADER)
        self.fields = self.bytes[24 : layout.ROWS_START].view(layout.FIELD)
        row = layout.ARRAY_ROW if beton.is_array else layout.IMAGE_ROW
        n, table = beton.num_examples, int(self.header["table"][0])
        self.rows = self.bytes[layout.ROWS_START : layout.ROWS_START + n * row.itemsize].view(row)
        self.table = self.bytes[table:].view(layout.ALLOCATION)

    def open(self) -> Beton:
        self.bytes.flush()
        return Beton(self.path)


@pytest.fixture
def array_file(array_beton: Beton, tmp_path: Path) -> Editable:
    return Editable(array_beton, tmp_path / "edited.beton")


@pytest.fixture
def mixed_file(mixed_beton: Beton, tmp_path: Path) -> Editable:
    return Editable(mixed_beton, tmp_path / "edited.beton")


def refused(file: Editable, pattern: str) -> None:
    with pytest.raises(InputError, match=pattern) as caught:
        file.open()
    message = str(caught.value)
    assert "\n" not in message
    assert str(file.path) in message
    assert "robustscale.prepare" in message


def test_reads_what_was_written(array_beton: Beton, digits: Digits) -> None:
    images, labels = digits
    assert (len(array_beton), array_beton.is_array, array_beton.channels) == (30, True, 1)
    assert (array_beton.height, array_beton.width) == (8, 8)
    assert array_beton.classes[3] == "class 3"
    assert np.array_equal(array_beton.images(range(30)), images)
    assert np.array_equal(array_beton.labels, labels)
    array_beton.verify()


def test_reads_images_of_many_sizes(mixed_beton: Beton, photographs: list[NDArray[np.uint8]]) -> None:
    assert (mixed_beton.is_array, mixed_beton.channels, mixed_beton.height) == (False, 3, None)
    for i, photograph in enumerate(photographs):
        image = mixed_beton.image(i)
        assert image.shape == photograph.shape
        assert (int(mixed_beton.heights[i]), int(mixed_beton.widths[i])) == photograph.shape[:2]
        difference = np.abs(image.astype(int) - photograph).mean()
        assert difference == 0 if i % 2 == 0 else 0 < difference < 8


def test_travels_to_other_processes_as_its_path(array_beton: Beton) -> None:
    twin = copy.copy(array_beton)  # what pickling does
    assert np.array_equal(twin.image(5), array_beton.image(5))


def test_fingerprint_is_of_the_content(array_beton: Beton, tmp_path: Path) -> None:
    file = Editable(array_beton, tmp_path / "other.beton")
    assert file.open().content_fingerprint() == array_beton.fingerprint
    file.bytes[int(file.rows["ptr"][7])] ^= 1
    assert file.open().content_fingerprint() != array_beton.fingerprint


ARRAY_DAMAGE: dict[str, tuple[Callable[[Editable], Any], str]] = {
    "version": (lambda f: f.header["version"].fill(3), "version 3"),
    "one field": (lambda f: f.header["fields"].fill(1), "1 fields"),
    "page size": (lambda f: f.header["page"].fill(12345), "page size 12345"),
    "page size of one byte": (lambda f: f.header["page"].fill(1), "page size 1 "),
    "no rows": (lambda f: f.header["rows"].fill(0), "no images"),
    "more rows than bytes": (lambda f: f.header["rows"].fill(2**60), "do not fit"),
    "a row less": (lambda f: f.header["rows"].fill(29), "allocation table"),
    "table outside": (lambda f: f.header["table"].fill(2**63 + 5), "do not fit"),
    "table in the rows": (lambda f: f.header["table"].fill(30), "do not fit"),
    "fields exchanged": (lambda f: f.fields.__setitem__("name", [b"label", b"image"]), "instead of image and label"),
    "label of floats": (lambda f: f.fields["type"].__setitem__(1, 0), "field label, byte 1,065: type 0"),
    "image of bytes": (lambda f: f.fields["type"].__setitem__(0, 3), "field image, byte 24: type 3"),
    "array read as image": (
        lambda f: f.fields["type"].__setitem__(0, layout.RGB_IMAGE_FIELD),
        "do not fit|allocation|row",
    ),
    "array of floats": (lambda f: f.fields["dtype"].__setitem__(0, b'[["", "<f4"]]'), "not of uint8"),
    "dtype's length": (lambda f: f.fields["length"].__setitem__(0, 2**40), "not of uint8"),
    "four channels": (lambda f: f.fields["shape"].__setitem__((0, 2), 4), "8 x 8 x 4"),
    "height zero": (lambda f: f.fields["shape"].__setitem__((0, 0), 0), "0 x 8"),
    "height beyond all": (lambda f: f.fields["shape"].__setitem__((0, 0), 2**62), "pixels"),
    "another height": (lambda f: f.fields["shape"].__setitem__((0, 0), 9), "row 0.*height x width"),
    "fourth dimension": (lambda f: f.fields["shape"].__setitem__((0, 3), 2), "is not height x width"),
    "pointer outside": (lambda f: f.rows["ptr"].__setitem__(4, 2**50), "row 4.*data_ptr"),
    "both pointers outside": (
        lambda f: (f.rows["ptr"].__setitem__(4, 2**50), f.table["ptr"].__setitem__(4, 2**50)),
        "row 4.*outside the pages",
    ),
    "pointer into the header": (
        lambda f: (f.rows["ptr"].__setitem__(4, 0), f.table["ptr"].__setitem__(4, 0)),
        "row 4.*outside the pages",
    ),
    "pointer near the end": (
        lambda f: (
            f.rows["ptr"].__setitem__(4, f.header["table"][0] - 5),
            f.table["ptr"].__setitem__(4, f.header["table"][0] - 5),
        ),
        "row 4.*out of the page",
    ),
    "two rows, one image": (
        lambda f: (f.rows["ptr"].__setitem__(4, f.rows["ptr"][5]), f.table["ptr"].__setitem__(4, f.table["ptr"][5])),
        "overlap",
    ),
    "size zero": (lambda f: f.table["size"].__setitem__(9, 0), "row 9.*zero"),
    "size of 8 MiB": (lambda f: f.table["size"].__setitem__(9, 2**23), "row 9.*above a page"),
    "size that wraps": (lambda f: f.table["size"].__setitem__(9, 2**64 - 8), "row 9.*above a page"),
    "size of a part": (lambda f: f.table["size"].__setitem__(9, 63), "row 9.*height x width"),
    "an entry twice": (lambda f: f.table["row"].__setitem__(9, 8), "row 9.*not once"),
    "an entry of no row": (lambda f: f.table["row"].__setitem__(9, 10**6), "row 9.*not once"),
    "another label": (lambda f: f.rows["label"].__setitem__(3, (f.rows["label"][3] + 1) % 10), "tables"),
    "rows' labels exchanged": (
        lambda f: f.rows["label"].__setitem__(slice(0, 2), f.rows["label"][1::-1].copy()),
        "tables",
    ),
}

MIXED_DAMAGE: dict[str, tuple[Callable[[Editable], Any], str]] = {
    "width zero": (lambda f: f.rows["width"].__setitem__(2, 0), "row 2.*zero height or width"),
    "width of raw": (lambda f: f.rows["width"].__setitem__(2, 65), "row 2.*height x width"),
    "width of JPEG": (lambda f: f.rows["width"].__setitem__(1, 65), r"row 1.*not a JPEG of \(70, 65\)"),
    "beyond all": (
        lambda f: (f.rows["width"].__setitem__(1, 65535), f.rows["height"].__setitem__(1, 65535)),
        "row 1.*more than",
    ),
    "mode": (lambda f: f.rows["mode"].__setitem__(1, 7), "row 1.*neither"),
    "raw called JPEG": (lambda f: f.rows["mode"].__setitem__(2, layout.JPG), "row 2.*not a JPEG"),
    "JPEG called raw": (lambda f: f.rows["mode"].__setitem__(1, layout.RAW), "row 1.*height x width"),
    "zeros for a JPEG": (
        lambda f: f.bytes.__setitem__(slice(int(f.rows["ptr"][3]), int(f.rows["ptr"][3]) + 200), 0),
        "row 3.*not a JPEG",
    ),
    "image read as array": (lambda f: f.fields["type"].__setitem__(0, layout.NDARRAY_FIELD), "not of uint8"),
}


@pytest.mark.parametrize("name", ARRAY_DAMAGE)
def test_damage_is_named(array_file: Editable, name: str) -> None:
    damage, pattern = ARRAY_DAMAGE[name]
    damage(array_file)
    refused(array_file, pattern)


@pytest.mark.parametrize("name", MIXED_DAMAGE)
def test_damage_to_images_is_named(mixed_file: Editable, name: str) -> None:
    damage, pattern = MIXED_DAMAGE[name]
    damage(mixed_file)
    refused(mixed_file, pattern)


@pytest.mark.parametrize("label", [10, -3, 10**6])
def test_label_outside_the_classes(array_file: Editable, label: int) -> None:
    """Also where the sidecar is a forger's, and agrees with the file."""
    array_file.rows["label"][3] = label
    array_file.bytes.flush()
    sidecar = sidecar_path(array_file.path)
    said = json.loads(sidecar.read_text())
    content = array_file.bytes.tobytes()
    said["tables"] = layout.read_tables(lambda at, size, _: content[at : at + size], len(content)).digest
    sidecar.write_text(json.dumps(said))
    refused(array_file, f"row 3, field label, byte [0-9,]+: {label} is outside the 10 classes")


SIDECARS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "schema": (lambda s: s.update(schema=3), "schema 3; this version reads 1 and 2"),
    "schema missing": (lambda s: s.pop("schema"), "schema None"),
    "size": (lambda s: s.update(size=1), "size 1"),
    "classes missing": (lambda s: s.pop("classes"), "classes"),
    "classes empty": (lambda s: s.update(classes=[]), "classes"),
    "classes numbers": (lambda s: s.update(classes=[1, 2]), "classes"),
    "too few classes": (lambda s: s.update(classes=["a"]), "outside the 1 classes"),
    "format": (lambda s: s.update(format="jpg"), "format 'jpg'"),
    "unknown format": (lambda s: s.update(format="png"), "format 'png'"),
    "pages missing": (lambda s: s.pop("pages"), "lacks pages, a sha256 for each of 1;"),
    "a page too many": (lambda s: s["pages"].append(s["pages"][0]), "lacks pages"),
    "pages of numbers": (lambda s: s.update(pages=[5]), "lacks pages"),
    "schema 1 without sha256": (lambda s: s.update(schema=1), "lacks sha256"),
    "fingerprint a number": (lambda s: s.update(fingerprint=5), "lacks fingerprint"),
    "height": (lambda s: s.update(height=9), "height 9"),
    "channels": (lambda s: s.update(channels=3), "channels 3"),
    "num_examples": (lambda s: s.update(num_examples=None), "num_examples None"),
}


@pytest.mark.parametrize("name", SIDECARS)
def test_sidecar_that_does_not_fit(array_file: Editable, name: str) -> None:
    change, pattern = SIDECARS[name]
    path = sidecar_path(array_file.path)
    said = json.loads(path.read_text())
    change(said)
    path.write_text(json.dumps(said))
    refused(array_file, pattern)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000])
def test_sidecar_that_is_no_object(array_file: Editable, content: bytes) -> None:
    sidecar_path(array_file.path).write_bytes(content)
    refused(array_file, "JSON")


def test_sidecar_missing_or_of_another_file(array_file: Editable, mixed_beton: Beton) -> None:
    shutil.copy(sidecar_path(mixed_beton.path), sidecar_path(array_file.path))
    refused(array_file, "says")
    sidecar_path(array_file.path).unlink()
    refused(array_file, "edited.beton.json is missing")


def test_not_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.beton")
    (tmp_path / "empty.beton").write_bytes(b"")
    for path, pattern in [
        (tmp_path, "not a file"),
        (tmp_path / "pipe.beton", "not a file"),
        (tmp_path / "none.beton", "No such file.*robustscale.prepare"),
        (tmp_path / "empty.beton", "ends within the header, at byte 0"),
        (tmp_path / "empty.beton" / "x", "Not a directory"),
    ]:
        with pytest.raises(InputError, match=pattern):
            Beton(path)


def test_jpeg_that_cannot_be_decoded(mixed_file: Editable) -> None:
    table = mixed_file.table
    mixed_file.bytes[int(table["ptr"][1] + table["size"][1]) - 1] = 0
    beton = mixed_file.open()
    with pytest.raises(InputError, match=r"row 1, field image, byte [\d,]+: the JPEG can't be decoded"):
        beton.image(1)
    with pytest.raises(InputError, match=r"page 1, byte 8,388,608: not what was written .*robustscale.prepare"):
        beton.verify()


def test_file_that_shrinks_while_open(array_file: Editable) -> None:
    beton = array_file.open()
    os.truncate(array_file.path, int(array_file.rows["ptr"][12]) + 10)
    assert beton.image(11).shape == (8, 8, 1)
    with pytest.raises(InputError, match="ends within row 12"):
        beton.image(12)
