"""frontier.html: whole, self-contained, escaped, and in a real browser it does what it says."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from robustscale.reports.frontier_page import frontier_page
from robustscale.reports.frontier_points import (
    choices,
    flops_text,
    price_texts,
    short_names,
    staircase,
    value_text,
)
from robustscale.reports.progress import percent
from tests.reports.frontiers import OAT, frontier

RUNS: dict[str, Any] = {"name": "dedicated runs", "kind": "runs", "key": "lam", "shift": 0.02}
MIXTURE: dict[str, Any] = {
    "name": "mixture", "kind": "mixture", "key": "share", "shift": 0.0, "num": 30, "judged": False,
}  # fmt: skip
CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "two objectives": frontier,
    "curves": lambda: frontier(curves=[OAT, RUNS, MIXTURE] * 3),
    "three objectives": lambda: frontier(40, objectives=("sa", "ra", "cost"), curves=[OAT]),
    "one trial": lambda: frontier(1, 0, 0, judged=0),
    "one trial, three objectives": lambda: frontier(1, 0, 0, objectives=("sa", "ra", "cost")),
    "no complete trial": lambda: frontier(0, 4, 2),
    "all failed": lambda: frontier(0, 0, 3, reason=""),
    "nothing": lambda: frontier(0, 0, 0),
    "only curves": lambda: frontier(0, 0, 0, curves=[OAT, RUNS]),
    "an empty curve": lambda: frontier(0, 0, 0, curves=[{**OAT, "num": 0}]),
    "hundreds": lambda: frontier(300, 180, 20, curves=[MIXTURE]),
}
VOID = {"meta", "input", "br", "link", "img"}
EVIL = "<script>alert(1)</script></script><img src=x onerror=alert(2)>\"'&$title"


class Page(HTMLParser):
    """Raises ValueError where a tag is not closed in its turn; notes what is in the page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        if self.open:
            raise ValueError(f"never closed: {self.open}")

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            raise ValueError(f"closed out of turn: {tag}")

    def handle_data(self, data: str) -> None:
        (self.scripts if self.open[-1:] == ["script"] else self.words).append(data)

    def rows(self) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if "data-ra" in attributes]


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[dict[str, Any], str]:
    found = CASES[request.param]()
    return found, frontier_page(found)


def test_page_is_whole_and_asks_for_nothing(case: tuple[dict[str, Any], str]) -> None:
    found, text = case
    page = Page(text)
    assert len(text.encode()) < 8e6
    assert not [attributes for _, attributes in page.tags if {"src", "href", "action", "data"} & set(attributes)]
    assert "default-src 'none'" in text and "form-action 'none'" in text
    identities = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(identities) == len(set(identities))
    assert set(figures(page)) <= set(identities)
    assert not re.search(r"@import|url\(\s*['\"]?http", text[: text.index("<body>")])
    assert len(page.rows()) == len(choices(found))


def figures(page: Page) -> dict[str, Any]:
    return dict(json.loads(next(script for script in page.scripts if script.startswith("{"))))


def test_figures_are_what_plotly_takes(case: tuple[dict[str, Any], str]) -> None:
    """It raises ValueError at an attribute or value that it does not know."""
    from plotly.graph_objects import Figure

    for figure in figures(Page(case[1])).values():
        assert Figure(figure).data


