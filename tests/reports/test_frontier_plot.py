"""The frontier's PNG and its table show what they were given."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from matplotlib.text import Text

from robustscale.reports import frontier_plot
from robustscale.reports.figures import BLUE, VERMILLION
from robustscale.reports.frontier_plot import draw_frontier
from robustscale.reports.frontier_points import choices
from robustscale.reports.frontier_table import frontier_table
from tests.reports.frontiers import OAT, frontier
from tests.reports.test_frontier_page import CASES, EVIL, RUNS
from tests.reports.test_pictures import read, share_of


@pytest.mark.parametrize("name", ["curves", "one trial, three objectives", "no complete trial", "only curves"])
def test_picture(tmp_path: Path, name: str) -> None:
    found = CASES[name]()
    draw_frontier(found, tmp_path / "f.png")
    pixels = read(tmp_path / "f.png")
    assert (share_of(BLUE, pixels) > 5e-5) == any(trial["frontier"] for trial in found["trials"])
    assert list(tmp_path.iterdir()) == [tmp_path / "f.png"]


def test_picture_names_attack_images_and_curves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    texts: list[str] = []
    monkeypatch.setattr(
        frontier_plot, "save", lambda figure, path: texts.extend(t.get_text() for t in figure.findobj(Text))
    )
    draw_frontier(frontier(title="$x^", curves=[OAT, {**RUNS, "name": f"_{EVIL}"}]), tmp_path / "f.png")
    said = "\n".join(texts)
    for expected in (
        "$x^: digits",
        "1,000 held-out images, RA under apgd-10 linf 0.1",
        "2,000 test images",
        OAT["name"],
        EVIL[:50],
    ):
        assert expected in said, expected


def test_words_that_look_like_formulas_can_be_drawn(tmp_path: Path) -> None:
    found = frontier(title="$\\frac", curves=[{**OAT, "name": "$\\frac{$ a $_"}]) | {"attack": "$\\x$"}
    draw_frontier(found, tmp_path / "f.png")
    assert share_of(VERMILLION, read(tmp_path / "f.png")) > 1e-4


def printed(found: dict[str, Any], **more: Any) -> str:
    out = io.StringIO()
    frontier_table(found, file=out, **more)
    return out.getvalue()


@pytest.mark.parametrize("name", CASES)
def test_table_has_every_point_that_may_be_taken(name: str) -> None:
    found = CASES[name]()
    text = printed(found, page=Path("somewhere/frontier.html"))
    assert "Page: somewhere/frontier.html" in text and "1,000 held-out images, RA under apgd-10" in text
    for point in choices(found):
        figures = f"{100 * point.ra:.1f} % ({100 * point.ra_interval[0]:.1f} to {100 * point.ra_interval[1]:.1f})"
        assert not (point.id or not point.beaten) or figures in text
    assert ("RA, test" in text) == any(point.test for point in choices(found) if point.id or not point.beaten)


def test_table_says_that_there_is_no_frontier() -> None:
    assert "No frontier: none of 6 trials ran to its end." in printed(frontier(0, 4, 2))
