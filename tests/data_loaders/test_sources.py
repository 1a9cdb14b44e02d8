"""Every kind of source, from small files of real digits: pixel for pixel, and what is said of bad files."""

from __future__ import annotations

import gzip
import io
import json
import struct
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
from data_loaders.sources import kinds, open_source
from data_loaders.sources.base import Source
from data_loaders.write import write
from robustscale.errors import InputError

Digits = tuple[NDArray[np.uint8], NDArray[np.int64]]
NAMES = tuple(str(k) for k in range(10))


def png(image: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(file, "PNG")
    return file.getvalue()


def halves(digits: Digits) -> dict[str, Digits]:
    """20 to train on, 10 to test on."""
    images, labels = digits
    return {"train": (images[:20], labels[:20]), "test": (images[20:], labels[20:])}


def folder(path: Path, digits: Digits) -> str:
    for split, (images, labels) in halves(digits).items():
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            file = path / split / str(label) / f"{i:03}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(png(image))
    return f"folder:{path}"


def table(images: NDArray[np.uint8], labels: NDArray[np.int64], metadata: dict[str, str]) -> pa.Table:
    column = pa.array([{"bytes": png(image), "path": None} for image in images])
    return pa.table({"image": column, "label": labels}).replace_schema_metadata(metadata)


def parquet(path: Path, digits: Digits) -> str:
    for split, (images, labels) in halves(digits).items():
        pq.write_table(
            table(images, labels, {"classes": "\n".join(NAMES)}), path / f"{split}.parquet", row_group_size=7
        )
    return f"parquet:{path}"


def parquet_shards(path: Path, digits: Digits) -> str:
    (path / "data").mkdir()
    features = {"info": {"features": {"label": {"names": NAMES, "_type": "ClassLabel"}}}}
    for split, (images, labels) in halves(digits).items():
        for k, rows in enumerate(np.array_split(np.arange(len(labels)), 3)):
            shard = table(images[rows], labels[rows], {"huggingface": json.dumps(features)})
            pq.write_table(shard, path / "data" / f"{split}-{k:05}-of-00003.parquet")
    return str(path)


def idx_bytes(values: NDArray[Any]) -> bytes:
    shape = struct.pack(f">{values.ndim}I", *values.shape)
    return bytes([0, 0, 8, values.ndim]) + shape + values.astype(np.uint8).tobytes()


def idx(path: Path, digits: Digits) -> str:
    for split, (images, labels) in halves(digits).items():
        stem = {"train": "train", "test": "t10k"}[split]
        (path / f"{stem}-images-idx3-ubyte").write_bytes(idx_bytes(images[..., 0]))
        (path / f"{stem}-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
    return f"idx:{path}"


def idx_gzipped(path: Path, digits: Digits) -> str:
    idx(path, digits)
    for file in list(path.iterdir()):
        file.with_name(f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()
    return str(path)


def npz(path: Path, digits: Digits) -> str:
    arrays = {
        f"{axis}_{split}": value
        for split, pair in halves(digits).items()
        for axis, value in zip("xy", pair, strict=True)
    }
    np.savez(path / "all.npz", **arrays)
    return str(path / "all.npz")


def npz_of_floats(path: Path, digits: Digits) -> str:
    for split, (images, labels) in halves(digits).items():
        np.savez(path / f"{split}.npz", images=images[..., 0] / 255, labels=labels[:, None], classes=np.array(NAMES))
    return f"npz:{path}"


def tensor(path: Path, digits: Digits) -> str:
    for split, (images, labels) in halves(digits).items():
        x = torch.from_numpy(images).permute(0, 3, 1, 2)
        torch.save({"x": x, "y": torch.from_numpy(labels), "classes": list(NAMES)}, path / f"{split}.pt")
    return f"tensor:{path}"


def tensor_of_pairs(path: Path, digits: Digits) -> str:
    for split, (images, labels) in halves(digits).items():
        x = torch.from_numpy(images[..., 0]).float() / 255
        torch.save((x, torch.from_numpy(labels)), path / f"{split}.pt")
    return str(path)


def torchvision_mnist(path: Path, digits: Digits) -> str:
    raw = path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    idx(raw, digits)
    return f"mnist:{path}"


BUILDERS = [
    folder,
    parquet,
    parquet_shards,
    idx,
    idx_gzipped,
    npz,
    npz_of_floats,
    tensor,
    tensor_of_pairs,
    torchvision_mnist,
]


def in_order(build: Callable[[Path, Digits], str], digits: Digits) -> Digits:
    """A folder's images are sorted by class."""
    order = np.argsort(digits[1], kind="stable") if build is folder else np.arange(len(digits[1]))
    return digits[0][order], digits[1][order]


@pytest.mark.parametrize("build", BUILDERS)
def test_round_trip(build: Callable[[Path, Digits], str], digits: Digits, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    spec = build(tmp_path / "in", digits)
    for split, half in halves(digits).items():
        images, labels = in_order(build, half)
        source = open_source(spec, split, root=tmp_path, download=False)
        assert source.split == split
        if build is not torchvision_mnist:
            assert source.classes == NAMES[: len(source.classes)]
        write(source, tmp_path / f"{split}.beton")
        beton = Beton(tmp_path / f"{split}.beton")
        assert np.array_equal(beton.labels, labels)
        assert np.array_equal(beton.images(range(len(beton))), images)


@pytest.mark.parametrize("build", [folder, parquet])
def test_colour_and_any_size(
    build: Callable[[Path, Any], str], photographs: list[NDArray[np.uint8]], tmp_path: Path
) -> None:
    images = np.empty(30, object)
    for i in range(30):
        images[i] = photographs[i % 6]
    source = open_source(build(tmp_path, (images, np.arange(30) // 3)), "train")
    assert all(np.array_equal(source.image(i), photographs[i % 6]) for i in range(20))
    write(source, tmp_path / "out.beton", format="raw")
    beton = Beton(tmp_path / "out.beton")
    assert all(np.array_equal(beton.image(i), photographs[i % 6]) for i in range(20))


def test_digits_are_split_for_good() -> None:
    from sklearn.datasets import load_digits

    train, test = open_source("digits"), open_source("digits", "test")
    assert (len(train), len(test)) == (1437, 360)
    together = sorted(source.image(i).tobytes() for source in (train, test) for i in range(len(source)))
    assert together == sorted(np.round(image * 255 / 16).astype(np.uint8).tobytes() for image in load_digits().images)
    # A change here would change every figure ever measured on the digits.
    assert test.labels[:12].tolist() == [3, 5, 8, 9, 3, 5, 7, 0, 8, 7, 5, 2]


def test_a_class_without_test_images_shifts_no_label(digits: Digits, tmp_path: Path) -> None:
    spec = folder(tmp_path, digits)
    for file in (tmp_path / "test" / "0").glob("*"):
        file.unlink()
    (tmp_path / "test" / "0").rmdir()
    train, test = open_source(spec, "train"), open_source(spec, "test")
    assert train.classes == test.classes == NAMES
    assert set(test.labels.tolist()) == set(halves(digits)["test"][1].tolist()) - {0}


def test_one_split_needs_no_name(digits: Digits, tmp_path: Path) -> None:
    folder(tmp_path, digits)
    source = open_source(str(tmp_path / "test"))
    assert source.split == "all"
    assert len(source) == 10
    with pytest.raises(InputError, match="no split 'train'; it has all"):
        open_source(str(tmp_path / "test"), "train")


def test_valid_is_validation(digits: Digits, tmp_path: Path) -> None:
    parquet(tmp_path, digits)
    (tmp_path / "test.parquet").rename(tmp_path / "validation.parquet")
    assert open_source(str(tmp_path), "val").split == "validation"


def refused(pattern: str, spec: str, split: str | None = None) -> None:
    with pytest.raises(InputError, match=pattern) as caught:
        reads(open_source(spec, split, download=False))
    assert "\n" not in str(caught.value)


def reads(source: Source) -> None:
    for i in range(len(source)):
        source.image(i)


def test_what_is_no_source(tmp_path: Path) -> None:
    refused("did you mean digits?", "digit")
    refused("did you mean parquet?", "parket:data")
    refused("the kinds are cifar10, .*torchvision", "qqqqqq")
    refused("needs a path, as in folder:PATH", "folder")
    refused("does not exist", f"npz:{tmp_path}/none.npz")
    refused("no split 'extra'; it has train, test", "digits", "extra")
    refused("no kind of source looks like it; say which, as in folder:", str(tmp_path))
    refused("torchvision has no data set NoSuchSet", "torchvision:NoSuchSet")
    refused("torchvision has no data set vision", "torchvision:vision")


def test_two_kinds_in_one_folder(digits: Digits, tmp_path: Path) -> None:
    parquet(tmp_path, digits)
    npz_of_floats(tmp_path, digits)
    refused("it may be npz or parquet; say which, as in npz:", str(tmp_path))


def test_torchvision_without_its_files(tmp_path: Path) -> None:
    refused(f"not found.*put its files in {tmp_path}, or leave out --no-download", f"cifar10:{tmp_path}")
    refused("put its files in", f"imagenet:{tmp_path}")


def test_folders(digits: Digits, tmp_path: Path) -> None:
    (tmp_path / "empty" / "cats").mkdir(parents=True)
    refused("no images in .*it needs a folder of images for each class", f"folder:{tmp_path / 'empty'}")
    spec = folder(tmp_path / "full", digits)
    bad = tmp_path / "full" / "train" / "3" / "bad.png"
    for content in [b"", b"not an image", png(digits[0][0])[:60]]:
        bad.write_bytes(content)
        refused(f"{bad}: can't be decoded", spec, "train")
    Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000).save(bad)
    refused(f"{bad}: pixels of mode I;16", spec, "train")
    bad.unlink()
    bad.symlink_to(tmp_path / "nowhere.png")
    refused(f"{bad}: can't be decoded", spec, "train")
    (tmp_path / "file").write_text("")
    refused("not a folder", f"folder:{tmp_path / 'file'}")


def test_parquet_files(digits: Digits, tmp_path: Path) -> None:
    file, (images, labels) = tmp_path / "t.parquet", digits
    spec = f"parquet:{file}"
    file.write_bytes(b"PAR1 not really")
    refused("t.parquet: can't be read as parquet", spec)
    pq.write_table(pa.table({"pixels": [1], "label": [1]}), file)
    refused("no column image or img; it has pixels, label", spec)
    pq.write_table(pa.table({"image": [b""], "answer": [1]}), file)
    refused("no column label or labels", spec)
    pq.write_table(table(images[:2], labels[:2] / 2, {}), file)
    refused("column label: labels of shape .* and type float64", spec)
    pq.write_table(pa.table({"image": pa.array([{"bytes": None, "path": "a.png"}]), "label": [1]}), file)
    refused("row 0: column image holds no encoded image", spec)
    pq.write_table(table(images[:2], labels[:2], {"huggingface": "{"}), file)
    refused("does not name the classes", spec)
    pq.write_table(pa.table({"image": [png(images[0]), b"no image"], "label": [3, 1]}), file)
    refused("t.parquet, row 1: can't be decoded", spec)
    assert open_source(spec).classes == ("0", "1", "2", "3")
    pq.write_table(table(images, labels, {}), file)
    whole = file.read_bytes()
    file.write_bytes(whole[:40] + bytes(60) + whole[100:])
    refused("t.parquet", spec)
    (tmp_path / "none").mkdir()
    refused("no parquet files", f"parquet:{tmp_path / 'none'}")


def test_idx_files(digits: Digits, tmp_path: Path) -> None:
    spec = idx(tmp_path, digits)
    images, labels = tmp_path / "train-images-idx3-ubyte", tmp_path / "train-labels-idx1-ubyte"
    good = images.read_bytes()
    for content, pattern in [
        (b"", "not an IDX file"),
        (b"\0\0\x0d\3" + good[4:], "not an IDX file"),
        (good[:-1], "cut short"),
    ]:
        images.write_bytes(content)
        refused(f"{images.name}: .*{pattern}", spec, "train")
    images.write_bytes(b"\0\0\x08\3" + b"\xff" * 12 + good[16:])
    refused("cut short", spec, "train")
    images.write_bytes(good)
    labels.write_bytes(idx_bytes(np.zeros(7)))
    refused(r"shape \(20, 8, 8\), but labels of shape \(7,\)", spec, "train")
    labels.rename(tmp_path / "train-labels-idx1-ubyte.gz")
    refused("can't be read", spec, "train")
    (tmp_path / "other-train-images-idx3-ubyte").write_bytes(good)
    refused("several train sets", spec, "train")


def test_npz_files(digits: Digits, tmp_path: Path) -> None:
    file, (images, labels) = tmp_path / "t.npz", digits
    spec = f"npz:{file}"
    floats = images / 255
    floats[7, 3, 3] = np.nan
    loud = images / 255
    loud[4] *= 2
    cases: list[tuple[dict[str, Any], str]] = [
        ({"a": images, "b": labels}, r"no x and y, or x_train and y_train, among its arrays \['a', 'b'\]"),
        ({"x": floats, "y": labels}, "row 7: NaN pixels"),
        ({"x": loud, "y": labels}, r"row 4: pixels 0..2; give floats in \[0, 1\]"),
        ({"x": images.astype(int) - 1, "y": labels}, "row 0: int64 pixels"),
        ({"x": images, "y": labels[:5]}, "for 5 labels"),
        ({"x": images, "y": labels / 2}, "type float64; give one integer"),
        ({"x": images[:, :4, :4].reshape(30, 2, 2, 4), "y": labels}, r"images of shape \(30, 2, 2, 4\)"),
        ({"x": images[:, :0], "y": labels}, "images of shape"),
        ({"x": images[:0], "y": labels[:0]}, "holds no images"),
        ({"x": images.astype(object), "y": labels}, "without running code"),
        ({"x": np.array(5), "y": labels}, "give one label an image"),
    ]
    for arrays, pattern in cases:
        np.savez(file, **arrays)
        refused(pattern, spec)
    whole = file.read_bytes()
    for content in [b"", b"no zip", whole[:200]]:
        file.write_bytes(content)
        refused("can't be read as .npz", spec)
    np.save(tmp_path / "array.npy", images)
    (tmp_path / "array.npy").rename(file)
    refused("can't be read as .npz", spec)
    refused("not a .npz file", f"npz:{tmp_path}")


class Payload:
    """Runs code when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.canary,)


def test_tensor_files(digits: Digits, tmp_path: Path) -> None:
    file, canary = tmp_path / "t.pt", tmp_path / "canary"
    spec = f"tensor:{file}"
    x, y = torch.from_numpy(digits[0]), torch.from_numpy(digits[1])
    torch.save({"x": x, "y": y, "extra": Payload(canary)}, file)
    refused("holds Python objects, not tensors alone; save", spec)
    assert not canary.exists()
    torch.save(x, file)
    refused(r"holds Tensor; save \{'x': x, 'y': y\}", spec)
    torch.save({"x": [1, 2], "y": y}, file)
    refused("holds no tensor of images", spec)
    torch.save({"x": x.bfloat16() / 256, "y": y}, file)
    assert open_source(spec).image(0).dtype == np.uint8
    for content in [b"", b"no tensors", file.read_bytes()[:300]]:
        file.write_bytes(content)
        refused("t.pt: ", spec)


def test_every_kind_says_what_it_is() -> None:
    for name, module in kinds().items():
        assert len((module.open_source.__doc__ or "").partition("\n")[0]) > 30, name
        assert module.__doc__
