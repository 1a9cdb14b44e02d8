"""A data set as batches: one order and one augmentation over three sources of pixels.

ffcv: FFCV's compiled pipeline. torch: a DataLoader over the same file. resident: the whole set on the device. For the
same arguments they yield the same batches, bit for bit; only JPEG decoders differ (`torch_loader`).
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import replace
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from data_loaders.augment import Augmentation, Kind, Request, Source
from data_loaders.beton import Beton
from data_loaders.order import Cuts, Order
from robustscale.fields import require
from robustscale.types import Batch, Loader, Share

LoaderKind = Literal["ffcv", "torch", "resident"]
Size = tuple[int, int]
"""Height and width."""


def make_loader(
    kind: LoaderKind,
    beton: Beton,
    indices: ArrayLike,
    *,
    batch_size: int,
    shards: int,
    rank: int,
    world: int,
    device: torch.device,
    seed: int,
    shuffle: bool,
    augmentation: Kind = "none",
    padding: int = 4,
    image_size: int | None = None,
    workers: int = 1,
    rand_augment: int = 0,
    magnitude: int = 9,
    side_at: Callable[[int], int] | None = None,
) -> Loader:
    """The examples `indices` of a file, for worker `rank` of `world`; see `Order` and `Augmentation`.

    `batch_size` is over all workers. With `image_size` the images become squares of this side: by random_resized_crop,
    or cut from the centre where the file has other sizes. `side_at`: of an epoch, where its images are made smaller
    than `image_size`. `workers`: threads (ffcv) or processes (torch) that decode.
    Batches may be kept; ask for one epoch at a time. Raises `InputError` where file and arguments do not fit.
    """
    rows = np.asarray(indices, np.int64)
    require(
        rows.ndim == 1 and len(rows) > 0 and rows.min() >= 0 and rows.max() < beton.num_examples,
        f"indices: they must be some of the {beton.num_examples} rows of {beton.path}",
    )
    order = Order(rows, batch_size, shards, rank, world, seed, shuffle)
    return make_pipeline(
        kind,
        beton,
        order,
        device=device,
        seed=seed,
        augmentation=augmentation,
        padding=padding,
        image_size=image_size,
        workers=workers,
        rand_augment=rand_augment,
        magnitude=magnitude,
        side_at=side_at,
    )


def make_pipeline(
    kind: LoaderKind,
    beton: Beton,
    order: Cuts,
    *,
    device: torch.device,
    seed: int,
    augmentation: Kind = "none",
    padding: int = 4,
    image_size: int | None = None,
    workers: int = 1,
    rand_augment: int = 0,
    magnitude: int = 9,
    side_at: Callable[[int], int] | None = None,
    first_id: int = 0,
) -> Pipeline:
    """The loader of `make_loader` for any order. Row i is example `first_id` + i."""
    _require_one_of("loader", kind, get_args(LoaderKind))
    _require_one_of("augmentation", augmentation, get_args(Kind))
    require(padding >= 0, f"padding: {padding} is negative")
    require(workers >= 0, f"workers: {workers} is negative; it counts decoding threads or processes")
    require(side_at is None or not beton.is_array, f"side_at: {beton.path} holds arrays, which are used as they are")
    augment = make_augmentation(beton, augmentation, padding, image_size, seed)
    augment = replace(augment, num_ops=rand_augment, magnitude=magnitude)
    stored = int(beton.heights[0]), int(beton.widths[0])

    def size_at(epoch: int) -> Size:
        side = image_size if side_at is None else side_at(epoch)
        return stored if side is None else (side, side)

    sources = Sources(lambda size: _source(kind, beton, order, augment, size, device, workers), size_at)
    if side_at is None:
        sources.at(0)
    return Pipeline(beton, order, augment, sources, device, first_id)


class Sources:
    """One source at a time, of the size of the epoch's images."""

    def __init__(self, make: Callable[[Size], Source], size_at: Callable[[int], Size]) -> None:
        self._make, self._size_at = make, size_at
        self._size: Size | None = None
        self._source: Source | None = None

    def at(self, epoch: int) -> Source:
        size = self._size_at(epoch)
        if self._source is None or size != self._size:
            self._source = None  # before there is another: a resident one holds the whole set
            self._source, self._size = self._make(size), size
        return self._source


class Pipeline:
    """A `Loader`."""

    def __init__(
        self,
        beton: Beton,
        order: Cuts,
        augmentation: Augmentation,
        sources: Sources,
        device: torch.device,
        first_id: int = 0,
    ) -> None:
        self.num_examples = len(order.indices)
        self.num_batches = order.num_batches
        self._beton, self._order, self._augmentation, self._sources = beton, order, augmentation, sources
        self._device, self._first_id = device, first_id

    def epoch(self, epoch: int, start: int = 0) -> Generator[Share, None, None]:
        cuts = list(self._order.epoch(epoch, start))
        requests = (self._request(cut.rows, epoch) for cut in cuts)
        with closing(self._sources.at(epoch).images(requests)) as images:
            for cut, pixels in zip(cuts, images, strict=True):
                index = torch.from_numpy(cut.rows + self._first_id)
                y = to_device(torch.from_numpy(self._beton.labels[cut.rows]), self._device)
                x = self._augmentation(to_device(pixels, self._device), index, epoch)
                yield Share(Batch.of(x, y, to_device(index, self._device)), cut.sizes, cut.total)

    def _request(self, rows: NDArray[np.int64], epoch: int) -> Request:
        sizes = self._beton.heights[rows], self._beton.widths[rows]
        return Request(rows, self._augmentation.boxes(rows + self._first_id, epoch, *sizes))


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    # FFCV overwrites its buffers without waiting for copies from them. This one is not reused before its copy is done.
    return torch.empty_like(tensor, pin_memory=True).copy_(tensor).to(device, non_blocking=True)


def _require_one_of(field: str, name: str, known: tuple[str, ...]) -> None:
    require(name in known, f"{field}: {name!r} is not known; choose one of {', '.join(known)}")


def make_augmentation(beton: Beton, kind: Kind, padding: int, image_size: int | None, seed: int) -> Augmentation:
    """Raises `InputError` where the file's images can't be brought to this size."""
    crop = kind == "random_resized_crop"
    stored = (beton.height, beton.width)
    require(image_size is not None or not crop, f"augmentation: {kind} needs image_size; 224 is usual for ImageNet")
    require(image_size is None or image_size >= 1, f"image_size: {image_size} is below 1")
    require(
        image_size is not None or None not in stored,
        f"image_size: the images of {beton.path} vary in size; give the side of the square to make of them",
    )
    # By the whole file, so that all its parts are treated alike.
    cut = crop or (image_size is not None and stored != (image_size, image_size))
    require(
        not (cut and beton.is_array),
        f"{f'augmentation: {kind}' if crop else f'image_size: {image_size}'} resizes images, but {beton.path} holds "
        f"arrays of {beton.height}x{beton.width}, which are used as they are; write it as jpg or raw",
    )
    return Augmentation(kind, seed, padding, cut)


def _source(
    kind: LoaderKind,
    beton: Beton,
    order: Cuts,
    augmentation: Augmentation,
    size: tuple[int, int],
    device: torch.device,
    workers: int,
) -> Source:
    # Each brings its own heavy import.
    if kind == "ffcv":
        from data_loaders.ffcv_loader import FfcvImages

        return FfcvImages(beton, size, order.largest, workers)
    if kind == "torch":
        from data_loaders.torch_loader import TorchImages

        return TorchImages(beton, size, workers)
    from data_loaders.resident import ResidentImages

    return ResidentImages(beton, order.indices, augmentation, size, device)