def test_frontier_is_drawn_as_it_is() -> None:
    found = frontier(curves=[OAT, RUNS])
    data = {trace.get("name"): trace for trace in figures(Page(frontier_page(found)))["frontier"]["data"]}
    on = sorted((t for t in found["trials"] if t["frontier"]), key=lambda t: t["ra"])
    assert data["frontier, 95 % intervals"]["x"] == [100 * t["ra"] for t in on]
    assert data["frontier, 95 % intervals"]["y"] == [100 * t["sa"] for t in on]
    high = [
        x + e
        for x, e in zip(
            *(data["frontier, 95 % intervals"][k] for k in ("x",)),
            data["frontier, 95 % intervals"]["error_x"]["array"],
            strict=True,
        )
    ]
    assert high == pytest.approx([100 * t["ra_interval"][1] for t in on])
    assert len(data["on the test set"]["x"]) == 3 + 12
    assert data[OAT["name"]]["mode"] == "lines+markers" and data["dedicated runs"]["mode"] == "markers"
    assert data[OAT["name"]]["line"]["color"] != data["dedicated runs"]["marker"]["color"]
    stopped = data["stopped early (12), at their last rung"]
    assert stopped["visible"] == "legendonly" and stopped["marker"]["symbol"] == "circle-open"


def test_headline_says_what_was_measured_on_what() -> None:
    text = " ".join(" ".join(Page(frontier_page(frontier())).words).split())
    for expected in (
        "1,000 held-out images, RA under apgd-10 linf 0.1", "2,000 test images in the ball linf 0.1",
        "square-5000 linf 0.1", "24 / 12 / 3", "GPU hours", "hypervolume above SA 10.0 %, RA 0.0 %", "upper bound",
        "diverged at step 31",
    ):  # fmt: skip
        assert expected in text, expected


def test_no_complete_trial_is_said_plainly() -> None:
    text = frontier_page(frontier(0, 4, 2))
    assert "No frontier: none of 6 trials ran to its end." in text and "Choose your point" not in text
    assert "No trial has ended yet." in frontier_page(frontier(0, 0, 0))
    assert "No trials: these are curves alone." in frontier_page(frontier(0, 0, 0, curves=[OAT]))


def evil() -> dict[str, Any]:
    found = frontier(12, 2, 2, title=EVIL, reason=EVIL, curves=[{**OAT, "name": EVIL, "key": EVIL}])
    found |= {"source": EVIL, "attack": EVIL, "space": {**found["space"], EVIL: EVIL}}
    found["importances"] = {"sa": {EVIL: 1.0}, "ra": {EVIL: 1.0}}
    for trial in found["trials"]:
        trial["values"] |= {EVIL: EVIL, "part": {"name": EVIL, EVIL: 1}}
        trial["commands"] = {EVIL: EVIL}
        if trial["test"]:
            trial["test"] |= {"ball": EVIL, "attacks": {EVIL: 0.1}}
    return found


def test_every_word_from_outside_is_escaped() -> None:
    text = frontier_page(evil())
    page, harmless = Page(text), Page(frontier_page(frontier(12, 2, 2, curves=[OAT])))
    assert "<script>alert" not in text and "<img" not in text
    assert len(page.scripts) == len(harmless.scripts) and "$title" in text
    assert not [attributes for _, attributes in page.tags if any(name.startswith("on") for name in attributes)]
    assert escape(EVIL) in text
    # plotly.js reads tags in labels.
    labels = [value for figure in figures(page).values() for value in strings(figure["data"])]
    assert not [label for label in labels if re.search(r"<(?!/?b>|br>|extra>|/extra>)", label)]


def strings(value: Any) -> list[str]:
    if isinstance(value, dict):
        # Axes of parallel coordinates are plain text there.
        return [
            text for key, each in value.items() if key not in ("dimensions", "customdata") for text in strings(each)
        ]
    return (
        [text for each in value for text in strings(each)]
        if isinstance(value, list)
        else [value] * isinstance(value, str)
    )


def test_values_that_are_not_set_have_a_place_of_their_own() -> None:
    found = frontier()
    axes = {axis["label"]: axis for axis in figures(Page(frontier_page(found)))["parallel"]["data"][0]["dimensions"]}
    complete = [trial for trial in found["trials"] if trial["state"] == "complete"]
    missing = ["objective.beta" not in trial["values"] for trial in complete]
    assert [value == axes["beta"]["tickvals"][0] for value in axes["beta"]["values"]] == missing
    assert axes["beta"]["ticktext"][0] == "not set" and 0 < sum(missing) < len(missing)
    assert axes["objective"]["ticktext"] == ["mart", "pgd_at", "trades"]
    assert axes["width"]["ticktext"] == ["0.5", "1", "2"]


