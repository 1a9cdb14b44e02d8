"""NumPy's .npz archives, as Keras' and MedMNIST's data sets come in. Never unpickled."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_loaders.sources import arrays
from data_loaders.sources.base import Request, Source
from robustscale.errors import InputError

KINDS = ("npz",)


def open_source(request: Request) -> Source:
    """A file with x_train, y_train, x_test, y_test, or x and y; or a folder of train.npz and test.npz.

    Pixels are integers in 0..255 or floats in [0, 1]. An array of strings called `classes` names the classes.
    """
    return arrays.open_files(request, ".npz", Archive)


def recognises(path: Path) -> bool:
    return bool(arrays.files(path, ".npz"))


class Archive(Mapping[str, NDArray[Any]]):
    """Arrays by name, read when asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
                self._names: list[str] = list(file.files)
        except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise self._error(error) from error

    def __getitem__(self, name: str) -> NDArray[Any]:
        try:
            with self.path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
                return np.asarray(file[name])
        except (OSError, ValueError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
            raise self._error(error) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def _error(self, error: Exception) -> InputError:
        # NumPy goes on to say how to run the code.
        reason = " ".join(str(error).split()).partition(" If you trust")[0]
        return InputError(
            f"{self.path}: can't be read as .npz without running code ({reason}); save numbers by numpy.savez"
        )
