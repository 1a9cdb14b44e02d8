"""Images that a run must not be trained on, found among others."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from data_loaders.beton import Beton
from data_loaders.splits import Splits


def leaked(images: Beton, splits: Splits) -> dict[str, NDArray[np.bool_]]:
    """(N,) each: whether an image is one of the test set, and whether it is one of those held out for selection.

    Images are compared by their stored bytes: equal images are recognised where both files store them alike (one
    format, resolution and quality), near duplicates are not.
    """
    test = set(_digests(splits.test_file, range(len(splits.test_file))))
    held_out = set(_digests(splits.train_file, splits.held_out.tolist()))
    mine = list(_digests(images, range(len(images))))
    in_test = np.array([digest in test for digest in mine])
    return {"test set": in_test, "held out": np.array([digest in held_out for digest in mine]) & ~in_test}


def _digests(file: Beton, rows: Iterable[int]) -> Iterable[bytes]:
    return (hashlib.blake2b(file.stored(row), digest_size=16).digest() for row in rows)
