"""What every picture shares: a figure without global state, colours that all eyes tell apart, one way to save."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from robustscale.engine.folder import publish
from robustscale.run import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito 2008, https://jfly.uni-koeln.de/color/
BLUE, VERMILLION, GREEN, ORANGE, BLACK = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#000000"
PURPLE, SKY = "#CC79A7", "#56B4E9"
DPI = 120


def source_name(run: Run) -> str:
    """The data set, without the folders it lies in: `folder:/data/birds` is `birds`."""
    return Path(run.data.source.partition(":")[2] or run.data.source).name


def new_figure(width: float, height: float) -> Figure:
    """A figure of inches that belongs to nobody: pyplot would keep it, and choose a backend for the whole process."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plain(axes: Axes) -> None:
    """Light horizontal lines, and no box."""
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def save(figure: Figure, path: Path) -> None:
    """A PNG, whole or not at all."""
    import io

    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=DPI)
    publish(path, content.getvalue())
