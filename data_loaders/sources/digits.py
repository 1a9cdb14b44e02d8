"""scikit-learn's 1,797 handwritten digits, 8 x 8, in its own wheel: nothing to download."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_loaders.sources.base import Request, Source
from robustscale.errors import InputError
from robustscale.noise import permutation

KINDS = ("digits", "digits_source", "digits_target")
NUM_TEST = 360


def open_source(request: Request) -> Source:
    """8 x 8 handwritten digits, in scikit-learn's wheel: 1,437 to train on, 360 (a fixed fifth) to test on.

    Pixels 0..16 become round(v * 255 / 16). digits_source and digits_target are two halves without a common image, of
    which a fifth each is to test on, too: to pretrain on the one and tune on the other.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InputError("digits: they come with scikit-learn; pip install scikit-learn") from error
    split = request.choose(["train", "test"])
    digits = load_digits()
    order = permutation(len(digits.target), "digits")
    test, train = order[:NUM_TEST], order[NUM_TEST:]
    if request.kind != "digits":
        half = slice(request.kind == "digits_target", None, 2)
        test, train = test[half], train[half]
    rows = np.sort(test if split == "test" else train)
    images = np.round(digits.images[rows] * (255 / 16)).astype(np.uint8)[..., None]
    classes = tuple(str(name) for name in digits.target_names)
    return Source(request.spec, split, classes, digits.target[rows].astype(np.int64), lambda i: images[i])


def recognises(path: Path) -> bool:
    return False
