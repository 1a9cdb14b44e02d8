"""Images side by side: clean ones with what the attack added and what the network sees in them; and copies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from robustscale.reports.figures import BLUE, VERMILLION, new_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FACTORS = (1, 2, 3, 5, 8, 10, 15, 20, 30, 50, 80, 100, 150, 200, 300, 500)


def draw_gallery(
    images: Tensor,
    adversarial: Tensor,
    labels: Tensor,
    predicted: Tensor,
    predicted_adv: Tensor,
    classes: Sequence[str],
    path: Path,
    title: str = "",
) -> None:
    """A PNG with a column an example: image, perturbation, adversarial image; (N, C, H, W) in [0, 1], C in {1, 3}.

    The perturbation is signed and magnified about grey, by one factor for all. A prediction below 0 is one that was not
    finite. Right and wrong differ by sign, frame and colour.
    """
    n = len(images)
    delta = (adversarial - images).cpu().numpy()
    factor = _factor(float(np.abs(delta).max()) if delta.size else 0.0)
    figure = new_figure(max(5.5, 1.2 + 1.25 * n), 4.6 if not title else 4.9)
    grid = figure.subplots(3, n, squeeze=False)
    names = [str(c) for c in classes]
    for column in range(n):
        label = int(labels[column])
        _show(grid[0, column], images[column].cpu().numpy())
        _verdict(grid[0, column], int(predicted[column]), label, names)
        _show(grid[1, column], 0.5 + factor * delta[column])
        _show(grid[2, column], adversarial[column].cpu().numpy())
        _verdict(grid[2, column], int(predicted_adv[column]), label, names)
        grid[0, column].set_title(_short(names[label]), fontsize=9)
    rows = ("clean", f"perturbation\n× {factor:g}\n(grey = 0)", "adversarial")
    for axes, text in zip(grid[:, 0], rows, strict=True):
        axes.set_ylabel(text, rotation=0, ha="right", va="center", fontsize=9, labelpad=10)
    if title:
        figure.suptitle(title, fontsize=10)
    figure.supxlabel("above: true class;  below: prediction, ✓ right, ✗ wrong (dashed frame)", fontsize=8)
    save(figure, path)


def draw_pairs(
    pairs: Sequence[tuple[NDArray[np.uint8], NDArray[np.uint8], str]], path: Path, title: str = "", columns: int = 6
) -> None:
    """A PNG of pairs, each of two images (height x width x 1 or 3) of any size side by side above its caption."""
    rows = -(-len(pairs) // columns)
    figure = new_figure(1.9 * columns, 0.4 + 1.35 * rows)
    axes = figure.subplots()
    for place, (*images, caption) in enumerate(pairs):
        top, left = 1.35 * (place // columns), 2.2 * (place % columns)
        for side, image in enumerate(images):
            pixels = np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image
            axes.imshow(pixels, extent=(left + side, left + side + 1, top + 1, top), interpolation="nearest")
        axes.text(left + 1, top + 1.03, caption, ha="center", va="top", fontsize=7)
    axes.set(xlim=(0, 2.2 * columns - 0.2), ylim=(1.35 * rows, 0), title=title)
    axes.title.set_fontsize(10)
    axes.axis("off")
    save(figure, path)


def _factor(largest: float) -> int:
    """The largest round factor that keeps every perturbation within black and white."""
    fitting = [f for f in FACTORS if f * largest <= 0.5]
    return fitting[-1] if largest > 0 and fitting else 1


def _show(axes: Axes, image: NDArray[Any]) -> None:
    pixels = np.clip(image.transpose(1, 2, 0), 0, 1)
    axes.imshow(
        pixels if pixels.shape[2] == 3 else pixels[:, :, 0], cmap="gray", vmin=0, vmax=1, interpolation="nearest"
    )
    axes.set(xticks=[], yticks=[])


def _verdict(axes: Axes, predicted: int, label: int, names: Sequence[str]) -> None:
    right = predicted == label
    color, mark = (BLUE, "✓") if right else (VERMILLION, "✗")
    name = _short(names[predicted]) if predicted >= 0 else "not finite"
    axes.set_xlabel(f"{mark} {name}", color=color, fontsize=9)
    for spine in axes.spines.values():
        # A butt cap: the default, projecting, closes the gaps between the dashes.
        spine.set(color=color, linewidth=3, linestyle="-" if right else (0, (2, 1.2)), capstyle="butt")


def _short(name: str, length: int = 12) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"
