"""Images and archives that somebody made to break a reader: each is left out or converted, and counted; nothing is
written but the file that was asked for."""

from __future__ import annotations

import io
import os
import struct
import sys
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from data_loaders.beton import Beton
from data_loaders.sources import open_source
from data_loaders.write import write
from robustscale.errors import InputError

Generator = np.random.Generator
LEFT_OUT, CONVERTED, EITHER = "left out", "converted", "either"


def pixels(random: Generator, channels: int = 3, dtype: Any = np.uint8) -> NDArray[Any]:
    height, width = random.integers(1, 24, 2)
    return random.integers(0, 256, (height, width, channels)).astype(dtype)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, data: bytes, *, depth: int = 8, colour: int = 2, more: bytes = b"") -> bytes:
    """With a header that need not fit the data."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    end = png_chunk(b"IDAT", zlib.compress(data)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + more + end


def no_pixels(random: Generator) -> bytes:
    width, height = [(0, 5), (5, 0), (0, 0)][random.integers(0, 3)]
    return png(width, height, bytes(100))


def bomb(random: Generator) -> bytes:
    """Gigapixels by its header; or by its header and a stream that swells a thousandfold."""
    side = int(random.choice([9_000, 20_000, 60_000, 2**31 - 1]))
    return png(side, side, bytes(1 << 16))


def text_bomb(random: Generator) -> bytes:
    text = b"comment\0\0" + zlib.compress(bytes(1 << 21))
    return png(2, 2, bytes(14), more=png_chunk(b"zTXt", text))


def cmyk(random: Generator) -> bytes:
    return encoded(Image.fromarray(pixels(random, 4), "CMYK"), "JPEG")


def deep(random: Generator) -> bytes:
    """16 bits a channel."""
    return encoded(Image.fromarray(pixels(random, 1, np.uint16)[..., 0] * 257), "PNG")


def floats(random: Generator) -> bytes:
    values = pixels(random, 1, np.float32)[..., 0]
    values[0, 0] = np.nan
    return encoded(Image.fromarray(values), "TIFF")


def other_mode(random: Generator) -> bytes:
    mode = ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "LAB"][random.integers(0, 8)]
    image = Image.fromarray(pixels(random))
    if mode == "LAB":
        return encoded(Image.fromarray(pixels(random), "LAB"), "TIFF")
    return encoded(image.convert(mode), "PNG" if mode in ("1", "L", "LA", "P", "RGBA") else "TIFF")


def other_format(random: Generator) -> bytes:
    kind = ["GIF", "BMP", "WEBP", "TIFF", "PPM", "JPEG"][random.integers(0, 6)]
    return encoded(Image.fromarray(pixels(random)), kind)


def film(random: Generator) -> bytes:
    frames = [Image.fromarray(np.full((8, 8, 3), 40 * k, np.uint8)) for k in range(4)]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


def cut(random: Generator) -> bytes:
    whole = encoded(Image.fromarray(random.integers(0, 256, (16, 16, 3)).astype(np.uint8)), "PNG")
    return whole[: random.integers(0, len(whole) - 20)]


def cut_jpeg(random: Generator) -> bytes:
    whole = encoded(Image.fromarray(random.integers(0, 256, (16, 16, 3)).astype(np.uint8)), "JPEG")
    return whole[: random.integers(0, len(whole) // 2)]


def flipped(random: Generator) -> bytes:
    whole = bytearray(other_format(random))
    for at in random.integers(0, len(whole), random.integers(1, 5)):
        whole[at] ^= 1 << random.integers(0, 8)
    return bytes(whole)


def no_image(random: Generator) -> bytes:
    made = [
        b"",
        b"\xff\xd8",
        b"<html>not found</html>",
        b"GIF89a",
        b"II*\0",
        random.bytes(int(random.integers(1, 400))),
    ]
    made += [
        b"\xff\xd8\xff\xd9",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b"P6 4 4 65535\n" + bytes(96)[:40],
    ]
    return made[random.integers(0, len(made))]


IMAGES: dict[Callable[[Generator], bytes], str] = {
    no_pixels: LEFT_OUT,
    bomb: LEFT_OUT,
    text_bomb: LEFT_OUT,
    cmyk: CONVERTED,
    deep: LEFT_OUT,
    floats: LEFT_OUT,
    other_mode: CONVERTED,
    other_format: CONVERTED,
    film: CONVERTED,
    cut: LEFT_OUT,
    cut_jpeg: LEFT_OUT,
    flipped: EITHER,
    no_image: LEFT_OUT,
}


def prepare(spec: str, out: Path, **options: Any) -> Beton:
    """As `python -m robustscale.prepare --skip-bad`; what it wrote must be sound."""
    sidecar = write(open_source(spec, download=False), out, skip_bad=True, **options)
    beton = Beton(out)
    beton.verify()
    assert sidecar == beton.sidecar
    for i in range(len(beton)):
        assert beton.image(i).size
    return beton


@pytest.mark.parametrize("count", [130, pytest.param(4000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
@pytest.mark.filterwarnings("default")  # a person's filters, under which Pillow goes on after it has warned
def test_bad_images(tmp_path: Path, count: int) -> None:
    kinds = list(IMAGES)
    images = [kinds[i % len(kinds)](np.random.default_rng([1, i])) for i in range(count)]
    # The label says which image it is.
    table = pa.table(
        {"image": [{"bytes": image, "path": "../../../etc/passwd"} for image in images], "label": range(count)}
    )
    pq.write_table(table, tmp_path / "bad.parquet")
    beton = prepare(f"parquet:{tmp_path / 'bad.parquet'}", tmp_path / "out.beton", format="raw")
    assert beton.sidecar["skipped"] + len(beton) == count
    kept = set(beton.labels.tolist())
    came = Counter((kinds[i % len(kinds)].__name__, IMAGES[kinds[i % len(kinds)]], i in kept) for i in range(count))
    print(came)
    assert not [key for key in came if key[1:] in ((LEFT_OUT, True), (CONVERTED, False))], came
    for row, i in enumerate(beton.labels.tolist()):
        expected = np.asarray(Image.open(io.BytesIO(images[i])).convert("RGB"))
        assert np.array_equal(beton.image(row), expected), kinds[i % len(kinds)].__name__


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_bad_arrays(tmp_path: Path, count: int) -> None:
    """Floats that are no pixels are left out one by one; arrays of other shapes are refused as a whole."""
    random = np.random.default_rng(count)
    images = random.random((count, 8, 8, 3))
    spoilt = dict(zip(range(0, count, 2), [np.nan, np.inf, -np.inf, -0.5, 1.5] * count, strict=False))
    for i, value in spoilt.items():
        images[i, *random.integers(0, 8, 2), 1] = value
    np.savez(tmp_path / "bad.npz", x=images, y=np.arange(count))
    beton = prepare(f"npz:{tmp_path / 'bad.npz'}", tmp_path / "out.beton", format="array")
    assert beton.sidecar["skipped"] == len(spoilt)
    assert beton.labels.tolist() == [i for i in range(count) if i not in spoilt]
    for shape in [(4, 8, 8, 2), (4, 8, 8, 4), (4, 8), (4,), (4, 0, 8, 3), (4, 8, 8, 3, 1)]:
        np.savez(tmp_path / "bad.npz", x=np.zeros(shape, np.uint8), y=np.zeros(4, int))
        with pytest.raises(InputError, match="images of shape"):
            prepare(f"npz:{tmp_path / 'bad.npz'}", tmp_path / "other.beton")


NAMES = [
    "../{}",
    "../../../../{}",
    "/tmp/{}",
    "//tmp/{}",
    "..\\..\\{}",
    "C:\\{}",
    "a/../../{}",
    "./../{}",
    "~/{}",
    "{}\0.png",
]
ARCHIVES = [(suffix, name, link) for suffix in (".npz", ".pt") for name in NAMES for link in (False, True)]
ARCHIVES += [(".npz", f"{'../' * k}etc/{{}}", False) for k in range(1, 11)]


def archive(path: Path, name: str, link: bool) -> None:
    """A sound data set, and further members that lead out of any folder it were unpacked in."""
    if path.suffix == ".npz":
        np.savez(path, x=np.zeros((4, 8, 8, 1), np.uint8), y=np.arange(4))
    else:
        torch.save({"x": torch.zeros(4, 1, 8, 8, dtype=torch.uint8), "y": torch.arange(4)}, path)
    with zipfile.ZipFile(path, "a") as file:
        for member in ("canary.npy", "canary"):
            info = zipfile.ZipInfo("placeholder")
            info.filename = name.format(member)
            if link:
                info.external_attr = 0o120777 << 16
            file.writestr(info, b"/etc/passwd" if link else b"canary")


class Writes:
    """Files opened to be written to, made, moved or removed by this process, while it is on."""

    def __init__(self) -> None:
        self.on, self.seen = False, list[str]()
        sys.addaudithook(self)

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            self.seen.append(str(args[0]))
        elif event in ("os.rename", "os.mkdir", "os.symlink", "os.link", "os.remove"):
            self.seen += [str(args[0]), *([str(args[1])] if event in ("os.rename", "os.link", "os.symlink") else [])]


@pytest.fixture(scope="module")
def writes() -> Writes:
    # A hook stays for good.
    return Writes()


def test_archives_that_lead_elsewhere(tmp_path: Path, writes: Writes) -> None:
    inside = tmp_path / "deep" / "data"
    inside.mkdir(parents=True)
    (inside / "before").mkdir()
    outcomes: Counter[str] = Counter()
    for k, (suffix, name, link) in enumerate(ARCHIVES):
        path = inside / "before" / f"{k}{suffix}"
        archive(path, name, link)
        writes.on, writes.seen = True, []
        try:
            beton = prepare(str(path), inside / f"{k}.beton")
            outcomes[CONVERTED] += len(beton) == 4
        except InputError:
            outcomes[LEFT_OUT] += 1
        finally:
            writes.on = False
        # Two unnamed pieces of shared memory are FFCV's.
        outside = [w for w in writes.seen if not w.lstrip("b'").startswith((str(inside), "/dev/shm", "/psm_"))]
        assert not outside, (name, outside)
    print(outcomes)
    assert outcomes.total() == len(ARCHIVES) == 50
    assert not list(tmp_path.rglob("*canary*"))
