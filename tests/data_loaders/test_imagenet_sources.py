"""Downsampled ImageNet and Tiny ImageNet, in the layout of their archives, from small images."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from data_loaders.beton import Beton
from data_loaders.sources import open_source
from data_loaders.write import ensure
from robustscale.errors import InputError
from robustscale.run import Data

IMAGES = np.random.default_rng(0).integers(0, 256, (25, 8, 8, 3), dtype=np.uint8)
LABELS = np.arange(25) * 37 % 1000 + 1


def downsampled(path: Path) -> str:
    """11 archives, so that 10 and 11 must follow 9; flat rows, one channel after the other."""
    flat = IMAGES.transpose(0, 3, 1, 2).reshape(25, -1)
    for k in range(11):
        rows = slice(2 * k, 2 * k + 2)
        np.savez(path / f"train_data_batch_{k + 1}.npz", data=flat[rows], labels=LABELS[rows], mean=flat[0] / 1.0)
    np.savez(path / "val_data.npz", data=flat[22:], labels=LABELS[22:])
    return f"downsampled_imagenet:{path}"


def tiny(path: Path) -> str:
    for i, image in enumerate(IMAGES[:20]):
        name = f"n{9 - i % 3:03}"
        file = path / "train" / name / "images" / f"{name}_{i}.JPEG"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file, "PNG")
    for split in ("val", "test"):
        (path / split / "images").mkdir(parents=True)
        for i, image in enumerate(IMAGES[20:]):
            Image.fromarray(image).save(path / split / "images" / f"{split}_{i}.JPEG", "PNG")
    rows = [f"val_{i}.JPEG\tn{9 - i % 3:03}\t0\t0\t7\t7\n" for i in reversed(range(5))]
    (path / "val" / "val_annotations.txt").write_text("".join(rows))
    return f"tiny_imagenet:{path}"


def test_downsampled_imagenet_pixel_for_pixel(tmp_path: Path) -> None:
    spec = downsampled(tmp_path)
    for split, rows in (("train", slice(0, 22)), ("val", slice(22, 25))):
        source = open_source(spec, split)
        assert source.labels.tolist() == (LABELS[rows] - 1).tolist()
        assert len(source.classes) == 1000 and source.classes[LABELS[0] - 1] == str(LABELS[0])
        for order in (range(len(source)), reversed(range(len(source)))):
            for i in order:
                assert np.array_equal(source.image(i), IMAGES[rows][i])
    assert open_source(str(tmp_path)).split == "train"


def test_downsampled_imagenet_takes_its_classes_names_from_their_table(tmp_path: Path) -> None:
    spec = downsampled(tmp_path)
    lines = [f"n{1000 - k:08} {k} word_{k}" for k in range(1, 1001)]
    (tmp_path / "map_clsloc.txt").write_text("\n".join(lines))
    source = open_source(spec, "val")
    assert source.classes[:2] == ("n00000999", "n00000998")
    (tmp_path / "map_clsloc.txt").write_text("\n".join(lines[:7] + lines[8:]))
    refused("map_clsloc.txt: no line for class 8", spec)


def test_tiny_imagenet_reads_its_validation_table(tmp_path: Path) -> None:
    spec = tiny(tmp_path)
    train, val = open_source(spec, "train"), open_source(spec, "val")
    assert train.classes == val.classes == ("n007", "n008", "n009")
    assert train.labels.tolist() == [0] * 6 + [1] * 7 + [2] * 7
    assert np.array_equal(train.image(6), IMAGES[1])
    assert val.labels.tolist() == [2, 1, 0, 2, 1]
    assert all(np.array_equal(val.image(i), IMAGES[20 + i]) for i in range(5))
    assert open_source(str(tmp_path), "val").classes == val.classes
    refused("no split 'test'; it has train, val", spec, "test")
    refused("the images of val are in no folders of classes; take tiny_imagenet:", f"folder:{tmp_path}")


@pytest.mark.parametrize("make", [downsampled, tiny])
def test_a_run_tests_on_the_validation_images(make: Callable[[Path], str], tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    train, test = map(Beton, ensure(Data(source=make(tmp_path / "source"), root=str(tmp_path / "root"))))
    assert (train.num_examples, test.num_examples) == ((22, 3) if make is downsampled else (20, 5))


def test_what_downsampled_imagenet_refuses(tmp_path: Path) -> None:
    spec, file = f"downsampled_imagenet:{tmp_path}", tmp_path / "val_data.npz"
    refused("no train_data_batch_1.npz or val_data.npz", spec)

    def holding(**arrays: NDArray[Any]) -> None:
        np.savez(file, **arrays)  # type: ignore[arg-type]

    labels = np.ones(2, np.int64)
    holding(data=np.zeros((2, 12), np.uint8))
    refused("no array 'labels' among", spec)
    for wrong in (0, 1001):
        holding(data=np.zeros((2, 12), np.uint8), labels=labels * wrong)
        refused("labels outside 1..1000", spec)
    for data in (np.zeros((2, 13), np.uint8), np.zeros((2, 12)), np.zeros((2, 3, 2, 2), np.uint8)):
        holding(data=data, labels=labels)
        refused("data of shape", spec)
    holding(data=np.zeros((3, 12), np.uint8), labels=labels)
    refused("3 images for 2 labels", spec)
    holding(data=np.array([{}, {}]), labels=labels)
    refused("can't be read as .npz without running code", spec)
    file.write_bytes(b"PK not really")
    refused("can't be read as .npz", spec)


def test_what_tiny_imagenet_refuses(tmp_path: Path) -> None:
    spec = tiny(tmp_path)
    table = tmp_path / "val" / "val_annotations.txt"
    good = table.read_text()
    for text in ("val_0.JPEG n009\n", "../train/n009/images/n009_0.JPEG\tn009\n", "/etc/passwd\tn009\n"):
        table.write_text(good + text)
        refused("val_annotations.txt, line 6: is not a file's name, a tab and a class", spec, "val")
    table.write_text(good + "val_0.JPEG\tn010\n")
    refused("names class n010, which has no folder in train", spec, "val")
    table.write_bytes(b"\xff\xfe\t\n")
    refused("val_annotations.txt: cannot be read", spec, "val")
    table.unlink()
    refused("give the unpacked archive", spec)


def read(spec: str, split: str | None) -> None:
    source = open_source(spec, split)
    for i in range(len(source)):
        source.image(i)


def refused(pattern: str, spec: str, split: str | None = None) -> None:
    with pytest.raises(InputError) as error:
        read(spec, split)
    message = str(error.value)
    assert re.search(re.escape(pattern), message) and "\n" not in message, message
