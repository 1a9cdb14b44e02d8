"""Reads files by FFCV; answers each line on stdin, PATH or PATH, tab, BYTES, with one of JSON: see `hostile.Victim`."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from ffcv.memory_managers import OSCacheManager
from ffcv.pipeline.graph import Node

from data_loaders.augment import Request, cut_and_resize
from data_loaders.beton import Beton
from data_loaders.ffcv_loader import FfcvImages
from robustscale.errors import InputError, LoaderFailed
from tests.data_loaders.hostile import digest

SIZE = (16, 16)
NUM_ROWS = 20_000
"""Of a batch that takes seconds to decode."""
# What Numba has compiled once: it depends on types and shapes alone, and takes a hundred times longer than the rest.
_compiled: dict[tuple[Any, ...], Any] = {}
_compile_reader = OSCacheManager.compile_reader


def _reader(manager: OSCacheManager) -> Any:
    if ("reader",) not in _compiled:
        _compiled["reader",] = _compile_reader(manager)
    return _compiled["reader",]


OSCacheManager.compile_reader = _reader


def read(path: Path) -> dict[str, Any]:
    try:
        beton = Beton(path)
        boxes = np.stack([0 * beton.heights, 0 * beton.heights, beton.heights, beton.widths], 1)
        size = (int(beton.heights[0]), int(beton.widths[0])) if beton.is_array else SIZE
        # The names in what was compiled are numbered by process.
        Node.last_node_id = 0
        images = FfcvImages(beton, size, 4, 1)
        shape = (beton.is_array, size, beton.channels)
        images._loader.code = _compiled.setdefault(shape, images._loader.code)
        batches = [np.arange(len(beton))[i : i + 4] for i in range(0, len(beton), 4)]
        got = [
            image
            for batch in images.images(Request(rows, boxes[rows]) for rows in batches)
            for image in batch.numpy().copy()
        ]
        agrees = beton.sidecar["format"] == "jpg" or all(
            np.array_equal(image, cut_and_resize(beton.image(i), boxes[i], size)) for i, image in enumerate(got)
        )
        return {"pixels": digest(got), "agrees": agrees}
    except (InputError, LoaderFailed) as error:
        return {"error": str(error)}


def cut_short(path: Path, size: int) -> dict[str, Any]:
    """Have a file lose its end while FFCV, which maps it, decodes a batch that takes seconds."""
    beton, asked = Beton(path), threading.Event()
    images = FfcvImages(beton, SIZE, NUM_ROWS, 1)

    def requests() -> Iterator[Request]:
        for num in (1, NUM_ROWS):
            rows = np.arange(num) % len(beton)
            boxes = np.stack([0 * rows, 0 * rows, beton.heights[rows], beton.widths[rows]], 1)
            if num > 1:
                threading.Timer(0.2, asked.set).start()
            yield Request(rows, boxes)

    batches = images.images(requests())
    next(batches)
    asked.wait()
    os.truncate(path, size)
    next(batches)
    return {"survived": True}


if __name__ == "__main__":
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        name, _, size = line.rstrip("\n").partition("\t")
        answer = cut_short(Path(name), int(size)) if size else read(Path(name))
        print(json.dumps(answer), file=answers, flush=True)
