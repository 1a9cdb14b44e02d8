"""The table of frontier.html in which a person chooses a point, and finds the commands for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape

from robustscale.reports.frontier_points import (
    Frontier,
    Interval,
    Point,
    choices,
    interval,
    interval_text,
    measured,
    price_texts,
    short_names,
    value_text,
)
from robustscale.reports.progress import percent

EMPTY = "<td></td>"
FEW = 30
"""With more points than this, those of curves that another point beats are hidden at first."""


def choose_your_point(frontier: Frontier) -> str:
    """HTML; of a frontier with any trial or any point of a curve."""
    points = choices(frontier)
    rows = [_cells(point, _names(points)) for point in points]
    used = [name for name in rows[0] if any(row[name] != EMPTY for row in rows)]
    head = "".join(f"<th>{name}</th>" for name in used)
    bodies = "".join(
        _body(point, "".join(row[name] for name in used), len(used), frontier["n"], _hidden(point, points))
        for point, row in zip(points, rows, strict=True)
    )
    num = sum(_hidden(point, points) for point in points)
    more = f'<label><input id="all" type="checkbox"> show {num} points of curves that another point beats</label>'
    return f"""<h2>Choose your point</h2>
<p><label>Robustness needed: RA of at least
<input id="needed" type="number" min="0" max="100" step="any" placeholder="40"> %</label>
<label><input id="sure" type="checkbox"> with its whole interval</label>{more if num else ""}</p>
<output id="answer" for="needed sure"></output>
<div class="wide"><table id="points"><thead><tr>{head}</tr></thead>
{bodies}</table></div>"""


def _names(points: Sequence[Point]) -> dict[str, str]:
    return short_names(list(dict.fromkeys(path for point in points for path in point.values)))


def _hidden(point: Point, points: Sequence[Point]) -> bool:
    """Until it is asked for."""
    return point.beaten and not point.id and len(points) > FEW


def _cells(point: Point, names: Mapping[str, str]) -> dict[str, str]:
    """By the heads of their columns."""
    settings = ", ".join(
        f'<span title="{escape(path)}">{escape(names[path])} <b>{escape(value_text(value, path))}</b></span>'
        for path, value in point.values.items()
    )
    test = point.test if point.test and measured(point.test) else None
    return {
        "point": f'<td><button class="opener" type="button" aria-expanded="false">{escape(point.name)}</button></td>',
        "RA, held\u2011out": _accuracy(point.ra, point.ra_interval),
        "SA, held\u2011out": _accuracy(point.sa, point.sa_interval),
        "RA, test": _accuracy(test["ra"], interval(test, "ra")) if test else EMPTY,
        "SA, test": _accuracy(test["sa"], interval(test, "sa")) if test else EMPTY,
        "one more point of RA costs": lines_cell(price_texts(point.price)),
        "cost": lines_cell(point.cost),
        "settings": f"<td>{settings}</td>",
    }


def _body(point: Point, cells: str, width: int, n: int, hidden: bool) -> str:
    """Two rows: the figures; the details and commands, which open on a click."""
    data = {
        "name": point.name, "ra": f"{100 * point.ra:.1f}", "sa": f"{100 * point.sa:.1f}",
        "ra-low": f"{100 * point.ra_interval[0]:.1f}",
    }  # fmt: skip
    if point.test and measured(point.test):
        data |= {"test": f"RA {percent(point.test['ra'])}, SA {percent(point.test['sa'])}"}
    attributes = "".join(f' data-{key}="{escape(value)}"' for key, value in data.items())
    more = "".join(_details(point, n)) + "".join(_command(name, line) for name, line in point.commands.items())
    kind = "point hideable" if hidden else "point"
    return (
        f'<tbody class="{kind}"{attributes}><tr>{cells}</tr>'
        f'<tr class="more"><td colspan="{width}">{more}</td></tr></tbody>\n'
    )


def _accuracy(share: float, bounds: Interval) -> str:
    return lines_cell([percent(share), interval_text(bounds)])


def lines_cell(lines: Sequence[str]) -> str:
    """A cell: the first line, and smaller the rest."""
    rest = "".join(f"<small>{escape(line)}</small>" for line in lines[1:])
    return f'<td class="number">{escape(lines[0])}{rest}</td>' if lines else EMPTY


def _details(point: Point, n: int) -> Iterator[str]:
    lines = [f"{path} = {value_text(value, path)}" for path, value in point.values.items()]
    yield f"<p><code>{escape(chr(10).join(lines))}</code></p>"
    if point.id:
        yield f'<p class="small">trial {escape(point.id)}</p>'
    if point.n != n:
        yield f'<p class="small">Measured on {point.n:,} held-out images, not {n:,}.</p>'
    if point.test and point.test.get("attacks"):
        attacks = ", ".join(f"{name} {percent(ra)}" for name, ra in point.test["attacks"].items())
        yield f'<p class="small">RA on the test set: {escape(attacks)}</p>'


def _command(name: str, line: str) -> str:
    return (
        f'<div class="command"><span>{escape(name)}</span><code>{escape(line)}</code>'
        '<button type="button">copy</button></div>'
    )