def test_choices_are_the_frontier_and_every_point_of_a_curve() -> None:
    found = frontier(curves=[OAT])
    points = choices(found)
    assert [p.ra for p in points] == sorted(p.ra for p in points)
    assert {p.id for p in points} == {t["id"] for t in found["trials"] if t["frontier"]} | {""}
    for point in points:
        assert point.beaten == any(
            o.ra >= point.ra and o.sa >= point.sa and (o.ra, o.sa) != (point.ra, point.sa) for o in points
        )


def test_staircase_has_no_step_that_another_beats() -> None:
    assert staircase([(0.1, 0.9), (0.2, 0.9), (0.3, 0.5), (0.2, 0.8), (0.3, 0.5)]) == [(0.2, 0.9), (0.3, 0.5)]
    assert staircase([]) == []


def test_words() -> None:
    assert flops_text(1.234e15) == "1.23 PFLOPs" and flops_text(999.9e6) == "1 GFLOPs" and flops_text(0) == "0 FLOPs"
    assert value_text(8 / 255, "attack.eps") == "8/255" and value_text({"name": "linf", "eps": 0.5}) == "linf eps 0.5"
    assert short_names(["a.beta", "b.beta", "c.lr"]) == {"a.beta": "a.beta", "b.beta": "b.beta", "c.lr": "lr"}
    assert price_texts({"sa_per_ra": 0.5, "hours_per_ra": -0.5}) == ["0.5 points of SA", "30:00 min less"]
    assert price_texts({"sa_per_ra": 1.0, "hours_per_ra": 1e-5}) == ["1 point of SA", "no more time"]


def browse(page: Path, *options: str) -> tuple[str, list[str]]:
    """The page as a browser leaves it, and what its console said."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs chromium; none is in PATH")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-unsafe-swiftshader", "--window-size=1400,2400"]
    found = subprocess.run(
        [chromium, *flags, f"--user-data-dir={page.parent / 'profile'}", "--virtual-time-budget=5000",
         "--enable-logging=stderr", "--dump-dom", *options],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    # What a machine without a GPU says of WebGL is no error of the page.
    return found.stdout, [x for x in found.stderr.splitlines() if "CONSOLE" in x and "GL Driver Message" not in x]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CASES, "evil"])
def test_in_a_browser(tmp_path: Path, name: str) -> None:
    found = evil() if name == "evil" else CASES[name]()
    path = tmp_path / "frontier.html"
    path.write_text(frontier_page(found))
    points = choices(found)
    needed = 40
    enough = [point for point in points if round(100 * point.ra, 1) >= needed]
    best = max(enough, key=lambda point: (round(100 * point.sa, 1), round(100 * point.ra, 1)), default=None)
    text, console = browse(path, f"{path.as_uri()}#ra={needed}")
    assert not console
    page = Page(re.sub(r"<svg.*?</svg>", "", text, flags=re.DOTALL))
    rows = [attributes for attributes in page.rows() if "point" in (attributes["class"] or "").split()]
    assert len(rows) == len(points)
    chosen = [attributes["data-name"] for attributes in rows if "chosen" in (attributes["class"] or "").split()]
    assert chosen == ([best.name] if best else [])
    assert len(re.findall(r'class="js-plotly-plot|class="[^"]*js-plotly-plot', text)) == len(figures(page))
    assert 'data-title="Zoom"' in text or "parallel" not in figures(page)
    assert 'data-title="Share chart' not in text
    if best is not None:
        judged = best.test and f"RA {percent(best.test['ra'])}, SA {percent(best.test['sa'])} on the test set"
        assert f" on held-out images; {judged or 'not judged on the test set'}</output>" in text
    if points and best is None:
        assert "No point reaches an RA of 40 %" in text
