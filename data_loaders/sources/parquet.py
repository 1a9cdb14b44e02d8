"""Parquet files in the layout of Hugging Face's image data sets: `image: {bytes, path}` and `label`."""

from __future__ import annotations

import json
import threading
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_loaders.sources.base import Request, Source, decode, integer_labels, numbered
from robustscale.errors import InputError

KINDS = ("parquet",)
SPLITS = ("train", "validation", "val", "valid", "test")
IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label")


def open_source(request: Request) -> Source:
    """A file, or a folder of train.parquet or train-*.parquet, test..., as Hugging Face's image data sets.

    The folder's `data` will also do. Classes are the schema's `classes` (one a line), or those of `datasets`'
    ClassLabel, or 0 up to the largest label.
    """
    splits = _splits(request.existing())
    if not splits:
        raise InputError(
            f"{request.spec}: no parquet files; it needs train.parquet and test.parquet, or train-*.parquet"
        )
    split = request.choose(list(splits))
    shards = [_Shard(path) for path in splits[split]]
    labels = np.concatenate([shard.labels for shard in shards])
    classes = shards[0].classes or numbered(np.concatenate([_Shard(p).labels for ps in splits.values() for p in ps]))
    starts = np.cumsum([0] + [len(shard.labels) for shard in shards])

    def image(i: int) -> NDArray[np.uint8]:
        k = int(np.searchsorted(starts, i, side="right")) - 1
        return shards[k].image(i - int(starts[k]))

    return Source(request.spec, split, classes, labels, image)


def recognises(path: Path) -> bool:
    return bool(_splits(path))


def _splits(path: Path) -> dict[str, list[Path]]:
    if path.is_file():
        return {"all": [path]} if path.suffix == ".parquet" else {}
    files = sorted([*path.glob("*.parquet"), *path.glob("data/*.parquet")])
    named = {name: [f for f in files if f.stem == name or f.stem.startswith(f"{name}-")] for name in SPLITS}
    named = {name: shards for name, shards in named.items() if shards}
    return named or ({"all": files} if files else {})


class _Shard:
    """One file; row groups are decompressed as they are needed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = pq.ParquetFile(path)
            names = self._file.schema_arrow.names
            self._image = _first(IMAGE_COLUMNS, names, path)
            label = _first(LABEL_COLUMNS, names, path)
            self.labels = integer_labels(self._file.read([label])[label].to_numpy(), f"{path}, column {label}")
        except (pa.ArrowException, OSError) as error:
            raise _damaged(path, error) from error
        self.classes = _classes(self._file.schema_arrow.metadata or {}, label, path)
        groups = self._file.metadata
        self._starts = np.cumsum([0] + [groups.row_group(g).num_rows for g in range(groups.num_row_groups)])
        self._lock = threading.Lock()
        self._group = lru_cache(maxsize=2)(self._read_group)

    def image(self, i: int) -> NDArray[np.uint8]:
        g = int(np.searchsorted(self._starts, i, side="right")) - 1
        with self._lock:
            value = self._group(g)[i - int(self._starts[g])].as_py()
        data, where = value.get("bytes") if isinstance(value, dict) else value, f"{self.path}, row {i}"
        if not isinstance(data, bytes):
            raise InputError(f"{where}: column {self._image} holds no encoded image; store its bytes, not its path")
        return decode(data, where)

    def _read_group(self, g: int) -> pa.ChunkedArray:
        try:
            return self._file.read_row_group(g, [self._image])[self._image]
        except (pa.ArrowException, OSError) as error:
            raise _damaged(self.path, error) from error


def _damaged(path: Path, error: Exception) -> InputError:
    return InputError(f"{path}: can't be read as parquet ({' '.join(str(error).split())}); fetch it again")


def _first(wanted: tuple[str, ...], names: list[str], path: Path) -> str:
    found = next((name for name in wanted if name in names), None)
    if found is None:
        raise InputError(f"{path}: no column {' or '.join(wanted)}; it has {', '.join(names)}")
    return found


def _classes(metadata: dict[bytes, bytes], label: str, path: Path) -> tuple[str, ...]:
    try:
        if b"classes" in metadata:
            return tuple(metadata[b"classes"].decode().splitlines())
        features: Any = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
        return tuple(str(name) for name in features.get(label, {}).get("names", ()))
    except (ValueError, AttributeError, TypeError) as error:
        raise InputError(
            f"{path}: its schema's metadata does not name the classes ({error}); write it again"
        ) from error
