"""How many copies the leak check finds, by what was done to them, among images that are none.

    python -m benchmarks.leaks parquet:data/cifar10 parquet:data/downsampled-imagenet-200 --images 2000

Of the first source's test split every image is known; so many of them are changed in each way and looked for, among as
many images of the second source's training split. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import cv2
import numpy as np
from numpy.typing import NDArray

from data_loaders.perceptual_hash import Pictures, copies
from data_loaders.sources import open_source
from robustscale.noise import permutation

Image = NDArray[np.uint8]
Change = Callable[[Image, np.random.Generator], Image]


def jpeg(quality: int) -> Change:
    def change(image: Image, _: np.random.Generator) -> Image:
        encoded = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
        return np.asarray(cv2.imdecode(encoded, cv2.IMREAD_COLOR_RGB), np.uint8)

    return change


def through(side: int) -> Change:
    def change(image: Image, _: np.random.Generator) -> Image:
        down, up = cv2.INTER_AREA, cv2.INTER_CUBIC
        there = cv2.resize(image, (side, side), interpolation=down if side < len(image) else up)
        return np.asarray(cv2.resize(there, image.shape[1::-1], interpolation=up if side < len(image) else down))

    return change


def crop(side: int) -> Change:
    """Anywhere, and enlarged again."""

    def change(image: Image, random: np.random.Generator) -> Image:
        top, left = random.integers(0, len(image) - side + 1, 2)
        part = image[top : top + side, left : left + side]
        return np.asarray(cv2.resize(part, image.shape[1::-1], interpolation=cv2.INTER_CUBIC), np.uint8)

    return change


def brighter(gain: float, offset: float) -> Change:
    return lambda image, _: np.clip(float(gain) * image + offset, 0, 255).astype(np.uint8)


def mirrored(image: Image, _: np.random.Generator) -> Image:
    return image[:, ::-1]


def grey(image: Image, _: np.random.Generator) -> Image:
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), np.uint8)[..., None]


def both(first: Change, second: Change) -> Change:
    return lambda image, random: second(first(image, random), random)


CHANGES: dict[str, Change] = {
    "none": lambda image, _: image,
    **{f"JPEG, quality {quality}": jpeg(quality) for quality in (30, 50, 75, 95)},
    **{f"resized to {side} and back": through(side) for side in (28, 64)},
    "mirrored": mirrored,
    "mirrored, JPEG, quality 50": both(mirrored, jpeg(50)),
    "in grey": grey,
    "40 of 255 brighter": brighter(1, 40),
    "40 of 255 darker": brighter(1, -40),
    "contrast x 1.4": brighter(1.4, 0),
    "contrast x 0.6": brighter(0.6, 0),
    **{f"a crop of {side} of 32 pixels": crop(side) for side in (30, 28, 27, 26)},
    "a crop of 28, mirrored, JPEG, quality 50": both(crop(28), both(mirrored, jpeg(50))),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("source")
    parser.add_argument("--images", type=int, default=2000, help="changed in each way")
    args = parser.parse_args()
    target, source = open_source(args.target, "test"), open_source(args.source, "train")
    known = Pictures.of([(row, target.image(row)) for row in range(len(target))])
    print(
        f"| change | missed of {args.images:,} | false alarms of {args.images:,} | seconds |\n| --- | --- | --- | --- |"
    )
    for name, change in CHANGES.items():
        rows = permutation(len(target), "planted", name)[: args.images]
        random = np.random.default_rng(0)
        planted = [(int(row), change(target.image(int(row)), random)) for row in rows]
        others = permutation(len(source), "others", name)[: args.images]
        mixed = planted + [(-1, source.image(int(row))) for row in others]
        started, missed, alarms = time.process_time(), len(planted), 0
        for first in range(0, len(mixed), 500):
            mine = Pictures.of(mixed[first : first + 500])
            found = copies(mine, known)
            right = mine.rows[found.mine] == known.rows[found.other]
            missed -= len(np.unique(found.mine[right]))
            alarms += len(np.unique(found.mine[mine.rows[found.mine] < 0]))
        print(f"| {name} | {missed} | {alarms} | {time.process_time() - started:.1f} |", flush=True)


if __name__ == "__main__":
    main()
